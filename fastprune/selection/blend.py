"""What rows are ranked by: one metric, or several blended by their ranks."""

import math

import numpy as np
from numpy.typing import NDArray

from fastprune.artifacts.scores import ScoreTable
from fastprune.checks import did_you_mean
from fastprune.errors import InvalidValueError

NO_DIFFICULTIES = ("logit_std",)


def difficulty(table: ScoreTable, metric: str) -> NDArray[np.float32] | NDArray[np.float64]:
    """The scores that a metric's name, or a blend such as `centroid:0.5,loss:0.5`, stands for.

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
    """Place of every score among all of them, in [0, 1]; equal scores share their mean place."""
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    last = np.cumsum(counts) - 1
    mean_places = last - (counts - 1) / 2
    places: NDArray[np.float64] = mean_places[inverse] / max(1, len(scores) - 1)
    return places


def _scores(table: ScoreTable, name: str) -> NDArray[np.float32]:
    """One metric of the table, if rows can be ranked by it."""
    known = [other for other in table.metrics if other not in NO_DIFFICULTIES]
    if name not in known:
        why = "is no difficulty" if name in NO_DIFFICULTIES else "is not in the score table"
        raise InvalidValueError(f"metric {name!r} {why}.{did_you_mean(name, known)}")
    return table.metric(name)


def _weights(metric: str) -> dict[str, float]:
    """`a:0.5,b:0.5` as a dict."""
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
    return weights
