"""Choose the rows to keep by their scores: the strategies."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastprune.base.checks import did_you_mean
from fastprune.base.errors import InvalidValueError
from fastprune.base.random_streams import row_keys
from fastprune.selection.quotas import class_quotas, kept_total

Rows = NDArray[np.int64]
Scores = NDArray[np.float32] | NDArray[np.float64]

STRATEGIES = ("medium", "window", "easy", "hard", "random", "moderate", "ccs")
GLOBAL_STRATEGIES = ("moderate", "ccs")
COMPATIBLE_WITH = ("mdslr",)
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


def select_rows(
    scores: ArrayLike,
    labels: ArrayLike,
    *,
    keep_ratio: float,
    strategy: str = "medium",
    quota: str = "proportional",
    per_class: bool = True,
    quantile: float = 0.5,
    drop_hardest: float = 0.1,
    seed: int = 0,
    compat: str | None = None,
    rows: NDArray[np.int64] | None = None,
) -> NDArray[np.int64]:
    """Choose the rows to keep.

    Equal scores are ordered by row. The same arguments give the same rows on every machine.

    Args:
        scores: (N,) difficulty of every row; larger is harder.
        labels: (N,) integers >= 0, class of every row.
        keep_ratio: r, the share to keep, in (0, 1].
        strategy: `medium` keeps the rows around the median of each class, `window` those around
            another quantile, `easy` and `hard` the lowest and highest scores, `random` draws;
            `moderate` keeps the rows around the median of all rows, `ccs` leaves the hardest out
            and covers the rest of the range evenly: these two know no classes.
        quota: rows per class, `proportional` or `equal`; see `class_quotas`.
        per_class: False to take all rows as one class.
        quantile: for `window`, where its centre is, in [0, 1]; the window stays in the class.
        drop_hardest: for `ccs`, the share of the hardest rows that are left out, in [0, 1); fewer
            where the keep ratio needs them.
        seed: for `random` and `ccs`.
        compat: `mdslr` for the selection of the MDSLR reference code, row for row, with `medium`.
        rows: (N,) int64, the row in the beton that each score is of, where some were left out;
            what is drawn goes by it. None where score i is of row i.

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
    _check_settings(strategy, quota, per_class, quantile, drop_hardest, compat)
    if strategy == "moderate":
        return _moderate(_ascending(values), keep_ratio)
    if strategy == "ccs":
        return _ccs(values, keep_ratio, drop_hardest, row_keys(seed, rows))
    if not per_class:
        classes = np.zeros_like(classes)
    groups = _grouped(row_keys(seed, rows) if strategy == "random" else values, classes)
    if compat == "mdslr":
        return _mdslr(groups, keep_ratio)
    quotas = class_quotas(groups.counts, keep_ratio=keep_ratio, quota=quota)
    if strategy == "hard":
        starts = groups.counts - quotas
    elif strategy in ("easy", "random"):  # random: the rows of the lowest keys
        starts = np.zeros_like(groups.counts)
    else:
        center = quantile if strategy == "window" else 0.5
        middles = (center * groups.counts).astype(np.int64)
        # A window that would leave its class is moved inside, so that the quota is always met.
        starts = np.clip(middles - (quotas + 1) // 2, 0, groups.counts - quotas)
    return groups.windows(starts, quotas)


def _mdslr(groups: _Groups, keep_ratio: float) -> Rows:
    """Apply the reference's rule: one count for all classes, small classes whole."""
    kept_total(1, keep_ratio)  # refuses a ratio outside (0, 1]
    num_rows, num_classes = len(groups.rows), len(groups.counts)
    quota = int(num_rows / num_classes * keep_ratio) if num_classes else 0
    # The reference takes a small class whole and does not hand its shortfall to the others.
    is_whole = groups.counts <= quota
    quotas = np.where(is_whole, groups.counts, quota)
    starts = np.where(is_whole, 0, groups.counts // 2 - (quota - quota // 2))
    return groups.windows(starts, quotas)


def _moderate(ascending: Rows, keep_ratio: float) -> Rows:
    """Keep rows around the median of all, rounded as the paper's code rounds."""
    kept_total(1, keep_ratio)
    low = round(len(ascending) * (0.5 - keep_ratio / 2))
    high = round(len(ascending) * (0.5 + keep_ratio / 2))
    return np.sort(ascending[low:high])


def _ccs(scores: Scores, keep_ratio: float, drop_hardest: float, keys: NDArray[np.uint64]) -> Rows:
    """Leave the hardest out, then draw from equal-width strata, each as evenly as it can give."""
    num_rows = len(scores)
    total = kept_total(num_rows, keep_ratio)
    # Never so many that the keep ratio could not be met.
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
    # Water-filling from the smallest stratum: each gives its even share of what is still wanted.
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
    # numpy sorts 16-bit integers by radix, many times as fast.
    narrow = classes.astype(np.min_scalar_type(max(0, len(counts) - 1)))
    return _Groups(ascending[np.argsort(narrow[ascending], kind="stable")], counts)


def _checked(scores: ArrayLike, labels: ArrayLike) -> tuple[Scores, Rows]:
    """Return scores and labels as arrays, if rows can be chosen by them."""
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


def _check_settings(
    strategy: str,
    quota: str,
    per_class: bool,
    quantile: float,
    drop_hardest: float,
    compat: str | None,
) -> None:
    """Refuse names that are not known and settings that contradict each other."""
    if strategy not in STRATEGIES:
        hint = did_you_mean(strategy, STRATEGIES)
        raise InvalidValueError(f"strategy {strategy!r} is not known.{hint}")
    if compat not in (None, *COMPATIBLE_WITH):
        hint = did_you_mean(compat, COMPATIBLE_WITH)
        raise InvalidValueError(f"compat {compat!r} is not known.{hint}")
    if not 0 <= quantile <= 1 or math.isnan(quantile):
        raise InvalidValueError(f"quantile ({quantile}) must be in [0, 1]; 0.5 is the median.")
    if not 0 <= drop_hardest < 1:
        raise InvalidValueError(f"drop_hardest ({drop_hardest}) must be in [0, 1).")
    knows_classes = per_class and strategy not in GLOBAL_STRATEGIES
    if quota != "proportional" and not knows_classes:
        why = "knows none" if strategy in GLOBAL_STRATEGIES else "was asked to ignore them"
        raise InvalidValueError(
            f"quota {quota!r} shares rows out among classes, but strategy {strategy!r} {why}. "
            "Leave the quota out, or choose per class."
        )
    if compat and (strategy != "medium" or quota != "proportional" or not per_class):
        raise InvalidValueError(
            f"compat {compat!r} is the rule of strategy 'medium' with its own quota, per class, "
            f"but strategy {strategy!r}, quota {quota!r}, per_class {per_class} were asked for. "
            "Leave those out."
        )
