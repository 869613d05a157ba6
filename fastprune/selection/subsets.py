"""From a score table to a subset that says how it was made."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastprune.artifacts.scores import ScoreTable
from fastprune.artifacts.subset import Subset, checked_rows
from fastprune.errors import InvalidValueError
from fastprune.selection.blend import difficulty
from fastprune.selection.strategies import require_finite, select_rows

DEFAULT_METRIC = "centroid"
_COMPAT_METRIC = "loss"
_NAMES_SHOWN = 5


def make_subset(
    table: ScoreTable,
    *,
    keep_ratio: float,
    metric: str | None = None,
    strategy: str = "medium",
    quota: str = "proportional",
    per_class: bool = True,
    quantile: float = 0.5,
    drop_hardest: float = 0.1,
    seed: int = 0,
    compat: str | None = None,
    exclude: ArrayLike | None = None,
    allow_empty_classes: bool = False,
    command: str | None = None,
) -> Subset:
    """Choose rows by their scores and keep the record of how.

    Args:
        table: the scores.
        keep_ratio: share of the rows to keep, in (0, 1]; of those that are not excluded.
        metric: what rows are ranked by, one metric or a blend (see `difficulty`); by default
            `centroid`, `loss` with compat `mdslr` as in the reference, or the table's only metric.
        strategy: see `select_rows`; so are quota, per_class, quantile, drop_hardest, seed, compat.
        quota: as there.
        per_class: as there.
        quantile: as there.
        drop_hardest: as there.
        seed: as there.
        compat: as there.
        exclude: rows that are never kept, sorted and unique.
        allow_empty_classes: False to refuse a subset in which a class that has rows keeps none.
        command: the command line, for the record.

    Returns:
        The subset, with the table's fingerprint and class std.

    Raises:
        InvalidValueError: an argument is outside its domain, or a class would be left empty.
    """
    metric = metric or _default_metric(table, compat)
    candidates, excluded = _candidates(table, exclude)
    scores = difficulty(table, metric)[candidates]
    require_finite(scores, candidates)
    chosen = select_rows(
        scores,
        table.labels[candidates],
        keep_ratio=keep_ratio,
        strategy=strategy,
        quota=quota,
        per_class=per_class,
        quantile=quantile,
        drop_hardest=drop_hardest,
        seed=seed,
        compat=compat,
        rows=candidates,
    )
    rows = candidates[chosen]
    class_counts = np.bincount(table.labels[rows], minlength=len(table.class_counts))
    _refuse_empty(table, class_counts, keep_ratio, allow_empty_classes)
    parameters: dict[str, Any] = {"quota": quota, "per_class": per_class}
    if strategy == "window":
        parameters["quantile"] = quantile
    if strategy == "ccs":
        parameters["drop_hardest"] = drop_hardest
    if compat:
        parameters["compat"] = compat
    if excluded:
        parameters["excluded_rows"] = excluded
    return Subset(
        rows=rows,
        fingerprint=table.fingerprint,
        keep_ratio=keep_ratio,
        metric=metric,
        strategy=strategy,
        parameters=parameters,
        seed=seed,
        class_counts=class_counts.tolist(),
        class_std=None if np.isnan(table.class_std).all() else table.class_std,
        command=command,
        score_seconds=table.seconds,
    )


def _default_metric(table: ScoreTable, compat: str | None) -> str:
    """The only metric of an imported table; else the reference's, or this project's."""
    if len(table.metrics) == 1:
        return next(iter(table.metrics))
    return _COMPAT_METRIC if compat == "mdslr" else DEFAULT_METRIC


def _candidates(table: ScoreTable, exclude: ArrayLike | None) -> tuple[NDArray[np.int64], int]:
    """The rows that may be kept, and how many may not."""
    if exclude is None:
        return np.arange(table.num_rows), 0
    if np.size(exclude) == 0:
        return np.arange(table.num_rows), 0
    rows = checked_rows(np.unique(exclude), name="exclude", num_rows=table.num_rows)
    is_candidate = np.ones(table.num_rows, bool)
    is_candidate[rows] = False
    return np.flatnonzero(is_candidate), len(rows)


def _refuse_empty(
    table: ScoreTable, class_counts: NDArray[np.int64], keep_ratio: float, allowed: bool
) -> None:
    """No subset without rows, and none that silently forgets a class."""
    if not class_counts.any():
        raise InvalidValueError(
            f"a keep ratio of {keep_ratio} keeps none of {table.num_rows:,} rows. Keep more."
        )
    empty = np.flatnonzero((class_counts == 0) & (table.class_counts > 0))
    if len(empty) and not allowed:
        shown = ", ".join(map(str, empty[:_NAMES_SHOWN]))
        more = f" and {len(empty) - _NAMES_SHOWN:,} more" if len(empty) > _NAMES_SHOWN else ""
        raise InvalidValueError(
            f"the subset would keep no row of {len(empty):,} classes ({shown}{more}). Keep more, "
            "choose another strategy, or allow it (--allow-empty-classes)."
        )
