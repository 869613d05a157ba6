"""What the student minimises: cross-entropy, and the distance from what a teacher says."""

from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastprune.distillation.learner import Outputs
from fastprune.distillation.losses import LogitReshaper, distillation_loss, standardize
from fastprune.recipe import LossSettings


class Targets(NamedTuple):
    """What a teacher says of a batch.

    Attributes:
        logits: (B, C) floating, reshaped where the recipe asks for it.
    """

    logits: Tensor


class Objective(nn.Module):
    """The loss of every row: weighted cross-entropy and distillation.

    Asking the teacher (`teach`) and comparing with it (`forward`) are two calls, so that the time
    of each can be told. Nothing in here is trained, and the teacher stays in eval mode.
    """

    def __init__(
        self,
        settings: LossSettings,
        teacher: nn.Module | None = None,
        reshaper: LogitReshaper | None = None,
    ) -> None:
        """Freeze the teacher.

        Args:
            settings: weights, temperature and reshaping.
            teacher: maps (B, 3, H, W) images to (B, C) logits; it sees the same view as the
                student. None minimises the cross-entropy alone, whatever its weight.
            reshaper: applied to the teacher's logits; None leaves them.
        """
        super().__init__()
        self.settings = settings
        self.teacher = teacher
        self.reshaper = reshaper
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Do nothing but what `eval` does: a teacher in training mode would change."""
        del mode
        return super().train(False)

    @torch.no_grad()
    def teach(self, images: Tensor, labels: Tensor) -> Targets | None:
        """Ask the teacher.

        Args:
            images: (B, 3, H, W), the student's view.
            labels: (B,) int64.

        Returns:
            What it says, without gradients; None without a teacher.
        """
        if self.teacher is None:
            return None
        logits = self.teacher(images)
        return Targets(logits if self.reshaper is None else self.reshaper(logits, labels))

    def forward(self, outputs: Outputs, targets: Targets | None, labels: Tensor) -> Tensor:
        """Compare a learner's outputs with labels and targets.

        Args:
            outputs: of the learner.
            targets: of `teach`, for the same batch.
            labels: (B,) int64.

        Returns:
            (B,) float32, the loss of every row; the caller takes the mean.
        """
        settings, logits = self.settings, outputs.logits.float()
        cross_entropy = functional.cross_entropy(
            logits, labels, reduction="none", label_smoothing=settings.label_smoothing
        )
        if targets is None:
            return cross_entropy
        teacher_logits = targets.logits
        if settings.reshaping == "zscore":
            logits, teacher_logits = standardize(logits), standardize(teacher_logits)
        distillation = distillation_loss(logits, teacher_logits, temperature=settings.temperature)
        return (
            settings.cross_entropy_weight * cross_entropy
            + settings.distillation_weight * distillation
        )
