"""Contrasts of a study: fixed before the runs, paired by seed, corrected for their number."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

_LEVEL = 0.05
_INTERVAL_STEPS = 2000


def compare(
    runs: Sequence[Mapping[str, Any]],
    pairs: Sequence[tuple[str, str]],
    *,
    margins: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Compare cells by the accuracy after the last epoch, seed by seed.

    Args:
        runs: with name, seed and top1_last in [0, 1].
        pairs: (cell, the one it is held against); those that share fewer than two seeds are left
            out.
        margins: name of a contrast -> points within which its cells count as equivalent.

    Returns:
        For each pair its name, mean difference, 95% interval (low, high) in percentage points, n,
        p by the paired t test, whether Holm's procedure at 5% over all pairs decides it, the
        margin and whether the whole interval lies within it (None where there is no margin), and
        a sentence.
    """
    reached: dict[str, dict[int, float]] = {}
    for run in runs:
        reached.setdefault(run["name"], {})[run["seed"]] = 100 * run["top1_last"]
    found = [
        _contrast(cell, other, reached[cell], reached[other])
        for cell, other in pairs
        if len(reached.get(cell, {}).keys() & reached.get(other, {}).keys()) > 1
    ]
    # Holm 1979: the smallest p against 5%/m, the next against 5%/(m - 1), up to the first failure.
    is_open = True
    for rank, contrast in enumerate(sorted(found, key=lambda contrast: contrast["p"])):
        is_open = is_open and contrast["p"] <= _LEVEL / (len(found) - rank)
        contrast["decided"] = is_open
        margin = contrast["margin"] = (margins or {}).get(contrast["name"])
        contrast["equivalent"] = None
        if margin is not None:
            contrast["equivalent"] = -margin < contrast["low"] and contrast["high"] < margin
        contrast["sentence"] = sentence(contrast)
    return found


def sentence(contrast: Mapping[str, Any]) -> str:
    """Say what a contrast shows.

    >>> sentence({"name": "a - b", "mean": 0.2, "low": -0.3, "high": 0.7, "n": 7, "decided": False})
    'a - b: no difference detected, +0.2 points [-0.3, +0.7], 7 seeds.'
    """
    mean, low, high = (f"{contrast[key]:+.1f}" for key in ("mean", "low", "high"))
    decided = "no difference detected"
    if contrast["decided"]:
        decided = "better" if contrast["mean"] > 0 else "worse"
    found = f"{contrast['name']}: {decided}, {mean} points [{low}, {high}], {contrast['n']} seeds"
    if contrast.get("margin") is None:
        return f"{found}."
    shown = "shown" if contrast["equivalent"] else "not shown"
    return f"{found}; equivalence within {contrast['margin']} points {shown}."


def _contrast(
    cell: str, other: str, ours: Mapping[int, float], theirs: Mapping[int, float]
) -> dict[str, Any]:
    differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    count, mean = len(differences), statistics.mean(differences)
    error = statistics.stdev(differences) / math.sqrt(count)
    half = half_width(differences) or 0.0
    if error == 0:
        p = 1.0 if mean == 0 else 0.0
    else:
        p = 2 * (1 - distribution(abs(mean) / error, count - 1))
    return {
        "name": f"{cell} - {other}",
        "mean": mean,
        "low": mean - half,
        "high": mean + half,
        "n": count,
        "p": p,
    }


def half_width(values: Sequence[float]) -> float | None:
    """Half of the 95% interval around the mean, by Student's t; None for a single value."""
    count = len(values)
    if count < 2:
        return None
    return quantile(1 - _LEVEL / 2, count - 1) * statistics.stdev(values) / math.sqrt(count)


def distribution(t: float, degrees: int) -> float:
    """Student's distribution function at t >= 0, by Simpson's rule."""
    log_scale = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)
    scale = math.exp(log_scale) / math.sqrt(degrees * math.pi)
    # By x = sqrt(degrees) tan(a), the tail of any t lies on a finite interval.
    end = math.atan(t / math.sqrt(degrees))
    step = end / _INTERVAL_STEPS
    heights = [math.cos(step * i) ** (degrees - 1) for i in range(_INTERVAL_STEPS + 1)]
    area = heights[0] + heights[-1] + 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2])
    return min(0.5 + scale * math.sqrt(degrees) * area * step / 3, 1.0)


def quantile(share: float, degrees: int) -> float:
    """Student's quantile for a share in [0.5, 1), by bisection."""
    low, high = 0.0, 1e4
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if distribution(middle, degrees) < share else (low, middle)
    return high
