"""Runs of several seeds against a baseline: costs, differences, and the claims they allow."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fastprune.base.errors import InvalidValueError
from fastprune.distillation.costs import Steps, steady_seconds
from fastprune.report.runs import Run

_REFERENCE_NAME = "full"
# 97.5% quantiles of Student's t for 1, 2, ... 30 degrees of freedom; beyond, the normal's is near.
_T_QUANTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
_NORMAL_QUANTILE = 1.960
# Runs of one recipe on one quiet machine differ by a few percent.
_MOST_SPEED_RATIO = 1.15
# These differ between runs that are meant to be compared, or do not matter.
_INCIDENTAL = ("run.out", "run.name", "run.seed", "run.log_every", "run.keep_checkpoints")
# Settings that decide the work of a step, beside its kind. Reshaping is not among them: it is one
# multiplication per logit.
_WORK = (
    *("data.batch_size", "data.augment", "data.backend", "student.network", "teacher.network"),
    *("loss.distillation", "loss.feature_weight", "loss.projectors", "pruning.rule"),
    *("schedule.clip_norm", "schedule.ema_decay"),
    *("run.precision", "run.compile", "run.channels_last", "run.sync_batchnorm"),
)


@dataclass(frozen=True)
class Group:
    """Runs that differ by their seed.

    Attributes:
        name: of the runs.
        runs: one or more, all finished or none.
    """

    name: str
    runs: tuple[Run, ...]

    @property
    def is_finished(self) -> bool:
        """Whether its runs have results."""
        return self.runs[0].is_finished

    def numbers(self, key: str) -> list[float | None]:
        """Look up a number in the result of each run."""
        return [run.number(key) for run in self.runs]


@dataclass(frozen=True)
class Comparison:
    """Groups of runs, and the baseline among them.

    Attributes:
        groups: the baseline first, then in the order of their runs.
        baseline: the one to compare with; None where none is clear.
    """

    groups: tuple[Group, ...]
    baseline: Group | None

    @classmethod
    def of(cls, runs: Sequence[Run], reference: str | None = None) -> "Comparison":
        """Group runs by name, and choose the baseline.

        Args:
            runs: all runs.
            reference: name of the baseline; None for `choose_reference`'s choice.

        Raises:
            InvalidValueError: no finished run has that name.
        """
        groups = group_runs(runs)
        baseline = choose_reference(groups, reference)
        return cls(tuple(sorted(groups, key=lambda group: group is not baseline)), baseline)

    @property
    def runs(self) -> list[Run]:
        """All runs, group by group."""
        return [run for group in self.groups for run in group.runs]

    @property
    def finished(self) -> list[Group]:
        """The groups whose runs have results."""
        return [group for group in self.groups if group.is_finished]

    @cached_property
    def steady_seconds(self) -> Mapping[int, float]:
        """Seconds of training of each finished run, by `id`; see `costs.steady_seconds`."""
        runs = [run for group in self.finished for run in group.runs]
        runs = [run for run in runs if run.number("steady_train_seconds") is not None]
        seconds = steady_seconds(_steps(run) for run in runs)
        return {id(run): value for run, value in zip(runs, seconds, strict=True)}

    def cost_seconds(self, run: Run) -> float | None:
        """Add up what a student cost: steps, scoring and start-up; None if one is not recorded.

        This is the one rule of cost. The wall clock would compare runs that came one after the
        other on a machine that may have been busy during one of them.
        """
        steps = self.steady_seconds.get(id(run))
        if steps is None or run.score_seconds is None:
            return None
        return steps + run.score_seconds + (run.number("startup_seconds") or 0.0)

    def costs(self, group: Group) -> list[float | None]:
        """Return the cost of each run over the baseline's, in seconds without one.

        A run is held against the baseline's run of the same seed; where the two share no seed,
        against the baseline's mean.
        """
        costs = [self.cost_seconds(run) for run in group.runs]
        if self.baseline is None:
            return costs
        theirs = {run.seed: self.cost_seconds(run) for run in self.baseline.runs}
        if not any(run.seed in theirs for run in group.runs):
            theirs = dict.fromkeys((run.seed for run in group.runs), mean(list(theirs.values())))
        pairs = [
            (cost, theirs[run.seed])
            for run, cost in zip(group.runs, costs, strict=True)
            if run.seed in theirs
        ]
        return [ours / full if ours is not None and full else None for ours, full in pairs]


def _steps(run: Run) -> dict[str, Steps]:
    """Name the steps of a run so that equal names mean equal work, also in other runs."""
    assert run.result is not None, "only finished runs have costs"
    result, kinds = run.result, run.result.steps_by_kind
    if not kinds:
        # Of an older version: it keeps its own median, since its kinds are not known.
        return {str(run.folder): Steps(1, run.number("steady_train_seconds") or 0.0)}
    settings = flat_settings(run)
    where = (result.machine, result.versions, result.device, result.backend)
    # A resumed recipe may have moved to other processes, so they are taken from the result.
    work = (where, run.number("processes"), [settings.get(name) for name in _WORK])
    return {f"{kind} {work}": steps for kind, steps in kinds.items()}


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Put runs of one name together, finished and unfinished ones apart, in order."""
    members: dict[tuple[str, bool], list[Run]] = {}
    for run in runs:
        members.setdefault((run.name, run.is_finished), []).append(run)
    return [
        Group(name if is_finished else f"{name} (unfinished)", tuple(group))
        for (name, is_finished), group in members.items()
    ]


