"""From a score table to a subset: the metric or blend that rows are ranked by, and the record."""

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastprune.base.checks import did_you_mean
from fastprune.base.errors import InvalidValueError
from fastprune.rows.score_table import ScoreTable
from fastprune.rows.subset import Subset, checked_rows
from fastprune.selection.strategies import require_finite, select_rows

DEFAULT_METRIC = "centroid"
CLUSTER_METRIC = "prototype"
_COMPAT_METRIC = "loss"
_STRATEGY_METRICS = {"moderate": "centroid_median"}
_NAMES_SHOWN = 5

# Kept in score tables, but no measure of how hard a row is.
NO_DIFFICULTIES = ("logit_std",)


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
        table: the scores. Where it has clusters, they take the place of classes.
        keep_ratio: share of the rows to keep, in (0, 1]; excluded rows do not count.
        metric: what rows are ranked by, one metric or a blend (see `difficulty`); by default
            `centroid`, `loss` with compat `mdslr` and `centroid_median` with `moderate`, as in the
            papers' code, `prototype` of rows that were scored without labels, or the table's only
            metric.
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
    if metric is None:
        # An imported table has one metric of any name.
        only = next(iter(table.metrics)) if len(table.metrics) == 1 else None
        # Moderate Coreset measures the distance from the median of the class, not from its mean.
        own = _STRATEGY_METRICS.get(strategy, DEFAULT_METRIC)
        own = own if own in table.metrics else DEFAULT_METRIC
        # Without labels: the distance to the center of the cluster in the place of the class.
        own = own if table.clusters is None else CLUSTER_METRIC
        metric = only or (_COMPAT_METRIC if compat == "mdslr" else own)
    if quota != "proportional" and len(table.group_counts) < 2:
        raise InvalidValueError(
            f"quota {quota!r} shares rows out among classes, but the images have none. Leave it "
            "out, or score them with clusters in place of classes (fastprune score --unsupervised)."
        )
    candidates, excluded = _candidates(table, exclude)
    if len(candidates) == 0:
        raise InvalidValueError(
            f"all {table.num_rows:,} rows are excluded. Exclude fewer (--exclude)."
        )
    scores = difficulty(table, metric)[candidates]
    require_finite(scores, candidates)
    chosen = select_rows(
        scores,
        table.groups[candidates],
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
    class_counts = np.bincount(table.groups[rows], minlength=len(table.group_counts))
    _refuse_empty(table, class_counts, keep_ratio, allow_empty_classes)
    parameters: dict[str, Any] = {"quota": quota, "per_class": per_class}
    if strategy == "window":
        parameters["quantile"] = quantile
    if strategy == "ccs":
        parameters["drop_hardest"] = drop_hardest
    if compat:
        parameters["compat"] = compat
    if table.clusters is not None:
        parameters["clusters"] = len(table.group_counts)
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


def _candidates(table: ScoreTable, exclude: ArrayLike | None) -> tuple[NDArray[np.int64], int]:
    """Return the rows that may be kept, and how many may not."""
    if exclude is None or np.size(exclude) == 0:
        return np.arange(table.num_rows), 0
    rows = checked_rows(np.unique(exclude), name="exclude", num_rows=table.num_rows)
    is_candidate = np.ones(table.num_rows, bool)
    is_candidate[rows] = False
    return np.flatnonzero(is_candidate), len(rows)


def _refuse_empty(
    table: ScoreTable, class_counts: NDArray[np.int64], keep_ratio: float, allowed: bool
) -> None:
    """Refuse a subset without rows, and one that silently forgets a class."""
    if not class_counts.any():
        raise InvalidValueError(
            f"a keep ratio of {keep_ratio} keeps none of {table.num_rows:,} rows. Keep more."
        )
    empty = np.flatnonzero((class_counts == 0) & (table.group_counts > 0))
    if len(empty) and not allowed:
        kind = "classes" if table.clusters is None else "clusters"
        shown = ", ".join(map(str, empty[:_NAMES_SHOWN]))
        more = f" and {len(empty) - _NAMES_SHOWN:,} more" if len(empty) > _NAMES_SHOWN else ""
        raise InvalidValueError(
            f"the subset would keep no row of {len(empty):,} {kind} ({shown}{more}). Keep more, "
            "choose another strategy, or allow it (--allow-empty-classes)."
        )


def difficulty(table: ScoreTable, metric: str) -> NDArray[np.float32] | NDArray[np.float64]:
    """Return the scores of a metric, or of a blend such as `centroid:0.5,loss:0.5`.

    Args:
        table: the scores of a beton.
        metric: one metric, whose scores are returned as they are; or several with their weights,
            whose ranks among all rows, scaled to [0, 1], are averaged. Equal scores share the
            mean of their ranks.

    Returns:
        (N,) larger is harder: float32 for one metric, float64 in [0, 1] for a blend, NaN where
        one of its metrics is not finite.

    Raises:
        InvalidValueError: a metric is not in the table or is no difficulty, or a weight is no
            positive number.
    """
    if ":" not in metric and "," not in metric:
        return _scores(table, metric)
    weights = _weights(metric)
    total = sum(weights.values())
    blended = np.zeros(table.num_rows)
    for name, weight in weights.items():
        scores = _scores(table, name)
        # A row without a score has no place: it is refused later, or excluded.
        blended += weight / total * np.where(np.isfinite(scores), ranks(scores), np.nan)
    return blended


def ranks(scores: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the place of every score among all, in [0, 1]; equal scores share their mean place."""
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    last = np.cumsum(counts) - 1
    mean_places = last - (counts - 1) / 2
    places: NDArray[np.float64] = mean_places[inverse] / max(1, len(scores) - 1)
    return places


def _scores(table: ScoreTable, name: str) -> NDArray[np.float32]:
    """Return one metric of the table, if rows can be ranked by it."""
    known = [other for other in table.metrics if other not in NO_DIFFICULTIES]
    if name not in known:
        why = "is no difficulty" if name in NO_DIFFICULTIES else "is not in the score table"
        raise InvalidValueError(f"metric {name!r} {why}.{did_you_mean(name, known)}")
    return table.metric(name)


def _weights(metric: str) -> dict[str, float]:
    """Parse `a:0.5,b:0.5`."""
    weights: dict[str, float] = {}
    for part in metric.split(","):
        name, _, text = part.partition(":")
        try:
            weight = float(text or 1)
        except ValueError:
            weight = math.nan
        if not (math.isfinite(weight) and weight > 0):
            raise InvalidValueError(
                f"metric {metric!r}: the weight of {name!r} is {text!r}; write a blend as "
                "name:weight,name:weight with positive weights, such as centroid:0.5,loss:0.5."
            )
        weights[name.strip()] = weights.get(name.strip(), 0.0) + weight
    # Two weights of 1e308 are finite, their sum is not.
    if not math.isfinite(sum(weights.values())):
        raise InvalidValueError(
            f"metric {metric!r}: the weights are too large to be summed. Only their ratios matter: "
            "write 0.5 and 0.5."
        )
    return weights
