"""Distances of feature rows to their class centers, compiled for all cores.

Rows are visited class by class, so that the second visit of a row, for its distance, finds it in
the cache where the first, for the mean, has left it: main memory is read once, in any label order.
A class is worked on by one thread and its rows are added in row order, so the result does not
depend on the number of threads.
"""

import functools
import math
from pathlib import Path
from typing import Any, NoReturn

import numba
import numpy as np
from llvmlite import ir
from numba import prange
from numba.extending import intrinsic
from numpy.typing import ArrayLike, NDArray

from fastprune.base.compiled import cached
from fastprune.base.errors import InvalidValueError

_FLOAT_TYPES = (np.float16, np.float32, np.float64)
_LARGEST = float(np.finfo(np.float32).max)
# Bad rows are searched for in slices, for the features may not fit in memory.
_SCAN_BYTES = 64 * 2**20
# Columns of a class are transposed so many at a time: 64 of them fill the cache lines that are
# read anyway, and a large class takes fewer, so that a thread's copy stays bounded.
_MEDIAN_COLUMNS = 64
_MEDIAN_VALUES = 2**22  # 32 MiB per thread


def centroid_distances(
    features: ArrayLike, labels: ArrayLike, *, num_classes: int | None = None
) -> NDArray[np.float32]:
    """Compute the distance of every row to the mean of its class: the difficulty `centroid`.

    Sums, means and distances are made in float64, whatever the features are stored as.

    Args:
        features: (N, D) float16, float32 or float64, such as a memory map of the pass's features.
        labels: (N,) integers in [0, C), in any order.
        num_classes: C; by default the largest label plus one. Classes without rows are fine.

    Returns:
        (N,) float32, >= 0; larger is harder.

    Raises:
        InvalidValueError: shapes or dtypes are wrong, a label is outside [0, C), or a row holds a
            value or lies at a distance that is NaN, infinite or beyond float32's range; the first
            such row is named.

    Source: nearest-centroid distance, ||h - mean_y||_2.
    """
    return _distances(features, labels, num_classes, use_median=False)


def centroid_median_distances(
    features: ArrayLike, labels: ArrayLike, *, num_classes: int | None = None
) -> NDArray[np.float32]:
    """Compute the distance of every row to the coordinate-wise median of its class.

    The difficulty `centroid_median`. Arguments, result and errors as in `centroid_distances`.

    Source: Xia et al. 2023, "Moderate Coreset", ICLR.
    """
    return _distances(features, labels, num_classes, use_median=True)


def _distances(
    features: ArrayLike, labels: ArrayLike, num_classes: int | None, *, use_median: bool
) -> NDArray[np.float32]:
    """Check, group the rows by class, run the kernel, and look for bad rows if it met any."""
    # A plain array view: numba compiles for np.memmap and np.ndarray alike, once.
    array = np.asarray(features)
    classes = _checked_labels(array, labels, num_classes)
    counts = np.bincount(classes)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    # numpy sorts 16-bit integers by radix, twenty times as fast.
    narrow = classes.astype(np.min_scalar_type(max(0, len(counts) - 1)))
    order = np.argsort(narrow, kind="stable")
    distances = np.empty(len(array), np.float32)
    # Row-major is what the kernels are compiled for; a map of the pass is, and is not copied.
    rows = stored_rows(array)
    kernel = _median_kernel if use_median else _mean_kernel
    # The kernels only notice that a value is bad; the name of the row is found afterwards.
    if not kernel(rows, order, offsets, distances) or not np.isfinite(distances).all():
        refuse_first_bad_row(array, distances)
    return distances


def _checked_labels(
    features: NDArray[Any], labels: ArrayLike, num_classes: int | None
) -> NDArray[np.int64]:
    """Return the labels as int64, once they and the features are checked."""
    if features.ndim != 2 or features.dtype not in _FLOAT_TYPES:
        raise InvalidValueError(
            "features must be an (N, D) array of float16, float32 or float64, but they are "
            f"{features.dtype} of shape {features.shape}."
        )
    array = np.asarray(labels)
    if array.shape != (len(features),) or array.dtype.kind not in "iu":
        raise InvalidValueError(
            f"labels must be {len(features):,} integers, one per row of the features, but they are "
            f"{array.dtype} of shape {array.shape}."
        )
    limit = np.iinfo(np.int64).max if num_classes is None else num_classes
    outside = (array < 0) | (array >= limit)
    if outside.any():
        row = int(np.argmax(outside))
        top = "" if num_classes is None else f" and below {num_classes:,}"
        raise InvalidValueError(f"the label of row {row:,} is {array[row]}; it must be >= 0{top}.")
    return array.astype(np.int64)


