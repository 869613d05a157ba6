"""What the student is pulled towards: labels, and the teacher's softened and reshaped logits."""

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn import functional

from fastprune.errors import InvalidValueError


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float
) -> Tensor:
    """How far the student's softened distribution is from the teacher's.

    Args:
        student_logits: (B, C) floating.
        teacher_logits: (B, C) floating; no gradient flows into it.
        temperature: T > 0.

    Returns:
        (B,) float32: T² · KL(softmax(teacher / T) ‖ softmax(student / T)) of every row, summed
        over classes.

    Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network".
    """
    student = functional.log_softmax(student_logits.float() / temperature, dim=1)
    teacher = functional.log_softmax(teacher_logits.detach().float() / temperature, dim=1)
    divergence = functional.kl_div(student, teacher, reduction="none", log_target=True)
    return divergence.sum(dim=1) * temperature**2


class LogitReshaper(nn.Module):
    """Give every row's logits the mean standard deviation of its class over the whole dataset.

    Pruning shifts the distribution of the teacher's logits; this shifts their scale back:
    z' = z · class_std[y] / std(z), with the unbiased standard deviation over the C logits and no
    centring. A row of constant logits, whose standard deviation is zero, stays as it is.

    Args:
        class_std: (C,) mean standard deviation of the logits of each class, finite and >= 0 (NaN
            for a class without rows, whose logits then stay as they are).

    Raises:
        InvalidValueError: `class_std` is not one-dimensional, or a value is negative or infinite.

    Source: Chen et al. 2025, "Medium-Difficulty Samples Constitute Smoothed Decision Boundary for
    Knowledge Distillation on Pruned Datasets".
    """

    class_std: Tensor

    def __init__(self, class_std: ArrayLike | Tensor) -> None:
        super().__init__()
        std = torch.as_tensor(class_std, dtype=torch.float32).clone()
        if std.ndim != 1 or len(std) < 2:
            raise InvalidValueError(
                f"class_std must have one value per class, but has shape {tuple(std.shape)}."
            )
        wrong = torch.isinf(std) | (std < 0)
        if wrong.any():
            first = int(wrong.nonzero()[0])
            raise InvalidValueError(
                f"class_std[{first}] is {float(std[first])}, but must be finite and >= 0."
            )
        self.register_buffer("class_std", std)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Reshape a batch.

        Args:
            logits: (B, C) floating.
            labels: (B,) int64, each in [0, C).

        Returns:
            (B, C) float32, or float64 for float64 logits.
        """
        logits = logits if logits.dtype == torch.float64 else logits.float()
        std = logits.std(dim=1, keepdim=True)
        target = self.class_std.to(logits.dtype)[labels].unsqueeze(1)
        # Rounding can leave constant logits a deviation just above zero.
        negligible = logits.abs().amax(dim=1, keepdim=True) * torch.finfo(logits.dtype).eps
        usable = (std > negligible) & ~torch.isnan(target)
        return logits * torch.where(usable, target / std, 1.0)


def standardize(logits: Tensor) -> Tensor:
    """Logits with mean zero and standard deviation one in every row.

    Args:
        logits: (B, C) floating.

    Returns:
        (B, C) float32.

    Source: Sun et al. 2024, "Logit Standardization in Knowledge Distillation".
    """
    logits = logits.float()
    # Inside the root, so that a row of constant logits has a gradient.
    std = (logits.var(dim=1, keepdim=True) + 1e-12).sqrt()
    return (logits - logits.mean(dim=1, keepdim=True)) / std
