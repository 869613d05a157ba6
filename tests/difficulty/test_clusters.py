"""Spherical k-means: the same clusters everywhere, and defined results at the edges."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastprune.base.errors import InvalidValueError
from fastprune.difficulty.clusters import spherical_kmeans


def blobs(num_rows=600, num_blobs=6, width=16, spread=0.1, seed=0):
    """Rows around a few directions, at lengths from 0.5 to 2, and which one each belongs to."""
    generator = np.random.default_rng(seed)
    directions = generator.standard_normal((num_blobs, width))
    blob = np.arange(num_rows) % num_blobs
    rows = directions[blob] + spread * generator.standard_normal((num_rows, width))
    return (rows * generator.uniform(0.5, 2, (num_rows, 1))).astype(np.float32), blob


def purity(assignments, truth):
    return sum(np.bincount(truth[assignments == k]).max() for k in set(assignments)) / len(truth)


def test_clusters_of_separate_directions_are_found():
    features, blob = blobs()
    clusters = spherical_kmeans(features, 6)
    assert purity(clusters.assignments, blob) == 1
    assert clusters.converged
    np.testing.assert_allclose(np.linalg.norm(clusters.centers, axis=1), 1, rtol=1e-6)


def test_distances_and_assignments_are_those_of_the_nearest_center():
    features, _ = blobs(spread=1.0)
    clusters = spherical_kmeans(features, 9, seed=3)
    units = features.astype(np.float64)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    expected = 1 - units @ clusters.centers.astype(np.float64).T
    np.testing.assert_array_equal(clusters.assignments, expected.argmin(axis=1))
    np.testing.assert_allclose(clusters.distances, expected.min(axis=1), atol=2e-6)
    assert clusters.inertia == pytest.approx(expected.min(axis=1).sum(), rel=1e-5)


def test_settled_centers_are_the_mean_directions_of_their_rows():
    features, _ = blobs(spread=0.6)
    clusters = spherical_kmeans(features, 6, tolerance=0, max_iterations=200)
    units = features / np.linalg.norm(features, axis=1, keepdims=True)
    for k in range(6):
        mean = units[clusters.assignments == k].sum(axis=0)
        np.testing.assert_allclose(clusters.centers[k], mean / np.linalg.norm(mean), atol=1e-5)


@pytest.mark.parametrize("num_threads", [2, 5])
def test_threads_do_not_change_a_bit(num_threads):
    features, _ = blobs(num_rows=5000, width=33, spread=2.0)
    one = spherical_kmeans(features, 40, seed=7, num_threads=1)
    other = spherical_kmeans(features, 40, seed=7, num_threads=num_threads)
    assert one.centers.tobytes() == other.centers.tobytes()
    assert one.assignments.tobytes() == other.assignments.tobytes()
    assert one.distances.tobytes() == other.distances.tobytes()


def test_seeds_begin_elsewhere():
    features, _ = blobs(spread=3.0)
    first, second = (spherical_kmeans(features, 20, seed=seed) for seed in (0, 1))
    assert first.assignments.tolist() != second.assignments.tolist()


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_features_of_other_dtypes_give_the_same_clusters(dtype):
    features, blob = blobs()
    assert purity(spherical_kmeans(features.astype(dtype), 6).assignments, blob) == 1


def test_growing_parts_lead_to_as_good_clusters_as_all_rows_at_once(monkeypatch):
    features, _ = blobs(num_rows=8000, num_blobs=20, spread=1.5)
    grown = spherical_kmeans(features, 20).inertia
    monkeypatch.setattr("fastprune.difficulty.clusters._FIRST_ROWS_PER_CENTER", 10**9)
    assert grown <= spherical_kmeans(features, 20).inertia * 1.02


def test_every_row_is_its_own_cluster_where_there_are_as_many():
    features, _ = blobs(num_rows=12, num_blobs=12)
    clusters = spherical_kmeans(features, 12)
    assert sorted(clusters.assignments) == list(range(12))
    np.testing.assert_allclose(clusters.distances, 0, atol=1e-6)


def test_one_cluster_has_every_row():
    features, _ = blobs()
    assert not spherical_kmeans(features, 1).assignments.any()


def test_duplicates_beyond_the_number_of_clusters_share_one():
    features = np.repeat(np.eye(4, dtype=np.float32), 50, axis=0)
    clusters = spherical_kmeans(features, 4)
    assert purity(clusters.assignments, np.repeat(np.arange(4), 50)) == 1
    assert len(set(clusters.assignments)) == 4


def test_fewer_directions_than_clusters_are_refused():
    # Twice as long is the same direction.
    features = np.concatenate([np.eye(3), 2 * np.eye(3)]).astype(np.float32)
    with pytest.raises(InvalidValueError, match=r"only 3 different directions.*fewer clusters"):
        spherical_kmeans(features, 4)


def test_a_cluster_that_loses_its_rows_takes_the_farthest_one(monkeypatch):
    features, _ = blobs(num_rows=40, num_blobs=4, spread=0.3)
    start = np.stack([features[0], features[1], features[2], -features.sum(axis=0)])
    units = start / np.linalg.norm(start, axis=1, keepdims=True)
    monkeypatch.setattr(
        "fastprune.difficulty.clusters._plus_plus", lambda *_: units.astype(np.float32)
    )
    clusters = spherical_kmeans(features, 4)
    assert np.bincount(clusters.assignments, minlength=4).min() > 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_row_that_is_not_finite_is_named(value):
    features, _ = blobs()
    features[77, 3] = value
    with pytest.raises(InvalidValueError, match=r"row 77 .*position 3"):
        spherical_kmeans(features, 6)


def test_a_row_of_zeros_is_named():
    features, _ = blobs()
    features[5] = 0
    with pytest.raises(InvalidValueError, match=r"row 5 are all zero.*feature_layer"):
        spherical_kmeans(features, 6)


@pytest.mark.parametrize("num_clusters", [0, 601])
def test_more_clusters_than_rows_or_none_are_refused(num_clusters):
    features, _ = blobs()
    with pytest.raises(
        InvalidValueError, match=f"from 1 to the number of rows \\(600\\).*{num_clusters}"
    ):
        spherical_kmeans(features, num_clusters)


def test_features_of_wrong_shape_or_dtype_are_refused():
    with pytest.raises(InvalidValueError, match="int64 of shape \\(4, 4\\)"):
        spherical_kmeans(np.eye(4, dtype=np.int64), 2)
    with pytest.raises(InvalidValueError, match=r"of shape \(4,\)"):
        spherical_kmeans(np.ones(4), 2)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 60), st.integers(1, 8), st.integers(0, 2**40))
def test_any_rows_give_whole_clusters(num_rows, num_clusters, seed):
    features = np.random.default_rng(seed).standard_normal((num_rows, 5)).astype(np.float32)
    num_clusters = min(num_clusters, num_rows)
    clusters = spherical_kmeans(features, num_clusters, seed=seed)
    assert clusters.assignments.min() >= 0
    assert clusters.assignments.max() < num_clusters
    assert np.isfinite(clusters.centers).all()
    assert (clusters.distances >= 0).all()
    assert (clusters.distances <= 2.001).all()
