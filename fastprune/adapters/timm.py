"""timm's distillation with class-wise logit reshaping, with or without a teacher in memory."""

from pathlib import Path
from typing import Any

import torch
from numpy.typing import ArrayLike
from timm.task import LogitDistillationTask
from torch import Tensor, nn
from torch.nn import functional

from fastprune.base.errors import InvalidValueError
from fastprune.distillation.losses import LogitReshaper
from fastprune.rows.subset import Subset

__all__ = ["ReshapedDistillationTask"]


class ReshapedDistillationTask(LogitDistillationTask):
    """timm's `LogitDistillationTask`, with teacher logits reshaped to the whole dataset's scale.

    Everything else is timm's: weights of the losses, temperature, EMA, compiling, several
    processes. With `teacher_model=None` no teacher is in memory, and each call takes its logits,
    such as the field "teacher_logits" of a `Loader`.

    For a soft target, as mixup and label smoothing make it, the class std is the mean over the
    classes, weighted by their shares.
    """

    student_mean: Tensor
    student_std: Tensor

    def __init__(
        self,
        student_model: nn.Module,
        teacher_model: str | nn.Module | None,
        *,
        class_std: ArrayLike | Tensor | Subset | str | Path | None,
        **options: Any,
    ) -> None:
        """Load the class std and check it.

        Args:
            student_model: a timm model, which carries its mean and std.
            teacher_model: as timm takes it; None if each call passes the logits.
            class_std: (C,) mean standard deviation of the teacher's logits of each class, or the
                subset that holds it (a `Subset` or its file); None to leave the logits as they are.
            options: timm's own, such as task_loss_weight, distill_loss_weight, temperature.

        Raises:
            InvalidValueError: the subset has no class std, or one for another number of classes.
        """
        # Identity has no parameters; `forward` refuses to run without logits then.
        super().__init__(student_model, teacher_model or nn.Identity(), **options)
        self._has_teacher = teacher_model is not None
        std = _class_std(class_std)
        self.reshape = None if std is None else LogitReshaper(std).to(self.device)
        num_classes = student_model.num_classes
        if self.reshape is not None and len(self.reshape.class_std) != num_classes:
            raise InvalidValueError(
                f"class_std has {len(self.reshape.class_std):,} classes, but the student has "
                f"{num_classes:,}. Take the subset of the student's images."
            )

    def forward(
        self,
        input: Tensor,  # noqa: A002 - timm's name
        target: Tensor,
        teacher_logits: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute the losses of a batch.

        Args:
            input: (B, 3, H, W) floating, normalized for the student.
            target: (B,) int64 labels, or (B, C) floating shares of the classes.
            teacher_logits: (B, C) floating on the unmixed `input`; None to ask the teacher.

        Returns:
            "loss", "output" (the student's logits), "task_loss" and "kd_loss", as timm's.

        Raises:
            InvalidValueError: neither a teacher nor its logits are given, or the logits are of
                unmixed images and the target is of mixed ones.
        """
        if teacher_logits is None:
            teacher_logits = self._ask_teacher(input)
        elif target.ndim == 2:
            # timm makes shares only where it may mix. Whether it mixed this batch could only be
            # read from the device, which would make every step wait.
            raise InvalidValueError(
                "teacher_logits are of images that were not mixed, but the target is of mixed ones "
                f"{tuple(target.shape)}. Train without mixup and cutmix, or with the teacher in "
                "memory."
            )
        student_logits = self.trainable_module(input)
        task_loss = self.criterion(student_logits, target)
        if self.reshape is not None:
            teacher_logits = self.reshape(teacher_logits, target)
        # As timm: the batch's mean of T² · KL(teacher / T ‖ student / T).
        kd_loss = self.temperature**2 * functional.kl_div(
            functional.log_softmax(student_logits / self.temperature, dim=-1),
            functional.log_softmax(teacher_logits / self.temperature, dim=-1),
            reduction="batchmean",
            log_target=True,
        )
        return {
            "loss": self.task_loss_weight * task_loss + self.distill_loss_weight * kd_loss,
            "output": student_logits,
            "task_loss": task_loss,
            "kd_loss": kd_loss,
        }

    @torch.no_grad()
    def _ask_teacher(self, images: Tensor) -> Tensor:
        if not self._has_teacher:
            raise InvalidValueError(
                "the task has no teacher, so each call needs teacher_logits: take a loader with "
                'the field "teacher_logits", or make the task with a teacher_model.'
            )
        images = self.teacher.normalize_input(images, self.student_mean, self.student_std)
        logits: Tensor = self.teacher(images, return_features=False)
        return logits


def _class_std(
    source: ArrayLike | Tensor | Subset | str | Path | None,
) -> ArrayLike | Tensor | None:
    if isinstance(source, str | Path):
        source = Subset.load(source)
    if isinstance(source, Subset):
        if source.class_std is None:
            raise InvalidValueError(
                "the subset has no class std; it was made without a score table. Make it by "
                "`fastprune select`, or give class_std yourself."
            )
        return source.class_std
    return source