def refuse_first_bad_row(features: NDArray[Any], distances: NDArray[np.floating[Any]]) -> NoReturn:
    """Name the first row with a value that cannot be averaged, or that lies too far away."""
    step = max(1, _SCAN_BYTES // max(1, features[:1].nbytes))
    for start in range(0, len(features), step):
        bad = ~(np.abs(features[start : start + step].astype(np.float64)) <= _LARGEST)
        if bad.any():
            row, column = np.argwhere(bad)[0]
            raise InvalidValueError(
                f"the features of row {start + row:,} hold {features[start + row, column]} at "
                f"position {column}; they must be finite and within float32's range. Score again "
                "in float32, or leave that row out."
            )
    row = int(np.argmin(np.isfinite(distances)))
    raise InvalidValueError(
        f"row {row:,} lies farther from the center of its class than float32 can hold. Scale the "
        "features down, or leave that row out."
    )


def stored_rows(features: NDArray[Any]) -> NDArray[Any]:
    """Prepare features for a kernel, which reads float16 as uint16 through `as_float64`."""
    rows = np.ascontiguousarray(features)
    return rows.view(np.uint16) if rows.dtype == np.float16 else rows


def _as_float64(typing_context: Any, stored: Any) -> Any:
    """The value of a stored feature; uint16 is a float16, which numba has not on the CPU."""
    del typing_context

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del context, signature
        value = arguments[0]
        if stored == numba.uint16:
            value = builder.bitcast(value, ir.HalfType())
        return value if stored == numba.float64 else builder.fpext(value, ir.DoubleType())

    return numba.float64(stored), generate


as_float64: Any = intrinsic(_as_float64)

# Reassociation lets LLVM keep several partial sums in vector registers; the flags that would let it
# assume finite values stay off, because NaN and infinity must be noticed.
_SUM_FLAGS = {"reassoc", "contract"}

_compiled = functools.partial(cached, Path(__file__))


@_compiled(fastmath=_SUM_FLAGS)
def _add_rows(rows: Any, chosen: Any, total: Any) -> None:
    """Add the chosen rows to total, eight at once: rows far apart hide each other's latency."""
    whole = len(chosen) - len(chosen) % 8
    for p in range(0, whole, 8):
        a, b, c, d = chosen[p], chosen[p + 1], chosen[p + 2], chosen[p + 3]
        e, f, g, h = chosen[p + 4], chosen[p + 5], chosen[p + 6], chosen[p + 7]
        for i in range(len(total)):
            first = (as_float64(rows[a, i]) + as_float64(rows[b, i])) + (
                as_float64(rows[c, i]) + as_float64(rows[d, i])
            )
            second = (as_float64(rows[e, i]) + as_float64(rows[f, i])) + (
                as_float64(rows[g, i]) + as_float64(rows[h, i])
            )
            total[i] += first + second
    for p in range(whole, len(chosen)):
        a = chosen[p]
        for i in range(len(total)):
            total[i] += as_float64(rows[a, i])


@_compiled(fastmath=_SUM_FLAGS)
def _measure_rows(rows: Any, chosen: Any, center: Any, distances: Any) -> None:
    """Set the Euclidean distances between the chosen rows and a center, four at once."""
    whole = len(chosen) - len(chosen) % 4
    for p in range(0, whole, 4):
        a, b, c, d = chosen[p], chosen[p + 1], chosen[p + 2], chosen[p + 3]
        sum_a = sum_b = sum_c = sum_d = 0.0
        for i in range(len(center)):
            mean = center[i]
            sum_a += (as_float64(rows[a, i]) - mean) ** 2
            sum_b += (as_float64(rows[b, i]) - mean) ** 2
            sum_c += (as_float64(rows[c, i]) - mean) ** 2
            sum_d += (as_float64(rows[d, i]) - mean) ** 2
        distances[a] = math.sqrt(sum_a)
        distances[b] = math.sqrt(sum_b)
        distances[c] = math.sqrt(sum_c)
        distances[d] = math.sqrt(sum_d)
    for p in range(whole, len(chosen)):
        a = chosen[p]
        squares = 0.0
        for i in range(len(center)):
            squares += (as_float64(rows[a, i]) - center[i]) ** 2
        distances[a] = math.sqrt(squares)


@_compiled(parallel=True)
def _mean_kernel(rows: Any, order: Any, offsets: Any, distances: Any) -> bool:
    """Fill distances to the class means; False where a value was not finite."""
    num_classes = len(offsets) - 1
    is_finite = np.ones(num_classes, np.bool_)
    for label in prange(num_classes):  # one thread a class: sums do not depend on the threads
        start, stop = offsets[label], offsets[label + 1]
        if start == stop:
            continue
        center = np.zeros(rows.shape[1], np.float64)
        chosen = order[start:stop]
        _add_rows(rows, chosen, center)
        center /= stop - start
        is_finite[label] = np.isfinite(center).all()
        _measure_rows(rows, chosen, center, distances)
    return bool(is_finite.all())


@_compiled(parallel=True)
def _median_kernel(rows: Any, order: Any, offsets: Any, distances: Any) -> bool:
    """Fill distances to the class medians; False where a value was not finite."""
    num_classes, width = len(offsets) - 1, rows.shape[1]
    is_finite = np.ones(num_classes, np.bool_)
    for label in prange(num_classes):
        start, stop = offsets[label], offsets[label + 1]
        if start == stop:
            continue
        center = np.empty(width, np.float64)
        chosen = order[start:stop]
        most = max(1, min(_MEDIAN_COLUMNS, _MEDIAN_VALUES // len(chosen)))
        columns = np.empty((most, len(chosen)), np.float64)
        for first in range(0, width, most):
            count = min(most, width - first)
            for p in range(len(chosen)):
                for i in range(count):
                    columns[i, p] = as_float64(rows[chosen[p], first + i])
            for i in range(count):
                is_finite[label] &= np.isfinite(columns[i]).all()
                center[first + i] = np.median(columns[i])
        _measure_rows(rows, chosen, center, distances)
    return bool(is_finite.all())
