"""Quotas: how many rows each class keeps."""

from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from fastprune.base.checks import did_you_mean
from fastprune.base.errors import InvalidValueError

QUOTAS = ("proportional", "equal")


def class_quotas(
    counts: NDArray[np.int64], *, keep_ratio: float, quota: str = "proportional"
) -> NDArray[np.int64]:
    """Distribute round(keep_ratio * N) rows among the classes.

    Args:
        counts: (C,) rows per class, n_c; N is their sum.
        keep_ratio: r, in (0, 1].
        quota: `proportional` gives each class the largest-remainder rounding of r * n_c, equal
            remainders going to the lower class; `equal` gives every class the same number, or all
            it has if that is less, and the remainder to the lowest classes.

    Returns:
        (C,) int64 rows to keep, k_c <= n_c; their sum is round(keep_ratio * N) exactly.

    Raises:
        InvalidValueError: the ratio is outside (0, 1], or the quota is not known.
    """
    total = kept_total(int(counts.sum()), keep_ratio)
    if quota == "proportional":
        return _proportional(counts, keep_ratio, total)
    if quota == "equal":
        return _equal(counts, total)
    raise InvalidValueError(f"quota {quota!r} is not known.{did_you_mean(quota, QUOTAS)}")


def kept_total(num_rows: int, keep_ratio: float) -> int:
    """Return round(keep_ratio * num_rows), by Python's round (half to even).

    Raises:
        InvalidValueError: the ratio is outside (0, 1].
    """
    if not 0 < keep_ratio <= 1:
        raise InvalidValueError(
            f"keep_ratio ({keep_ratio}) must be in (0, 1]; 0.5 keeps half of the rows."
        )
    return round(keep_ratio * num_rows)


def _proportional(counts: NDArray[np.int64], keep_ratio: float, total: int) -> NDArray[np.int64]:
    """Round r * n_c by largest remainders."""
    # The ratio is taken as the decimal it was written as, so that 0.3 * 1 and 0.3 * 11 leave equal
    # remainders, which binary fractions do not.
    ratio = Fraction(repr(float(keep_ratio)))
    shares = [divmod(int(count) * ratio.numerator, ratio.denominator) for count in counts]
    quotas = np.array([whole for whole, _ in shares], np.int64)
    by_remainder = sorted(range(len(shares)), key=lambda label: (-shares[label][1], label))
    quotas[by_remainder[: total - int(quotas.sum())]] += 1
    return quotas


def _equal(counts: NDArray[np.int64], total: int) -> NDArray[np.int64]:
    """Give the same number to all that have it, by raising one level until the total is used up."""
    low, high = 0, int(counts.max(initial=0))
    while low < high:  # the highest level that the total can fill
        middle = (low + high + 1) // 2
        if np.minimum(counts, middle).sum() <= total:
            low = middle
        else:
            high = middle - 1
    # Less than one row per class is left over; it goes to the lowest classes that have more.
    quotas = np.minimum(counts, low)
    quotas[np.flatnonzero(counts > low)[: total - int(quotas.sum())]] += 1
    return quotas
