"""How fast are distances to class means, against other libraries and what memory can deliver?

    python benchmarks/kernel.py [--rows 200000 --width 2048 --classes 1000]

All candidates take turns in one run. GB/s count the features twice, once for the means and once for
the distances, as if they were read in two passes; the ceiling reads them once.
"""

import argparse
import importlib.util

import numba
import numpy as np
import torch
from _harness import ratios, spread, take_turns, write_result
from numba import njit, prange

from fastprune.difficulty.kernels import centroid_distances, centroid_median_distances

CHUNK = 8192


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", help="not used; every benchmark takes it")
    arguments = parser.parse_args()

    generator = np.random.default_rng(0)
    single = generator.standard_normal((arguments.rows, arguments.width), dtype=np.float32)
    half = single.astype(np.float16)
    labels = generator.integers(0, arguments.classes, arguments.rows)
    by_class = np.sort(labels)

    fast = {
        "ceiling": lambda: stream(single),
        "fastprune float32": lambda: centroid_distances(single, labels),
        "fastprune float32, sorted labels": lambda: centroid_distances(single, by_class),
        "ceiling float16": lambda: stream(half.view(np.float32)),
        "fastprune float16": lambda: centroid_distances(half, labels),
    }
    slow = {
        "numpy": lambda: with_numpy(single, labels, arguments.classes),
        "torch": lambda: with_torch(single, labels, arguments.classes),
        "fastprune float16, median": lambda: centroid_median_distances(half, labels),
    }
    if importlib.util.find_spec("sklearn"):
        slow["scikit-learn"] = lambda: with_sklearn(single, labels)
    check(single, half, labels, arguments.classes)
    seconds = take_turns(fast, rounds=arguments.rounds, warmup_rounds=2)
    seconds |= take_turns({"fastprune": fast["fastprune float32"], **slow}, rounds=3)
    write(arguments, seconds, single.nbytes)


@njit(parallel=True, fastmath=True)
def stream(array):
    """Read every value once, each thread one stretch: what memory can deliver."""
    num_rows, threads = len(array), numba.get_num_threads()
    sums = np.zeros((threads, 16))
    for thread in prange(threads):
        total = 0.0
        for row in range(num_rows * thread // threads, num_rows * (thread + 1) // threads):
            row_sum = np.float32(0)
            for column in range(array.shape[1]):
                row_sum += array[row, column]
            total += row_sum
        sums[thread, 0] = total
    return sums.sum()


def with_numpy(features, labels, num_classes):
    """The obvious way: add.at, then norms, in chunks that fit the memory."""
    sums = np.zeros((num_classes, features.shape[1]))
    np.add.at(sums, labels, features)
    means = (sums / np.maximum(np.bincount(labels, minlength=num_classes), 1)[:, None]).astype(
        np.float32
    )
    return norms(features, labels, means)


def with_torch(features, labels, num_classes):
    """index_add_ and norm, float32."""
    rows, classes = torch.from_numpy(features), torch.from_numpy(labels)
    sums = torch.zeros(num_classes, features.shape[1]).index_add_(0, classes, rows)
    means = sums / torch.bincount(classes, minlength=num_classes).clamp(min=1)[:, None]
    return torch.cat(
        [
            torch.linalg.vector_norm(r - means[c], dim=1)
            for r, c in zip(rows.split(CHUNK), classes.split(CHUNK), strict=True)
        ]
    )


def with_sklearn(features, labels):
    """NearestCentroid makes the means; the distances to the row's own class are norms."""
    from sklearn.neighbors import NearestCentroid

    means = NearestCentroid().fit(features, labels).centroids_.astype(np.float32)
    return norms(features, labels, means)


def norms(features, labels, means):
    """Distances to the means, in chunks."""
    starts = range(0, len(features), CHUNK)
    return np.concatenate(
        [
            np.linalg.norm(features[s : s + CHUNK] - means[labels[s : s + CHUNK]], axis=1)
            for s in starts
        ]
    )


def check(single, half, labels, num_classes):
    """All candidates compute the same thing; compiles ours on the way."""
    few = slice(0, 20_000)
    expected = with_numpy(single[few], labels[few], num_classes)
    for found in (
        centroid_distances(single[few], labels[few]),
        with_torch(single[few], labels[few], num_classes).numpy(),
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4)
    np.testing.assert_allclose(centroid_distances(half[few], labels[few]), expected, rtol=1e-2)
    centroid_median_distances(half[few], labels[few])


def write(arguments, seconds, single_bytes):
    """The JSON, and a line per candidate."""
    gigabytes = {
        name: single_bytes
        / 1e9
        * (0.5 if "float16" in name else 1)
        * (1 if "ceiling" in name else 2)
        for name in seconds
    }
    result = {
        "rows": arguments.rows,
        "width": arguments.width,
        "classes": arguments.classes,
        "threads": numba.get_num_threads(),
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "gigabytes_per_second": {
            name: spread([gigabytes[name] / value for value in values])
            for name, values in seconds.items()
        },
        "share_of_ceiling_per_pass": {
            name: ratios([2 * c for c in seconds[ceiling]], seconds[name])
            for name, ceiling in (
                ("fastprune float32", "ceiling"),
                ("fastprune float32, sorted labels", "ceiling"),
                ("fastprune float16", "ceiling float16"),
            )
        },
        "times_faster_than": {
            name: ratios(seconds[name], seconds["fastprune"])
            for name in ("numpy", "torch", "scikit-learn")
            if name in seconds
        },
    }
    for name, measured in result["gigabytes_per_second"].items():
        print(f"{name:34} {measured['median']:8.2f} GB/s")
    for name, measured in result["share_of_ceiling_per_pass"].items():
        print(f"{name:34} {measured['median']:8.2f} of the ceiling per pass")
    print("->", write_result("kernel", result))


if __name__ == "__main__":
    main()
