import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastprune.loading.sampler import EpochSampler

plans = st.fixed_dictionaries(
    {
        "num_rows": st.integers(1, 60),
        "batch_size": st.integers(1, 20),
        "world": st.integers(1, 5),
        "order": st.sampled_from(["random", "sequential"]),
        "seed": st.integers(0, 2**63 - 1),
        "epoch": st.integers(0, 1000),
    }
)


def _ranks(case, tail):
    """The plans of all ranks over rows 3, 5, 7, ..."""
    rows = 3 + 2 * np.arange(case["num_rows"])
    return [
        EpochSampler(
            rows, 123, case["batch_size"], case["order"], case["seed"], tail, rank, case["world"]
        )
        for rank in range(case["world"])
    ]


def _entries(plans, epoch):
    """Every entry of every batch of every rank."""
    batches = [batch for plan in plans for batch in plan.batches(epoch)]
    return np.concatenate(batches) if batches else np.empty(0, np.int64)


@given(plans)
def test_an_exact_tail_gives_every_row_once(case):
    ranks = _ranks(case, "exact")
    assert (np.sort(_entries(ranks, case["epoch"])) == ranks[0].rows).all()


@given(plans)
def test_a_dropped_tail_gives_full_batches_of_unrepeated_rows_to_every_rank(case):
    ranks = _ranks(case, "drop")
    entries = _entries(ranks, case["epoch"])
    assert len(np.unique(entries)) == len(entries)
    assert len(ranks[0].rows) - len(entries) < case["batch_size"] * case["world"]
    assert {plan.num_batches() for plan in ranks} == {
        len(entries) // case["batch_size"] // len(ranks)
    }


@given(plans)
def test_a_padded_tail_gives_full_batches_and_counts_the_repeated_rows(case):
    ranks = _ranks(case, "pad")
    entries = _entries(ranks, case["epoch"])
    assert (np.unique(entries) == ranks[0].rows).all()
    assert len(entries) - len(ranks[0].rows) == ranks[0].num_repeated()
    assert {len(batch) for plan in ranks for batch in plan.batches(case["epoch"])} == {
        case["batch_size"]
    }
    assert len({plan.num_batches() for plan in ranks}) == 1


@given(plans, st.sampled_from(["drop", "pad", "exact"]))
def test_the_number_of_batches_is_what_is_announced(case, tail):
    for plan in _ranks(case, tail):
        assert len(plan.batches(case["epoch"])) == plan.num_batches()


@given(plans)
def test_ranks_together_see_in_a_batch_what_one_rank_with_large_batches_sees(case):
    ranks = _ranks(case, "drop")
    world, rows = case["world"], ranks[0].rows
    large = EpochSampler(rows, 123, case["batch_size"] * world, case["order"], case["seed"], "drop")
    together = zip(*(plan.batches(case["epoch"]) for plan in ranks), strict=True)
    for parts, whole in zip(together, large.batches(case["epoch"]), strict=True):
        assert (np.stack(parts, axis=1).ravel() == whole).all()


def _order(rows, seed, epoch, **settings):
    """A whole epoch of one rank."""
    num_rows, order = int(rows.max()) + 1, settings.pop("order", "random")
    sampler = EpochSampler(rows, num_rows, len(rows), order, seed, "exact", **settings)
    return sampler.batches(epoch)[0]


@pytest.mark.parametrize("order", ["random", "pages"])
def test_seed_and_epoch_are_not_interchangeable(order):
    rows = np.arange(100)
    settings = {"order": order, "pages": rows // 10, "open_pages": 2}
    cases = [(0, 0), (0, 1), (1, 0), (1, 1)]
    orders = {tuple(_order(rows, seed, epoch, **settings)) for seed, epoch in cases}
    assert len(orders) == 4


def test_the_random_order_is_fixed_for_all_time():
    assert _order(np.arange(8), 7, 3).tolist() == [2, 5, 7, 3, 0, 6, 4, 1]


@given(
    st.data(),
    st.integers(1, 300),
    st.sampled_from(["random", "pages", "sequential"]),
    st.integers(0, 2**63 - 1),
    st.integers(0, 1000),
    st.integers(1, 4),
)
def test_the_order_of_a_subset_is_that_of_the_whole_beton_without_the_other_rows(
    data, num_rows, order, seed, epoch, world
):
    kept = np.array(sorted(data.draw(st.sets(st.integers(0, num_rows - 1), min_size=1))))
    pages = np.arange(num_rows) // data.draw(st.integers(1, 40))

    def sampler(rows, rank=0, world=1):
        settings = {"pages": pages, "open_pages": 3}
        return EpochSampler(rows, num_rows, 7, order, seed, "exact", rank, world, **settings)

    whole = sampler(np.arange(num_rows)).rank_rows(epoch)
    filtered = whole[np.isin(whole, kept)]
    assert (sampler(kept).rank_rows(epoch) == filtered).all()
    for rank in range(world):
        assert (sampler(kept, rank, world).rank_rows(epoch) == filtered[rank::world]).all()


@pytest.mark.parametrize("epoch", [0, 5])
def test_the_sequential_order_is_the_subset_itself(epoch):
    rows = np.array([2, 4, 9])
    assert (_order(rows, 1, epoch, order="sequential") == rows).all()


@given(st.integers(1, 400), st.integers(1, 30), st.integers(1, 12), st.integers(0, 2**63 - 1))
def test_the_page_order_visits_every_row_once_and_keeps_few_pages_open(
    num_rows, rows_per_page, open_pages, seed
):
    rows = 2 * np.arange(num_rows)
    pages = np.arange(2 * num_rows - 1) // rows_per_page
    entries = _order(rows, seed, 1, order="pages", pages=pages, open_pages=open_pages)
    assert (np.sort(entries) == rows).all()
    visited = entries // rows_per_page
    first = {page: i for i, page in reversed(list(enumerate(visited)))}
    last = {page: i for i, page in enumerate(visited)}
    open_now = [sum(first[p] <= i <= last[p] for p in first) for i in range(0, num_rows, 7)]
    assert max(open_now) <= open_pages + 1


def test_the_page_order_mixes_the_open_pages():
    rows = np.arange(1000)
    entries = _order(rows, 0, 0, order="pages", pages=rows // 100, open_pages=4)
    assert len(np.unique(entries[450:550] // 100)) >= 4
    assert (np.diff(entries) != 1).mean() > 0.9


@pytest.mark.parametrize(
    ("order", "digest"), [("random", "97836ee605b06db8"), ("pages", "42784af1a7508dbc")]
)
def test_whole_epochs_are_ordered_as_they_always_were(order, digest):
    """Another order would break every resumed run and every cache that goes by epochs."""
    rows, found = np.arange(300), hashlib.blake2b(digest_size=8)
    settings = {"order": order, "pages": rows // 16, "open_pages": 3}
    for seed in (0, 7):
        for epoch in (0, 1, 90):
            found.update(_order(rows, seed, epoch, **settings).astype("<i8").tobytes())
    assert found.hexdigest() == digest
