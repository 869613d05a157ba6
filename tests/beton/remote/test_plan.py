"""The plan covers every wanted row, with few bytes beside them."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fastprune.beton.remote.plan import Places, in_windows, requests_for


def places_of(sizes, *, rows_per_file=1000, gap=100):
    files = np.arange(len(sizes)) // rows_per_file
    ends = np.cumsum(np.asarray(sizes) + gap)
    first = np.searchsorted(files, files)
    offsets = ends - sizes - np.where(first > 0, ends[first - 1], 0)
    return Places(files, offsets, np.asarray(sizes))


@given(
    st.lists(st.integers(1, 5000), min_size=1, max_size=60),
    st.integers(1, 20),
    st.integers(0, 2000),
    st.data(),
)
def test_every_row_is_in_one_request_and_slack_is_kept(sizes, rows_per_file, gap, data):
    places = places_of(sizes, rows_per_file=rows_per_file, gap=gap)
    rows = np.flatnonzero(
        data.draw(st.lists(st.booleans(), min_size=60, max_size=60))[: len(sizes)]
    )
    requests = requests_for(places, rows, slack=0.05, most_bytes=8000)
    covered = np.concatenate([request.rows for request in requests]) if requests else rows
    assert sorted(covered.tolist()) == rows.tolist()
    for request in requests:
        ends = places.offsets[request.rows] + places.sizes[request.rows]
        assert (places.files[request.rows] == request.file).all()
        assert places.offsets[request.rows].min() == request.start
        assert ends.max() == request.start + request.size
        assert request.size <= 8000 + 5000
    padding = 512 * len(rows)
    wanted = places.sizes[rows].sum()
    assert sum(request.size for request in requests) <= 1.05 * wanted + padding


def test_neighbors_across_padding_are_one_request_and_others_are_not():
    places = places_of([1000] * 6, gap=200)
    assert [request.rows.tolist() for request in requests_for(places, np.array([0, 1, 3, 5]))] == [
        [0, 1],
        [3],
        [5],
    ]


def test_rows_of_two_files_are_never_one_request():
    places = places_of([1000] * 4, rows_per_file=2, gap=0)
    requests = requests_for(places, np.arange(4))
    assert [(request.file, request.start, request.size) for request in requests] == [
        (0, 0, 2000),
        (1, 0, 2000),
    ]


def test_windows_keep_the_order_and_have_a_size():
    places = places_of([1000] * 10)
    order = np.array([7, 2, 9, 4, 1])
    windows = list(in_windows(places, order, window_bytes=2500))
    assert np.concatenate(windows).tolist() == order.tolist()
    assert max(map(len, windows)) <= 3
    assert list(in_windows(places, order[:0], window_bytes=2500)) == []


def test_row_beyond_the_largest_request_is_not_cut():
    requests = requests_for(places_of([10, 5000, 10, 10], gap=0), np.arange(4), most_bytes=1000)
    assert [request.rows.tolist() for request in requests] == [[0], [1, 2, 3]]
