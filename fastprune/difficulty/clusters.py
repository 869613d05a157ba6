"""Spherical k-means of a teacher's features: clusters in the place of classes, without labels.

A row's difficulty is its cosine distance to the center of its own cluster (its prototype). The same
seed gives the same clusters to the bit on any number of threads: every product of matrices is made
by one thread on rows of its own, and every sum over rows runs in row order.
"""

import functools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numba import prange
from numpy.typing import ArrayLike, NDArray
from threadpoolctl import threadpool_limits

from fastprune.base.compiled import cached
from fastprune.base.cpus import cpus_per_rank
from fastprune.base.errors import InvalidValueError
from fastprune.base.random_streams import row_keys
from fastprune.difficulty import kernels
from fastprune.difficulty.kernels import (
    as_float64,
    refuse_first_bad_row,
    stored_rows,
)

# `as_float64` is compiled in, so its file is a source too.
_compiled = functools.partial(cached, Path(__file__), Path(kernels.__file__))

# Rows of one product: its (rows, K) float32 cosines stay in a core's cache, and the cost of packing
# the centers anew for each product is small beside the product.
_BLOCK_ROWS = 1024
# k-means++ looks at this many rows for each center: a draw reads the whole sample once.
_SAMPLED_ROWS_PER_CENTER = 4
# The first round of Lloyd's iterations runs on this many rows for each center, later ones on twice
# as many as the one before: far centers move most while rows are few and iterations are cheap.
_FIRST_ROWS_PER_CENTER = 16
_ITERATIONS_PER_GROWTH = 2


@dataclass(frozen=True, eq=False)
class Clusters:
    """Rows grouped around the directions of their features.

    Attributes:
        centers: (K, D) float32, of length 1.
        assignments: (N,) int64 in [0, K): the nearest center, the first of equally near ones.
        distances: (N,) float32 in [0, 2], 1 - cosine to that center; larger is harder.
        iterations: Lloyd's iterations over all rows.
        converged: whether the last of them gained less than the tolerance.
    """

    centers: NDArray[np.float32]
    assignments: NDArray[np.int64]
    distances: NDArray[np.float32]
    iterations: int
    converged: bool

    @property
    def inertia(self) -> float:
        """The sum of the distances, in float64."""
        return float(self.distances.sum(dtype=np.float64))


def spherical_kmeans(
    features: ArrayLike,
    num_clusters: int,
    *,
    seed: int = 0,
    max_iterations: int = 30,
    tolerance: float = 1e-4,
    num_threads: int | None = None,
) -> Clusters:
    """Group rows by the direction of their features.

    Centers start by k-means++ on a sample, move by Lloyd's iterations on a growing part of the rows
    in random order, and at last on all of them. A cluster that loses all its rows takes over the
    row that is farthest from its center; it stays empty only where no row is left at a distance.

    Args:
        features: (N, D) float16, float32 or float64, such as a memory map of the pass's features.
        num_clusters: K, in [1, N].
        seed: of the sample, the centers' draws and the growing part.
        max_iterations: Lloyd's iterations over all rows, at most.
        tolerance: stop when an iteration lowers the mean distance by a smaller share than this.
        num_threads: None for one per usable CPU; no influence on the result.

    Returns:
        Centers, and each row's cluster and distance.

    Raises:
        InvalidValueError: shapes or dtypes are wrong, K is outside [1, N], a row holds NaN,
            infinity or zeros alone (it is named), or the rows have fewer than K directions.

    Source: Sorscher et al. 2022, "Beyond neural scaling laws" (distance to the prototype);
    Arthur & Vassilvitskii 2007 (k-means++); Newling & Fleuret 2016, "Nested Mini-Batch K-Means".
    """
    array = np.asarray(features)
    _require_domain(array, num_clusters, max_iterations, tolerance)
    threads = cpus_per_rank() if num_threads is None else num_threads
    scales = _inverse_lengths(array)
    order = np.argsort(row_keys(seed, np.arange(len(array))), kind="stable")
    # BLAS shares out a product among its threads in ways that depend on their number.
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(threads) as pool:
        lloyd = _Lloyd(array, scales, map_blocks=pool.map)
        lloyd.centers = _plus_plus(array, scales, order, num_clusters, seed)
        part = _FIRST_ROWS_PER_CENTER * num_clusters
        while part < len(array):
            # In row order, so that the file is read forwards.
            rows = np.sort(order[:part])
            for _ in range(_ITERATIONS_PER_GROWTH):
                lloyd.move_centers(rows, *lloyd.assign(rows))
            part *= 2
        return _until_settled(lloyd, max_iterations, tolerance)


