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
from fastprune.settings import SelectSettings, StrategySettings, takes_settings
from fastprune.settings.score import CLUSTER_METRIC, NOT_DIFFICULTIES

DEFAULT_METRIC = "centroid"
_NAMES_SHOWN = 5


@takes_settings(SelectSettings)
def make_subset(
    table: ScoreTable,
    *,
    exclude: ArrayLike | None = None,
    command: str | None = None,
    settings: SelectSettings,
) -> Subset:
    """Choose rows by their scores and keep the record of how.

    Args:
        table: the scores. If it has clusters, they take the place of classes.
        exclude: rows that are never kept; the keep ratio is a share of the others.
        command: the command line, for the record.
        settings: the fields of `SelectSettings`, as keywords.

    Returns:
        The subset, with the table's fingerprint and class std.

    Raises:
        InvalidValueError: an argument is outside its domain, or a class would be left empty.
    """
    metric = settings.metric or _default_metric(table, settings)
    if settings.quota != "proportional" and len(table.group_counts) < 2:
        raise InvalidValueError(
            f"quota {settings.quota!r} shares rows out among classes, but the images have none. "
            "Leave it out, or score them with clusters in place of classes (fastprune score "
            "--unsupervised)."
        )
    candidates = _candidates(table, exclude)
    scores = difficulty(table, metric)[candidates]
    require_finite(scores, candidates)
    chosen = select_rows(
        scores,
        table.groups[candidates],
        rows=candidates,
        **settings.model_dump(include=set(StrategySettings.model_fields)),
    )
    rows = candidates[chosen]
    class_counts = np.bincount(table.groups[rows], minlength=len(table.group_counts))
    _refuse_empty(table, class_counts, settings)
    parameters: dict[str, Any] = {"quota": settings.quota, "per_class": settings.per_class}
    if settings.strategy == "window":
        parameters["quantile"] = settings.quantile
    if settings.strategy == "ccs":
        parameters["drop_hardest"] = settings.drop_hardest
    if settings.compat:
        parameters["compat"] = settings.compat
    if table.clusters is not None:
        parameters["clusters"] = len(table.group_counts)
    if len(candidates) < table.num_rows:
        parameters["excluded_rows"] = table.num_rows - len(candidates)
    return Subset(
        rows=rows,
        fingerprint=table.fingerprint,
        keep_ratio=settings.keep_ratio,
        metric=metric,
        strategy=settings.strategy,
        parameters=parameters,
        seed=settings.seed,
        class_counts=class_counts.tolist(),
        class_std=None if np.isnan(table.class_std).all() else table.class_std,
        command=command,
        score_seconds=table.seconds,
    )


def _default_metric(table: ScoreTable, settings: SelectSettings) -> str:
    """Choose the metric that the strategy's source ranks by, among the table's metrics."""
    # An imported table has one metric, under any name.
    if len(table.metrics) == 1:
        return next(iter(table.metrics))
    if settings.compat == "mdslr":
        return "loss"
    if table.clusters is not None:
        return CLUSTER_METRIC
    # Moderate Coreset measures the distance from the median of the class, not from its mean.
    has_median = "centroid_median" in table.metrics
    return "centroid_median" if settings.strategy == "moderate" and has_median else DEFAULT_METRIC


def _candidates(table: ScoreTable, exclude: ArrayLike | None) -> NDArray[np.int64]:
    """Return the rows that may be kept."""
    is_candidate = np.ones(table.num_rows, bool)
    if exclude is not None and np.size(exclude):
        rows = checked_rows(np.unique(exclude), name="exclude", num_rows=table.num_rows)
        is_candidate[rows] = False
    if not is_candidate.any():
        raise InvalidValueError(
            f"all {table.num_rows:,} rows are excluded. Exclude fewer (--exclude)."
        )
    return np.flatnonzero(is_candidate)


def _refuse_empty(
    table: ScoreTable, class_counts: NDArray[np.int64], settings: SelectSettings
) -> None:
    """Refuse a subset without rows, and one that silently forgets a class."""
    if not class_counts.any():
        raise InvalidValueError(
            f"a keep ratio of {settings.keep_ratio} keeps none of {table.num_rows:,} rows. Keep "
            "more."
        )
    empty = np.flatnonzero((class_counts == 0) & (table.group_counts > 0))
    if len(empty) and not settings.allow_empty_classes:
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
        InvalidValueError: a metric is not in the table or does not measure difficulty, or a
            weight is not a positive number.
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
    known = [other for other in table.metrics if other not in NOT_DIFFICULTIES]
    if name not in known:
        why = (
            "does not measure difficulty"
            if name in NOT_DIFFICULTIES
            else "is not in the score table"
        )
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
