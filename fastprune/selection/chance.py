"""Chance without state: a number for every row that depends on the seed and the row alone."""

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


def row_keys(seed: int, rows: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Draw one uniform 64-bit number per row.

    Sorting rows by their keys shuffles them, the same way on every machine and in every version;
    a row's key does not depend on which other rows there are.

    Args:
        seed: any integer; taken modulo 2**64.
        rows: (N,) int64, rows of the beton.

    Returns:
        (N,) uint64.

    Source: Steele et al. 2014, "Fast Splittable Pseudorandom Number Generators" (SplitMix64).
    """
    seed_key = _mix(np.array([seed % 2**64], np.uint64) + _GOLDEN)
    return _mix(seed_key + (rows.astype(np.uint64) + np.uint64(1)) * _GOLDEN)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser; arrays wrap around without a warning."""
    x = (x ^ (x >> np.uint64(30))) * _FIRST
    x = (x ^ (x >> np.uint64(27))) * _SECOND
    return x ^ (x >> np.uint64(31))
