"""The optimiser and its learning rate, step by step."""

import math
from functools import partial

from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, MultiStepLR

from fastprune.recipe import ScheduleSettings

_FIRST_SHARE = 0.04


def make_optimizer(model: nn.Module, settings: ScheduleSettings) -> SGD:
    """SGD with momentum over all parameters of the model."""
    return SGD(
        model.parameters(),
        lr=settings.learning_rate,
        momentum=settings.momentum,
        nesterov=settings.nesterov and settings.momentum > 0,
        weight_decay=settings.weight_decay,
    )


def make_scheduler(
    optimizer: SGD, settings: ScheduleSettings, *, steps_per_epoch: int
) -> LRScheduler:
    """The learning rate's course; `step()` is called after every optimiser step.

    Args:
        optimizer: what is steered.
        settings: policy, epochs and milestones.
        steps_per_epoch: batches in an epoch.
    """
    total_steps = settings.epochs * steps_per_epoch
    if settings.policy == "one_cycle":
        # torch's OneCycleLR divides by zero where the rise takes a single step.
        factor = partial(_one_cycle, total=total_steps, warmup_share=settings.warmup_share)
        return LambdaLR(optimizer, factor)
    if settings.policy == "cosine":
        return CosineAnnealingLR(optimizer, T_max=total_steps)
    milestones = [epoch * steps_per_epoch for epoch in settings.milestones]
    return MultiStepLR(optimizer, milestones=milestones, gamma=settings.gamma)


def _one_cycle(step: int, *, total: int, warmup_share: float) -> float:
    """Share of the highest rate: rises linearly from 4%, then falls to zero along a cosine."""
    rise = max(round(total * warmup_share), 1)
    if step < rise:
        return _FIRST_SHARE + (1 - _FIRST_SHARE) * step / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(total - rise, 1)))
