"""Choose the rows to keep by their scores: the strategies."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastprune.base.errors import InvalidValueError
from fastprune.base.random_streams import row_keys
from fastprune.selection.quotas import class_quotas, kept_total
from fastprune.settings import StrategySettings, takes_settings

Rows = NDArray[np.int64]
Scores = NDArray[np.float32] | NDArray[np.float64]

CCS_STRATA = 50  # the paper's


@dataclass(frozen=True)
class _Groups:
    """Rows grouped by class, ascending by (score, row) within each.

    Attributes:
        rows: (N,) the grouped rows.
        counts: (C,) rows per class, n_c.
    """

    rows: Rows
    counts: Rows

    def windows(self, starts: Rows, quotas: Rows) -> Rows:
        """Take each class's quota of rows from its start on; return them sorted."""
        first = np.cumsum(self.counts) - self.counts + starts
        pieces = [self.rows[f : f + k] for f, k in zip(first, quotas, strict=True)]
        return np.sort(np.concatenate([np.zeros(0, np.int64), *pieces]))


@takes_settings(StrategySettings)
def select_rows(
    scores: ArrayLike,
    labels: ArrayLike,
    *,
    rows: NDArray[np.int64] | None = None,
    settings: StrategySettings,
) -> NDArray[np.int64]:
    """Choose the rows to keep.

    Equal scores are ordered by row. The same arguments give the same rows on every machine.

    Args:
        scores: (N,) difficulty of every row; larger is harder.
        labels: (N,) integers >= 0, class of every row.
        rows: (N,) int64, the row in the beton that each score belongs to, if some were left out:
            random draws depend on it. None if score i belongs to row i.
        settings: the fields of `StrategySettings`, as keywords.

    Returns:
        (K,) int64, sorted and unique, positions in `scores`. K is round(r * N), except for
        `moderate` and for `compat`, which round as their sources do.

    Raises:
        InvalidValueError: an argument is outside its domain, a name is not known, or a score is
            NaN or infinite (the first such row is named).

    Source: Chen et al. 2025 (MDSLR, medium); Xia et al. 2023 (Moderate Coreset, moderate); Zheng
    et al. 2023, "Coverage-centric Coreset Selection" (ccs).
    """
    values, classes = _checked(scores, labels)
    rows = np.arange(len(values)) if rows is None else rows
    keep_ratio, strategy, seed = settings.keep_ratio, settings.strategy, settings.seed
    if strategy == "moderate":
        return _moderate(_ascending(values), keep_ratio)
    if strategy == "ccs":
        return _ccs(values, keep_ratio, settings.drop_hardest, row_keys(seed, rows))
    if not settings.per_class:
        classes = np.zeros_like(classes)
    groups = _grouped(row_keys(seed, rows) if strategy == "random" else values, classes)
    if settings.compat == "mdslr":
        return _mdslr(groups, keep_ratio)
    quotas = class_quotas(groups.counts, keep_ratio=keep_ratio, quota=settings.quota)
    if strategy == "hard":
        starts = groups.counts - quotas
    elif strategy in ("easy", "random"):  # random: the rows of the lowest keys
        starts = np.zeros_like(groups.counts)
    else:
        center = settings.quantile if strategy == "window" else 0.5
        middles = (center * groups.counts).astype(np.int64)
        # A window that would leave its class is moved inside, so that the quota is always met.
        starts = np.clip(middles - (quotas + 1) // 2, 0, groups.counts - quotas)
    return groups.windows(starts, quotas)


def _mdslr(groups: _Groups, keep_ratio: float) -> Rows:
    """Apply the reference's rule: one count for all classes, small classes whole."""
    num_rows, num_classes = len(groups.rows), len(groups.counts)
    quota = int(num_rows / num_classes * keep_ratio) if num_classes else 0
    # The reference takes a small class whole and does not hand its shortfall to the others.
    is_whole = groups.counts <= quota
    quotas = np.where(is_whole, groups.counts, quota)
    starts = np.where(is_whole, 0, groups.counts // 2 - (quota - quota // 2))
    return groups.windows(starts, quotas)


def _moderate(ascending: Rows, keep_ratio: float) -> Rows:
    """Keep rows around the median of all, rounded as the paper's code rounds."""
    low = round(len(ascending) * (0.5 - keep_ratio / 2))
    high = round(len(ascending) * (0.5 + keep_ratio / 2))
    return np.sort(ascending[low:high])


def _ccs(scores: Scores, keep_ratio: float, drop_hardest: float, keys: NDArray[np.uint64]) -> Rows:
    """Leave the hardest out, then draw evenly from strata of equal width."""
    num_rows = len(scores)
    total = kept_total(num_rows, keep_ratio)
    # The keep ratio comes first: fewer are dropped if it needs them.
    dropped = min(round(drop_hardest * num_rows), num_rows - total)
    rows = _ascending(scores)[: num_rows - dropped]
    if len(rows) == 0:
        return rows
    # float32 differences of nearby scores would put rows into neighboring strata.
    values = scores[rows].astype(np.float64)
    # Equal widths, not equal counts: that is what covers the range. Equal scores are one stratum.
    span = values[-1] - values[0]
    places = (values - values[0]) / span if span > 0 else np.zeros(len(values))
    strata = np.minimum((places * CCS_STRATA).astype(np.int64), CCS_STRATA - 1)
    counts = np.bincount(strata, minlength=CCS_STRATA)
    # Water-filling from the smallest stratum: each gives an even share of what is still missing.
    budgets = np.zeros_like(counts)
    for position, stratum in enumerate(np.argsort(counts, kind="stable")):
        budgets[stratum] = min(counts[stratum], total // (len(counts) - position))
        total -= int(budgets[stratum])
    drawn = rows[np.lexsort((keys[rows], strata))]
    return _Groups(drawn, counts).windows(np.zeros_like(counts), budgets)


def _ascending(values: NDArray[Any]) -> Rows:
    """Sort rows by (value, row)."""
    # Stable, so that equal scores are in the order of their rows on every machine.
    rows: Rows = np.argsort(values, kind="stable")
    return rows


def _grouped(values: NDArray[Any], classes: Rows) -> _Groups:
    """Sort rows by (class, value, row)."""
    counts = np.bincount(classes)
    ascending = _ascending(values)
    # numpy uses radix sort for 16-bit integers, which is many times as fast.
    narrow = classes.astype(np.min_scalar_type(max(0, len(counts) - 1)))
    return _Groups(ascending[np.argsort(narrow[ascending], kind="stable")], counts)


def _checked(scores: ArrayLike, labels: ArrayLike) -> tuple[Scores, Rows]:
    """Return scores and labels as arrays, or refuse them."""
    values, classes = np.asarray(scores), np.asarray(labels)
    if values.ndim != 1 or values.shape != classes.shape:
        raise InvalidValueError(
            "scores and labels must be one-dimensional and of the same length, but they have the "
            f"shapes {values.shape} and {classes.shape}."
        )
    if values.dtype.kind not in "fiu" or (classes.dtype.kind not in "iu" and len(classes)):
        raise InvalidValueError(
            f"scores must be numbers and labels integers, but they are {values.dtype} and "
            f"{classes.dtype}."
        )
    if values.dtype != np.float32:
        values = values.astype(np.float64)
    require_finite(values, np.arange(len(values)))
    if (classes < 0).any():
        row = int(np.argmax(classes < 0))
        raise InvalidValueError(f"the label of row {row:,} is {classes[row]}; it must be >= 0.")
    return values, classes.astype(np.int64)


def require_finite(scores: Scores, rows: Rows) -> None:
    """Refuse scores that are NaN or infinite.

    Args:
        scores: (K,) scores.
        rows: (K,) the row of each, to name the first that is refused.

    Raises:
        InvalidValueError: a score is not finite.
    """
    is_bad = ~np.isfinite(scores)
    if is_bad.any():
        first = int(np.argmax(is_bad))
        raise InvalidValueError(
            f"the score of row {rows[first]:,} is {scores[first]}; scores must be finite. Score "
            "again, or leave such rows out (--exclude)."
        )
