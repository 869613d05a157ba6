"""What training costs, by a measure that survives a busy machine."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Steps of one kind do the same work; beyond this spread something else ran on the machine.
_DISTURBED = 1.3
# A few steps say nothing of a spread: the first of an epoch waits for the pipeline to fill.
_FEWEST_STEPS = 20


@dataclass(frozen=True)
class StepSeconds:
    """How long the steps of a run took.

    Attributes:
        p10: seconds that a tenth of the steps stayed below.
        p50: the median.
        p90: seconds that a tenth of the steps went beyond.
        steady_seconds: of all steps, each counted with the median of its kind: what training takes
            on a machine that does nothing else most of the time.
        is_disturbed: whether p90 is more than 1.3 times the median, in any kind of step.
    """

    p10: float
    p50: float
    p90: float
    steady_seconds: float
    is_disturbed: bool


def summarize_steps(
    samples: Mapping[str, Sequence[float]], counts: Mapping[str, int]
) -> StepSeconds:
    """Summarize the steps of a run, whose kinds differ in their work.

    Args:
        samples: kind (such as the images' size) -> seconds of its timed steps, one or more of all
            kinds together.
        counts: kind -> its steps, timed or not.
    """
    everything = [seconds for kind in samples.values() for seconds in kind]
    p10, p50, p90 = _deciles(everything)
    steady, is_disturbed = 0.0, False
    for kind, count in counts.items():
        timed = samples.get(kind) or everything
        _, median, late = _deciles(timed)
        steady += count * median
        is_disturbed |= len(timed) >= _FEWEST_STEPS and late > _DISTURBED * median
    return StepSeconds(p10, p50, p90, steady, is_disturbed)


@dataclass(frozen=True)
class Cost:
    """What a student cost until it was trained.

    Attributes:
        steady_train_seconds: steps times their median seconds.
        score_seconds: of scoring the rows that it was trained on; 0 where no scores were used.
        startup_seconds: before the first step.
    """

    steady_train_seconds: float
    score_seconds: float
    startup_seconds: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.steady_train_seconds + self.score_seconds + self.startup_seconds


def cost_ratio(cost: Cost, reference: Cost) -> float:
    """Divide a cost by that of the reference.

    Seconds by the wall clock compare runs that came one after the other on a machine that may have
    been busy in one of them; medians do not see a phase that is shorter than half of a run.
    """
    return cost.seconds / reference.seconds


def _deciles(seconds: Sequence[float]) -> tuple[float, float, float]:
    """The first, fifth and ninth decile; of a single value the value."""
    if len(seconds) == 1:
        return (seconds[0],) * 3
    deciles = statistics.quantiles(seconds, n=10, method="inclusive")
    return deciles[0], deciles[4], deciles[8]
