"""The cost of training: steps at their median, by a measure that survives a busy machine."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

# Steps of one kind do the same work; a wider spread means that something else ran on the machine.
_DISTURBED = 1.3
# A few steps have no meaningful spread: the first of an epoch waits for the pipeline to fill.
_FEWEST_STEPS = 20


@dataclass(frozen=True)
class Steps:
    """The steps of one kind in a run.

    Attributes:
        steps: how many, timed or not.
        seconds: median of the timed ones.
    """

    steps: int
    seconds: float


@dataclass(frozen=True)
class StepSeconds:
    """How long the steps of a run took.

    Attributes:
        p10: seconds; a tenth of the steps took less.
        p50: the median.
        p90: seconds; a tenth of the steps took more.
        kinds: kind -> count and median of its steps.
        is_disturbed: whether p90 is more than 1.3 times the median, in any kind of step.
    """

    p10: float
    p50: float
    p90: float
    kinds: dict[str, Steps]
    is_disturbed: bool

    @property
    def steady_seconds(self) -> float:
        """All steps, each at the median of its kind: the time on an otherwise idle machine."""
        return sum(kind.steps * kind.seconds for kind in self.kinds.values())


def summarize_steps(
    samples: Mapping[str, Sequence[float]], counts: Mapping[str, int]
) -> StepSeconds:
    """Summarize the steps of a run, whose kinds differ in their work.

    Args:
        samples: kind (such as the image size) -> seconds of its timed steps; at least one of all
            kinds together.
        counts: kind -> its steps, timed or not.
    """
    everything = [seconds for kind in samples.values() for seconds in kind]
    p10, p50, p90 = _deciles(everything)
    kinds, is_disturbed = {}, False
    for kind, count in counts.items():
        timed = samples.get(kind) or everything
        _, median, late = _deciles(timed)
        kinds[kind] = Steps(count, median)
        is_disturbed |= len(timed) >= _FEWEST_STEPS and late > _DISTURBED * median
    return StepSeconds(p10, p50, p90, kinds, is_disturbed)


def steady_seconds(runs: Iterable[Mapping[str, Steps]]) -> list[float]:
    """Seconds of training of each run, at a pace that equal kinds of steps share.

    A run may pass while the machine is busy from end to end; its own median would then charge it
    for its neighbor. Steps that do the same work are therefore pooled over all runs: each counts
    with the median over runs, weighted by their steps. Runs compared this way differ by how many
    steps of which kind they take, and not by when they ran.

    Args:
        runs: kind -> steps, for each run; a kind has one name wherever the work is the same.

    Returns:
        A number per run, in order.
    """
    runs = list(runs)
    kinds = {kind for run in runs for kind in run}
    pace = {kind: _weighted_median([run[kind] for run in runs if kind in run]) for kind in kinds}
    return [sum(steps.steps * pace[kind] for kind, steps in run.items()) for run in runs]


def _weighted_median(medians: Sequence[Steps]) -> float:
    """The pace that at most half of all steps were slower than, and at most half faster."""
    ordered = sorted(medians, key=lambda steps: steps.seconds)
    half, before = sum(steps.steps for steps in ordered) / 2, 0
    for position, steps in enumerate(ordered):
        before += steps.steps
        if before == half:
            # Between two halves, as the median of an even number of values.
            return (steps.seconds + ordered[position + 1].seconds) / 2
        if before > half:
            return steps.seconds
    raise AssertionError("a kind has at least one step")


def _deciles(seconds: Sequence[float]) -> tuple[float, float, float]:
    """The first, fifth and ninth decile; a single value is all three."""
    if len(seconds) == 1:
        return (seconds[0],) * 3
    deciles = statistics.quantiles(seconds, n=10, method="inclusive")
    return deciles[0], deciles[4], deciles[8]
