"""What the student minimises: cross-entropy, and the distance from a teacher's logits."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastprune.distillation.losses import LogitReshaper, distillation_loss, standardize
from fastprune.recipe import LossSettings

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Maps images (B, 3, S, S), the student's logits (B, C) and labels (B,) to a scalar loss."""


def plain_objective(loss: LossSettings) -> Objective:
    """Cross-entropy against the labels alone."""

    def objective(images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        del images
        return functional.cross_entropy(logits, labels, label_smoothing=loss.label_smoothing)

    return objective


def teacher_objective(
    teacher: nn.Module, loss: LossSettings, reshaper: LogitReshaper | None
) -> Objective:
    """Cross-entropy and distillation, weighted.

    Args:
        teacher: frozen, in eval mode; it sees the same view as the student.
        loss: weights, temperature and reshaping.
        reshaper: applied to the teacher's logits; None leaves them.
    """

    def objective(images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            targets = teacher(images)
            if reshaper is not None:
                targets = reshaper(targets, labels)
        cross_entropy = functional.cross_entropy(
            logits, labels, label_smoothing=loss.label_smoothing
        )
        if loss.reshaping == "zscore":
            logits, targets = standardize(logits), standardize(targets)
        distillation = distillation_loss(logits, targets, temperature=loss.temperature)
        return loss.cross_entropy_weight * cross_entropy + loss.distillation_weight * distillation

    return objective
