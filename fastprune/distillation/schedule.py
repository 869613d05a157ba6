"""The optimiser and its learning rate, step by step."""

from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR, OneCycleLR

from fastprune.recipe import ScheduleSettings


def make_optimizer(model: nn.Module, settings: ScheduleSettings) -> SGD:
    """SGD with momentum over all parameters of the model."""
    return SGD(
        model.parameters(),
        lr=settings.learning_rate,
        momentum=settings.momentum,
        nesterov=settings.nesterov,
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
        return OneCycleLR(
            optimizer,
            max_lr=settings.learning_rate,
            total_steps=total_steps,
            pct_start=settings.warmup_share,
            # The recipe's momentum holds throughout.
            cycle_momentum=False,
        )
    if settings.policy == "cosine":
        return CosineAnnealingLR(optimizer, T_max=total_steps)
    milestones = [epoch * steps_per_epoch for epoch in settings.milestones]
    return MultiStepLR(optimizer, milestones=milestones, gamma=settings.gamma)