def choose_reference(groups: Sequence[Group], name: str | None) -> Group | None:
    """Choose the group that the others are compared with.

    Args:
        groups: all groups.
        name: the one that is asked for; None for the finished one that trains on all rows, among
            several the one called "full".

    Returns:
        The group; None where none is asked for and none, or more than one, fits.

    Raises:
        InvalidValueError: no finished run has that name.
    """
    finished = {group.name: group for group in groups if group.is_finished}
    if name is not None:
        if name not in finished:
            known = ", ".join(finished) or "none"
            raise InvalidValueError(
                f"reference {name!r} is not among the finished runs: {known}. Name one of these."
            )
        return finished[name]
    full = {name: group for name, group in finished.items() if group.runs[0].keeps_all}
    if len(full) == 1:
        return next(iter(full.values()))
    return full.get(_REFERENCE_NAME)


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
    ours, theirs = ({run.seed: run.top1_last for run in g.runs} for g in (group, baseline))
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
    """Compare each finished group with the baseline, in a sentence of plain text each.

    Args:
        groups: all groups.
        baseline: the one to compare with, or None.

    Returns:
        The sentences; where nothing can be compared, one that names what is missing.
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
        return f"{claim} on one seed. One seed shows nothing: run more of them."
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
            "machines, settings or other load, and not only the rows; compare cost and steps."
        )
    disturbed = [run.folder.name for group in finished for run in group.runs if run.is_disturbed]
    if disturbed:
        found.append(
            f"The machine was busy with something else during {', '.join(disturbed)}. Do not trust "
            "the seconds."
        )
    for group in groups:
        settings = configuration_differences([Group(str(run.seed), (run,)) for run in group.runs])
        if settings:
            found.append(
                f"The runs called {group.name} differ by more than their seed: "
                f"{', '.join(settings)}. Their ± is not a spread over seeds."
            )
    single = [group.name for group in finished if len(group.runs) == 1]
    if single:
        found.append(f"One seed each: {', '.join(single)}. A difference may be chance.")
    return found


def configuration_differences(groups: Sequence[Group]) -> Mapping[str, list[str]]:
    """Find the settings that are not the same in all groups.

    Args:
        groups: the first run of each stands for all of its runs.

    Returns:
        "section.key" -> a value per group; a dash where a group has no such setting.
    """
    flat = [flat_settings(group.runs[0]) for group in groups]
    names = sorted({name for settings in flat for name in settings} - set(_INCIDENTAL))
    texts = {name: [_text(settings.get(name)) for settings in flat] for name in names}
    return {name: values for name, values in texts.items() if len(set(values)) > 1}


def flat_settings(run: Run) -> dict[str, Any]:
    """Return the settings in a run's recipe.json by dotted name, such as "data.batch_size"."""
    sections = run.recipe.model_dump(exclude_unset=True)
    return {
        f"{section}.{name}": value
        for section, settings in sections.items()
        for name, value in (settings or {}).items()
    }


def mean(values: Sequence[float | None]) -> float | None:
    """Average the values; None where one is missing."""
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known and len(known) == len(values) else None


def _signed(points: float) -> str:
    """Format with a sign, a true minus: a hyphen is hard to see."""
    return f"{points:+.2f}".replace("-", "−")


def _text(value: Any) -> str:
    return "–" if value is None else str(value)


def _images_per_second(group: Group) -> float | None:
    """Average over the runs; None where the numbers are not recorded."""

    def rate(run: Run) -> float | None:
        images, seconds = run.number("images_per_epoch"), run.number("train_seconds")
        return run.epochs * images / seconds if images and seconds else None

    return mean([rate(run) for run in group.runs])
