"""The loss that the student minimizes: cross-entropy, and the distance from the teacher."""

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastprune.distillation.learner import Outputs
from fastprune.distillation.losses import (
    LogitReshaper,
    decoupled_distillation_loss,
    distillation_loss,
    feature_loss,
    standardize_logits,
)
from fastprune.networks import FeatureNetwork
from fastprune.settings import LossSettings


class Objective(nn.Module):
    """The loss of every row: weighted cross-entropy, distillation and feature loss.

    The answers come from a `Teacher`; `reshape` changes them, and `forward` compares with them.
    Nothing in here is trained: the teacher's network is frozen and stays in eval mode.
    """

    def __init__(
        self,
        settings: LossSettings,
        teacher: FeatureNetwork | None = None,
        reshaper: LogitReshaper | None = None,
        *,
        keep_ratio: float = 1.0,
    ) -> None:
        """Freeze the teacher.

        Args:
            settings: weights, temperature and reshaping.
            teacher: sees the same view as the student. None minimizes the cross-entropy alone,
                regardless of its weight.
            reshaper: applied to the teacher's logits; None leaves them.
            keep_ratio: share of the rows trained on, which `distillation_weight` may depend on.
        """
        super().__init__()
        self.settings = settings
        self.teacher = teacher
        self.reshaper = reshaper
        self.distillation_weight = settings.distillation_weight_at(keep_ratio)
        self._share = 1.0
        # The teacher and the class std: nothing in here is the optimizer's.
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode: in training mode the teacher's running statistics would change."""
        del mode
        return super().train(False)

    def begin_epoch(self, epoch: int) -> None:
        """Let the distillation count as much as it should in an epoch, counted from 0."""
        # Epoch 0 has 1/w of the weight already; 0 and 1 both mean no warm-up.
        warmup_epochs = max(self.settings.distillation_warmup_epochs, 1)
        self._share = min((epoch + 1) / warmup_epochs, 1.0)

    @torch.no_grad()
    def reshape(self, answer: Outputs | None, labels: Tensor) -> Outputs | None:
        """Reshape the logits in a teacher's answer where the recipe asks for it."""
        if answer is None or self.reshaper is None:
            return answer
        return answer._replace(logits=self.reshaper(answer.logits, labels))

    def forward(self, outputs: Outputs, targets: Outputs | None, labels: Tensor) -> Tensor:
        """Compare a learner's outputs with labels and targets.

        Args:
            outputs: of the learner.
            targets: of the teacher for the same batch, reshaped.
            labels: (B,) int64.

        Returns:
            (B,) float32, the loss of every row; the caller takes the mean.
        """
        settings = self.settings
        # A learner without a classifier is taught by features alone.
        if outputs.logits.shape[1] == 0:
            assert targets is not None, "the recipe is validated"
            return settings.feature_weight * feature_loss(outputs.features, targets.features)
        cross_entropy = functional.cross_entropy(
            outputs.logits.float(),
            labels,
            reduction="none",
            label_smoothing=settings.label_smoothing,
        )
        # Weighing a single term would only rescale the learning rate.
        if targets is None:
            return cross_entropy
        loss = settings.cross_entropy_weight * cross_entropy
        weight = self.distillation_weight * self._share
        # A term of weight zero would cost time, and NaN times zero is NaN.
        if weight > 0:
            loss = loss + weight * self._distillation(outputs, targets, labels)
        if settings.feature_weight > 0:
            loss = loss + settings.feature_weight * feature_loss(outputs.features, targets.features)
        return loss

    def _distillation(self, outputs: Outputs, targets: Outputs, labels: Tensor) -> Tensor:
        """Compute the distance between the logits that the recipe asks for: (B,)."""
        settings, student, teacher = self.settings, outputs.logits, targets.logits
        # Here and not in `reshape`: the student's logits are standardized as well.
        if settings.reshaping == "zscore":
            student, teacher = standardize_logits(student), standardize_logits(teacher)
        if settings.distillation == "kd":
            return distillation_loss(student, teacher, temperature=settings.temperature)
        return decoupled_distillation_loss(
            student,
            teacher,
            labels,
            temperature=settings.temperature,
            target_weight=settings.target_weight,
            others_weight=settings.others_weight,
        )
