"""What a comparison of runs may claim: differences with intervals, and what speaks against them."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastprune.report.runs import Group, Run

# 97.5% quantiles of Student's t for 1, 2, ... 30 degrees of freedom; beyond, the normal's is near.
_T_QUANTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
_NORMAL_QUANTILE = 1.960
# Runs of one recipe on one quiet machine differ by a few percent.
_MOST_SPEED_RATIO = 1.15
# These differ between runs that are meant to be compared, or say nothing about them.
_INCIDENTAL = ("run.out", "run.name", "run.seed", "run.log_every", "run.keep_checkpoints")


@dataclass(frozen=True)
class Difference:
    """How far a group's top-1 after the last epoch is from the baseline's.

    Attributes:
        points: mean of the differences by seed, in percentage points.
        half_width: of the 95% interval around it, by Student's t; None for a single seed.
        seeds: that both groups have.
    """

    points: float
    half_width: float | None
    seeds: tuple[int, ...]

    @property
    def is_detected(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.half_width is not None and abs(self.points) > self.half_width

    def __str__(self) -> str:
        spread = "" if self.half_width is None else f" ± {self.half_width:.2f}"
        return f"{_signed(self.points)}{spread}"


def difference(group: Group, baseline: Group) -> Difference | None:
    """Compare two groups of finished runs, seed by seed.

    Seeds that only one of them has are left out: pairing takes away what a seed's order and
    initial weights do to both.

    Returns:
        The difference; None where they share no seed, or a run has no validation.
    """
    reached = [{run.seed: run.top1_last for run in runs} for runs in (group.runs, baseline.runs)]
    ours, theirs = reached
    shared = tuple(seed for seed in ours if ours[seed] is not None and theirs.get(seed) is not None)
    if not shared:
        return None
    points = [100 * ((ours[seed] or 0.0) - (theirs[seed] or 0.0)) for seed in shared]
    return Difference(statistics.mean(points), half_width(points), shared)


def half_width(values: Sequence[float]) -> float | None:
    """Half of the 95% interval around the mean, by Student's t; None for a single value."""
    degrees = len(values) - 1
    if degrees == 0:
        return None
    quantile = _T_QUANTILES[degrees - 1] if degrees <= len(_T_QUANTILES) else _NORMAL_QUANTILE
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def verdict(groups: Sequence[Group], baseline: Group | None) -> list[str]:
    """Say in a sentence for each finished group how it compares with the baseline.

    Args:
        groups: all groups.
        baseline: the one to compare with, or None.

    Returns:
        Sentences, plain text; one that says what is missing where nothing can be compared.
    """
    others = [group for group in groups if group.is_finished and group is not baseline]
    if baseline is None:
        return ["No verdict: name the runs to compare with by --reference."]
    if not others:
        return [f"No verdict: {baseline.name} is the only finished experiment."]
    return [_sentence(group, baseline) for group in others]


def _sentence(group: Group, baseline: Group) -> str:
    found = difference(group, baseline)
    if found is None:
        return f"{group.name} and {baseline.name} share no seed: they cannot be compared in pairs."
    claim = f"{group.name} − {baseline.name}: {_signed(found.points)} points"
    if found.half_width is None:
        return f"{claim} on one seed. One seed says nothing: run more of them."
    low, high = found.points - found.half_width, found.points + found.half_width
    interval = f"95% interval {_signed(low)} to {_signed(high)}, {len(found.seeds)} seeds in pairs"
    if not found.is_detected:
        return f"{claim} ({interval}): no difference detected."
    return f"{claim} ({interval}): {'better' if found.points > 0 else 'worse'}."


def warnings_about(groups: Sequence[Group]) -> list[str]:
    """List what speaks against comparing these runs, as sentences."""
    finished = [group for group in groups if group.is_finished]
    found = []
    speeds = {group.name: _images_per_second(group) for group in finished}
    known = {name: speed for name, speed in speeds.items() if speed}
    if known and max(known.values()) > _MOST_SPEED_RATIO * min(known.values()):
        listed = ", ".join(f"{name} {speed:,.0f}" for name, speed in known.items())
        found.append(
            f"The runs trained at different speeds (images/s: {listed}). Their seconds compare "
            "machines, settings or what else ran there, and not only the rows; compare the steps."
        )
    disturbed = [run.folder.name for group in finished for run in group.runs if run.is_disturbed]
    if disturbed:
        found.append(
            f"Something else ran beside: {', '.join(disturbed)}. Do not trust the seconds."
        )
    for group in groups:
        settings = configuration_differences([Group(str(run.seed), (run,)) for run in group.runs])
        if settings:
            found.append(
                f"The runs called {group.name} differ by more than their seed: "
                f"{', '.join(settings)}. Their ± is no spread over seeds."
            )
    if any(0 < len(group.runs) < 2 for group in finished):
        single = ", ".join(group.name for group in finished if len(group.runs) < 2)
        found.append(f"One seed each: {single}. A difference may be chance.")
    return found


def configuration_differences(groups: Sequence[Group]) -> Mapping[str, list[str]]:
    """Find the settings that are not the same in all groups.

    Args:
        groups: the first run of each stands for all of its runs.

    Returns:
        "section.key" -> a value per group; a dash where a group has no such setting.
    """
    flat = [_flat(group.runs[0].recipe) for group in groups]
    names = sorted({name for settings in flat for name in settings} - set(_INCIDENTAL))
    values = {name: [_text(settings.get(name)) for settings in flat] for name in names}
    return {name: texts for name, texts in values.items() if len(set(texts)) > 1}


def _signed(points: float) -> str:
    """Format with a sign, a true minus: a hyphen is hard to see."""
    return f"{points:+.2f}".replace("-", "−")


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _text(value: Any) -> str:
    return "–" if value is None else str(value)


def _images_per_second(group: Group) -> float | None:
    """Average over the runs; None where the numbers are not recorded."""

    def rate(run: Run) -> float | None:
        images, seconds = run.number("images_per_epoch"), run.number("train_seconds")
        return run.epochs * images / seconds if images and seconds else None

    rates = [rate(run) for run in group.runs]
    known = [value for value in rates if value is not None]
    return statistics.mean(known) if len(known) == len(rates) and known else None
