import threading

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastprune.base.errors import InvalidValueError
from fastprune.difficulty.kernels import centroid_distances, centroid_median_distances


def plain_distances(features, labels, center=np.mean):
    """The formula, class by class, in float64."""
    values = np.asarray(features).astype(np.float64)
    distances = np.zeros(len(values))
    for label in np.unique(labels):
        rows = values[labels == label]
        distances[labels == label] = np.linalg.norm(rows - center(rows, axis=0), axis=1)
    return distances


def random_features(seed, num_rows=301, width=37, num_classes=7, dtype=np.float32, offset=0.0):
    generator = np.random.default_rng(seed)
    features = (generator.normal(size=(num_rows, width)) + offset).astype(dtype)
    return features, generator.integers(0, num_classes, num_rows)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize(
    ("kernel", "center"), [(centroid_distances, np.mean), (centroid_median_distances, np.median)]
)
def test_distances_are_those_of_the_formula(kernel, center, dtype):
    features, labels = random_features(0, dtype=dtype)
    expected = plain_distances(features, labels, center)
    distances = kernel(features, labels)
    assert distances.dtype == np.float32
    np.testing.assert_allclose(distances, expected, rtol=1e-6)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    num_rows=st.integers(1, 70),
    width=st.integers(1, 67),
    num_classes=st.integers(1, 9),
    dtype=st.sampled_from([np.float16, np.float32]),
    median=st.booleans(),
)
def test_any_shape_and_label_order_is_right(seed, num_rows, width, num_classes, dtype, median):
    features, labels = random_features(seed, num_rows, width, num_classes, dtype)
    kernel = centroid_median_distances if median else centroid_distances
    expected = plain_distances(features, labels, np.median if median else np.mean)
    distances = kernel(features, labels, num_classes=num_classes + 3)
    np.testing.assert_allclose(distances, expected, rtol=1e-5, atol=1e-12)


def test_median_of_a_class_too_large_for_one_block_of_columns_is_right():
    features, labels = random_features(8, num_rows=70_000, width=65, num_classes=1)
    expected = plain_distances(features, labels, np.median)
    np.testing.assert_allclose(centroid_median_distances(features, labels), expected, rtol=1e-6)


def test_large_offsets_cost_no_accuracy():
    features, labels = random_features(1, num_rows=5000, num_classes=3, offset=1e5)
    expected = plain_distances(features, labels)
    np.testing.assert_allclose(centroid_distances(features, labels), expected, rtol=1e-6)


def test_values_near_the_ends_of_float16_and_float32_are_right():
    labels = np.array([0, 1, 0, 1, 1])
    half = np.array([[65504, 6e-8], [-65504, 0], [-65504, 1], [2, 3], [4, 5]], np.float16)
    single = half.astype(np.float32) * np.float32(1e30)
    for features in (half, single):
        expected = plain_distances(features, labels)
        np.testing.assert_allclose(centroid_distances(features, labels), expected, rtol=1e-6)


def test_row_alone_in_its_class_is_at_its_centre():
    features = np.array([[1.5, 2.5], [0, 0], [0, 2]], np.float32)
    assert centroid_distances(features, [3, 1, 1]).tolist() == [0, 1, 1]


def test_classes_without_rows_change_nothing():
    features, labels = random_features(2)
    expected = centroid_distances(features, labels)
    assert np.array_equal(centroid_distances(features, labels, num_classes=1000), expected)


def test_no_rows_give_no_distances():
    assert centroid_distances(np.zeros((0, 5), np.float32), np.zeros(0, np.int64)).shape == (0,)


def test_memory_map_gives_what_the_array_gives(tmp_path):
    features, labels = random_features(3, dtype=np.float16)
    features.tofile(tmp_path / "features.f16")
    mapped = np.memmap(tmp_path / "features.f16", np.float16, "r", shape=features.shape)
    expected = centroid_distances(features, labels)
    assert np.array_equal(centroid_distances(mapped, labels), expected)


def test_slices_with_steps_give_what_their_copies_give():
    features, labels = random_features(4)
    expected = centroid_distances(features[:, ::3].copy(), labels)
    assert np.array_equal(centroid_distances(features[:, ::3], labels), expected)


def test_result_depends_on_no_thread_count_and_the_count_stays_as_it_was():
    features, labels = random_features(5, num_rows=4000)
    before = numba.get_num_threads()
    expected = centroid_distances(features, labels)
    assert numba.get_num_threads() == before
    numba.set_num_threads(1)
    try:
        assert np.array_equal(centroid_distances(features, labels), expected)
        assert numba.get_num_threads() == 1
    finally:
        numba.set_num_threads(before)


def test_two_threads_may_call_at_once():
    features, labels = random_features(6, num_rows=20_000)
    expected = centroid_distances(features, labels)
    results = []
    calls = [
        threading.Thread(target=lambda: results.append(centroid_distances(features, labels)))
        for _ in range(4)
    ]
    for call in calls:
        call.start()
    for call in calls:
        call.join()
    assert len(results) == 4
    assert all(np.array_equal(result, expected) for result in results)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("kernel", [centroid_distances, centroid_median_distances])
def test_value_that_is_not_finite_is_refused_with_the_first_row(kernel, dtype, value):
    features, labels = random_features(7, dtype=dtype)
    features[200, 3] = value
    features[123, 36] = value
    with pytest.raises(
        InvalidValueError, match=f"row 123 hold {value} at position 36.*Score again in float32"
    ):
        kernel(features, labels)


def test_float64_beyond_float32_that_overflows_is_refused():
    features = np.array([[1.0], [1.7e308], [1.7e308]])
    with pytest.raises(InvalidValueError, match=r"row 1 hold 1\.7e\+308 .*within float32's range"):
        centroid_distances(features, [0, 0, 0])


@pytest.mark.parametrize("value", [1e39, 1e200])
def test_float64_beyond_float32_is_refused_though_its_sums_are_finite(value):
    with pytest.raises(InvalidValueError, match=r"row 1 hold 1e\+.*within float32's range"):
        centroid_distances(np.array([[0.0], [value]]), [0, 0])


def test_distance_beyond_float32_is_refused():
    features = np.array([[3e38] * 9, [3e38] * 9, [-3e38] * 9], np.float32)
    with pytest.raises(InvalidValueError, match=r"row 0 lies farther.*float32.*Scale.*down"):
        centroid_distances(features, [0, 0, 0])


def test_lists_are_taken_as_arrays():
    assert centroid_distances([[0.0, 0.0], [0.0, 2.0]], [0, 0]).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("labels", "num_classes", "message"),
    [
        ([0, -1, 1], None, "row 1 is -1; it must be >= 0"),
        ([0, 1, 5], 5, "row 2 is 5; it must be >= 0 and below 5"),
        ([0, 1], None, r"labels must be 3 integers.*\(2,\)"),
        ([0.0, 1.0, 2.0], None, "labels must be 3 integers.*float64"),
    ],
)
def test_wrong_labels_are_refused(labels, num_classes, message):
    with pytest.raises(InvalidValueError, match=message):
        centroid_distances(np.zeros((3, 2), np.float32), labels, num_classes=num_classes)


@pytest.mark.parametrize("features", [np.zeros(3, np.float32), np.zeros((3, 2), np.int32)])
def test_features_of_wrong_shape_or_type_are_refused(features):
    with pytest.raises(InvalidValueError, match=r"\(N, D\) array of float16, float32 or float64"):
        centroid_distances(features, [0, 0, 0])
