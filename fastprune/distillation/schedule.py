"""The optimizer, the learning rate of a step, the passes of a run, averaged weights."""

import copy
import math

import torch
from torch import nn
from torch.optim import SGD
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fastprune.settings import ScheduleSettings

# One cycle's first rate over its highest: torch's OneCycleLR begins at 1/25.
_FIRST_SHARE = 0.04
# Positions are quotients; a milestone must not be missed by a rounding.
_TOLERANCE = 1e-9


def make_optimizer(model: nn.Module, settings: ScheduleSettings) -> SGD:
    """SGD with momentum over all parameters of the model."""
    return SGD(
        model.parameters(),
        lr=settings.learning_rate,
        momentum=settings.momentum,
        nesterov=settings.nesterov and settings.momentum > 0,
        weight_decay=settings.weight_decay,
    )


class WeightAverage:
    """An exponential moving average of weights and running statistics.

    torch's AveragedModel counts its updates in a tensor, so that each makes the host wait for a
    CUDA device; here the caller passes the step.

    Attributes:
        student: a network with the averaged weights, without gradients, in eval mode.
    """

    def __init__(self, student: nn.Module, *, decay: float) -> None:
        """Start from the student's weights; the average keeps a share `decay` in (0, 1) a step."""
        self.student = copy.deepcopy(student).eval().requires_grad_(False)
        self._decay = decay

    @torch.no_grad()
    def update(self, student: nn.Module, *, step: int) -> None:
        """Move the average towards the student, `step` >= 1 steps done."""
        # All tensors in one fused call, instead of a kernel launch for each.
        averages, values = [], []
        state = student.state_dict()
        for name, average in self.student.state_dict().items():
            # Batch counters are integers: they follow, and are not averaged.
            if average.is_floating_point():
                averages.append(average)
                values.append(state[name])
            else:
                average.copy_(state[name])
        # Faster in the first steps, so that the average forgets the untrained weights.
        decay = min(self._decay, (1 + step) / (10 + step))
        get_ema_multi_avg_fn(decay)(averages, values, step)


def num_passes(settings: ScheduleSettings, *, steps_of_pass: int, steps_of_all: int) -> int:
    """Return how many passes a run makes over the rows that it trains on.

    Args:
        settings: epochs, and whether the number of steps is fixed.
        steps_of_pass: batches of these rows.
        steps_of_all: batches of all rows of the beton.

    Returns:
        The epochs; with fixed iterations the whole number of passes that comes nearest to the
        steps of as many epochs over all rows.
    """
    if not settings.fixed_iterations:
        return settings.epochs
    # A whole number of passes, so that every row is seen equally often.
    return max(1, round(settings.epochs * steps_of_all / steps_of_pass))


def learning_rate(settings: ScheduleSettings, progress: float) -> float:
    """Return the learning rate of a step, a pure function without state to save.

    Args:
        settings: policy, milestones and warm-up.
        progress: share in [0, 1) of the run that lies before the step.
    """
    return settings.learning_rate * _factor(settings, progress)


def _factor(settings: ScheduleSettings, progress: float) -> float:
    """Return the factor of the recipe's rate."""
    if settings.policy == "one_cycle":
        return _rise_and_fall(progress, settings.warmup_share)
    if settings.policy == "cosine":
        return _rise_and_fall(progress, settings.warmup_epochs / settings.epochs)
    # In the recipe's epochs, even where fixed iterations stretch them over more passes.
    epoch = progress * settings.epochs + _TOLERANCE
    if epoch < settings.warmup_epochs:
        return _rise(epoch / settings.warmup_epochs)
    return settings.gamma ** sum(epoch >= milestone for milestone in settings.milestones)


def _rise_and_fall(progress: float, rise_share: float) -> float:
    """Rises linearly, then falls to zero along a cosine."""
    if progress < rise_share:
        return _rise(progress / rise_share)
    return 0.5 * (1 + math.cos(math.pi * (progress - rise_share) / (1 - rise_share)))


def _rise(share: float) -> float:
    """From 4% to all of the rate."""
    return _FIRST_SHARE + (1 - _FIRST_SHARE) * share