def _until_settled(lloyd: "_Lloyd", max_iterations: int, tolerance: float) -> Clusters:
    """Iterate over all rows."""
    rows = np.arange(len(lloyd.features))
    assignments, distances = lloyd.assign(rows)
    mean, iterations, converged = float(distances.mean(dtype=np.float64)), 0, False
    while iterations < max_iterations and not converged:
        lloyd.move_centers(rows, assignments, distances)
        assignments, distances = lloyd.assign(rows)
        before, mean = mean, float(distances.mean(dtype=np.float64))
        # Also where a refilled cluster has made things worse for once: what follows is small.
        converged = before - mean <= tolerance * before
        iterations += 1
    return Clusters(lloyd.centers, assignments, distances, iterations, converged)


class _Lloyd:
    """The two halves of Lloyd's iteration over some rows, and the centers between them."""

    centers: NDArray[np.float32]

    def __init__(
        self,
        features: NDArray[Any],
        scales: NDArray[np.float64],
        *,
        map_blocks: Callable[..., Iterable[None]],
    ) -> None:
        self.features = features
        self._scales = scales
        self._map_blocks = map_blocks

    def assign(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Find the nearest center of each row: (n,) clusters and (n,) float32 distances."""
        assignments = np.empty(len(rows), np.int64)
        distances = np.empty(len(rows), np.float32)
        transposed = self.centers.T
        is_whole = len(rows) == len(self.features)

        def assign_block(start: int) -> None:
            part = slice(start, start + _BLOCK_ROWS)
            block = self.features[part] if is_whole else self.features[rows[part]]
            # The length of a row does not change which center is nearest, so it is not divided
            # out of D numbers but of one.
            products = np.matmul(block.astype(np.float32, copy=False), transposed)
            _nearest(products, self._scales[rows[part]], assignments[part], distances[part])

        list(self._map_blocks(assign_block, range(0, len(rows), _BLOCK_ROWS)))
        return assignments, distances

    def move_centers(
        self,
        rows: NDArray[np.int64],
        assignments: NDArray[np.int64],
        distances: NDArray[np.float32],
    ) -> None:
        """Put each center into the mean direction of its rows; refill clusters without any."""
        num_clusters = len(self.centers)
        counts = np.bincount(assignments, minlength=num_clusters)
        empty = np.flatnonzero(counts == 0)
        if len(empty):
            assignments = assignments.copy()
            farthest = np.argsort(-distances, kind="stable")
            # Never the last row of a cluster, which would only move the hole.
            free = iter(farthest[distances[farthest] > 0].tolist())
            for cluster in empty:
                for at in free:
                    if counts[assignments[at]] > 1:
                        counts[assignments[at]] -= 1
                        counts[cluster], assignments[at] = 1, cluster
                        break
        # A stable sort keeps rows in row order within a cluster, and with it every sum's order.
        grouped = rows[np.argsort(assignments, kind="stable")]
        offsets = np.concatenate([[0], np.cumsum(counts)])
        _mean_directions(stored_rows(self.features), self._scales, grouped, offsets, self.centers)


def _plus_plus(
    features: NDArray[Any],
    scales: NDArray[np.float64],
    order: NDArray[np.int64],
    num_clusters: int,
    seed: int,
) -> NDArray[np.float32]:
    """Draw K rows of a sample as centers, far ones more likely (k-means++)."""
    sampled = np.sort(order[: _SAMPLED_ROWS_PER_CENTER * num_clusters])
    units = (features[sampled] * scales[sampled, None]).astype(np.float32)
    # |x - c|^2 = 2 (1 - cosine) of unit rows, so their distance is the weight of the draw.
    nearest = np.full(len(units), np.inf)
    # 53 random bits each, as in [0, 1).
    draws = (row_keys(~seed, np.arange(num_clusters)) >> np.uint64(11)) * 2.0**-53
    chosen = [int(draws[0] * len(units))]
    while len(chosen) < num_clusters:
        _lower_distances(units, units[chosen[-1]], nearest)
        cumulated = np.cumsum(nearest)
        if cumulated[-1] <= 0:
            raise InvalidValueError(
                f"{len(units):,} sampled rows have only {len(chosen):,} different directions, "
                f"fewer than the {num_clusters:,} clusters asked for. Ask for fewer clusters."
            )
        # side="right": a row at distance 0, such as a chosen one, is never drawn.
        at = int(np.searchsorted(cumulated, draws[len(chosen)] * cumulated[-1], side="right"))
        chosen.append(min(at, int(np.flatnonzero(nearest)[-1])))
    return units[chosen]


def _require_domain(
    features: NDArray[Any], num_clusters: int, max_iterations: int, tolerance: float
) -> None:
    if features.ndim != 2 or features.dtype not in (np.float16, np.float32, np.float64):
        raise InvalidValueError(
            "features must be an (N, D) array of float16, float32 or float64, but they are "
            f"{features.dtype} of shape {features.shape}."
        )
    if not 1 <= num_clusters <= len(features):
        raise InvalidValueError(
            f"num_clusters must be from 1 to the number of rows ({len(features):,}), not "
            f"{num_clusters:,}."
        )
    if max_iterations < 0 or not 0 <= tolerance < 1:
        raise InvalidValueError(
            f"max_iterations must be >= 0 and tolerance in [0, 1), not {max_iterations} and "
            f"{tolerance}."
        )


def _inverse_lengths(features: NDArray[Any]) -> NDArray[np.float64]:
    """1 / |row|, (N,) float64; rows without a direction are refused."""
    scales = np.empty(len(features), np.float64)
    _measure_lengths(stored_rows(features), scales)
    if not np.isfinite(scales).all():
        refuse_first_bad_row(features, scales)
    if not scales.all():
        row = int(np.argmin(scales))
        raise InvalidValueError(
            f"the features of row {row:,} are all zero, so they have no direction. Leave that row "
            "out, or take the features of another layer (feature_layer)."
        )
    return 1 / scales


@_compiled(parallel=True, fastmath={"reassoc", "contract"})
def _measure_lengths(rows: Any, lengths: Any) -> None:
    """Set the Euclidean lengths of all rows."""
    for row in prange(len(rows)):
        squares = 0.0
        for i in range(rows.shape[1]):
            squares += as_float64(rows[row, i]) ** 2
        lengths[row] = np.sqrt(squares)


@_compiled(nogil=True)
def _nearest(products: Any, scales: Any, assignments: Any, distances: Any) -> None:
    """Reduce (n, K) products of rows and centers to the nearest center and its distance."""
    for i in range(len(products)):
        best, most = 0, products[i, 0]
        for k in range(1, products.shape[1]):
            if products[i, k] > most:
                best, most = k, products[i, k]
        assignments[i] = best
        # Rounding may carry a cosine a little beyond 1.
        distances[i] = max(0.0, 1.0 - most * scales[i])


@_compiled(fastmath={"reassoc", "contract"})
def _add_units(rows: Any, scales: Any, chosen: Any, total: Any) -> None:
    """Add the chosen rows, at length 1, to total; four at once hide each other's latency."""
    whole = len(chosen) - len(chosen) % 4
    for p in range(0, whole, 4):
        a, b, c, d = chosen[p], chosen[p + 1], chosen[p + 2], chosen[p + 3]
        for i in range(len(total)):
            total[i] += (
                as_float64(rows[a, i]) * scales[a] + as_float64(rows[b, i]) * scales[b]
            ) + (as_float64(rows[c, i]) * scales[c] + as_float64(rows[d, i]) * scales[d])
    for p in range(whole, len(chosen)):
        a = chosen[p]
        for i in range(len(total)):
            total[i] += as_float64(rows[a, i]) * scales[a]


@_compiled(parallel=True)
def _mean_directions(rows: Any, scales: Any, grouped: Any, offsets: Any, centers: Any) -> None:
    """Set each center to the mean direction of its rows; keep it where there is none.

    A cluster is worked on by one thread and its rows are added in row order, in float64.
    """
    for cluster in prange(len(centers)):
        chosen = grouped[offsets[cluster] : offsets[cluster + 1]]
        total = np.zeros(rows.shape[1], np.float64)
        _add_units(rows, scales, chosen, total)
        length = np.sqrt((total**2).sum())
        if length > 0:
            for i in range(len(total)):
                centers[cluster, i] = total[i] / length


@_compiled(parallel=True, fastmath={"reassoc", "contract"})
def _lower_distances(units: Any, center: Any, nearest: Any) -> None:
    """Lower each row's distance to its nearest center by one more center."""
    for row in prange(len(units)):
        cosine = np.float32(0)
        for i in range(len(center)):
            cosine += units[row, i] * center[i]
        distance = max(0.0, 1.0 - np.float64(cosine))
        # Below float32's rounding a row is the center itself, or as good as.
        nearest[row] = min(nearest[row], distance if distance > 1e-6 else 0.0)
