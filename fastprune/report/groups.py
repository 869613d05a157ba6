"""Runs of one name over several seeds, as one line of a table: means, spreads, ratios."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from fastprune.errors import InvalidValueError
from fastprune.report.runs import Run

_REFERENCE_NAME = "full"


@dataclass(frozen=True)
class Group:
    """Runs that differ by their seed.

    Attributes:
        name: what they are called.
        runs: one or more, all finished or none.
    """

    name: str
    runs: tuple[Run, ...]

    @property
    def is_finished(self) -> bool:
        """Whether its runs came to their end."""
        return self.runs[0].is_finished


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
    """What the others are compared with.

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


def cost_ratios(group: Group, reference: Group, *, with_scoring: bool) -> list[float]:
    """Seconds of each run over those of the reference run with the same seed.

    Args:
        group: the runs.
        reference: what they are compared with.
        with_scoring: count scoring, or training alone.

    Returns:
        A ratio per seed that both have; where they share none, the ratio of the means. Empty where
        a number is not recorded.
    """

    def cost(run: Run) -> float | None:
        return run.paid_seconds() if with_scoring else run.number("train_seconds")

    references = {run.seed: cost(run) for run in reference.runs}
    pairs = [(cost(run), references[run.seed]) for run in group.runs if run.seed in references]
    if not pairs:
        pairs = [(mean([cost(r) for r in group.runs]), mean([cost(r) for r in reference.runs]))]
    return [ours / theirs for ours, theirs in pairs if ours is not None and theirs]


def mean(values: Sequence[float | None]) -> float | None:
    """The mean; None where a value is missing."""
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known and len(known) == len(values) else None


def mean_and_sd(values: Sequence[float | None], digits: int) -> str:
    """`61.2 ± 0.4`; a single value alone, and a dash where one is missing."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return "–"
    text = f"{statistics.mean(known):,.{digits}f}"
    return text if len(known) < 2 else f"{text} ± {statistics.stdev(known):,.{digits}f}"
