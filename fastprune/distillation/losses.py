"""Distances between student and teacher, row by row, and changes of logits before them."""

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn import functional

from fastprune.base.errors import InvalidValueError


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float
) -> Tensor:
    """Distance of the student's softened distribution from the teacher's.

    Args:
        student_logits: (B, C) floating.
        teacher_logits: (B, C) floating; no gradient flows into it.
        temperature: T > 0.

    Returns:
        (B,) float32: T² · KL(softmax(teacher / T) ‖ softmax(student / T)) of every row, summed
        over classes.

    Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network".
    """
    # In float32 also under autocast: bf16 has three digits, and T² multiplies the error.
    student = functional.log_softmax(student_logits.float() / temperature, dim=1)
    teacher = functional.log_softmax(teacher_logits.detach().float() / temperature, dim=1)
    return _divergence(student, teacher) * temperature**2


def decoupled_distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    target_weight: float = 1.0,
    others_weight: float = 8.0,
) -> Tensor:
    """Distance of the student from the teacher, in two parts that are weighted separately.

    The first part compares the probability of the label against all other classes together, the
    second the distribution among the other classes. In `distillation_loss` the second is weighted
    by the teacher's doubt, so that a confident teacher hardly teaches it.

    Args:
        student_logits: (B, C) floating, C >= 2.
        teacher_logits: (B, C) floating; no gradient flows into it.
        labels: (B,) int64, each in [0, C).
        temperature: T > 0.
        target_weight: of the first part, called α in the paper.
        others_weight: of the second part, called β in the paper.

    Returns:
        (B,) float32: T² times the weighted sum of both divergences of every row.

    Source: Zhao et al. 2022, "Decoupled Knowledge Distillation".
    """
    student_binary, student_others = _decoupled(student_logits.float() / temperature, labels)
    teacher_binary, teacher_others = _decoupled(
        teacher_logits.detach().float() / temperature, labels
    )
    target = _divergence(student_binary, teacher_binary)
    others = _divergence(student_others, teacher_others)
    return (target_weight * target + others_weight * others) * temperature**2


def feature_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Distance between the directions of the student's and the teacher's features.

    Args:
        student_features: (B, D) floating, in the teacher's space (see `ProjectorEnsemble`).
        teacher_features: (B, D) floating; no gradient flows into it.

    Returns:
        (B,) float32 in [0, 2]: one minus the cosine of the angle between them; 1 where one of them
        is zero.

    Source: Chen et al. 2022, "Improved Feature Distillation via Projector Ensemble".
    """
    cosine = functional.cosine_similarity(
        student_features.float(), teacher_features.detach().float(), dim=1
    )
    return 1 - cosine


class LogitReshaper(nn.Module):
    """Give every row's logits the mean standard deviation of its class over the whole dataset.

    Pruning shifts the distribution of the teacher's logits; this shifts their scale back:
    z' = z · class_std[y] / std(z), with the unbiased standard deviation over the C logits and no
    centering. A row of constant logits, whose standard deviation is zero, stays as it is.

    Args:
        class_std: (C,) mean standard deviation of the logits of each class, finite and >= 0 (NaN
            for a class without rows, whose logits then stay as they are). Kept in its floating
            dtype, as float32 where it is an integer one.

    Raises:
        InvalidValueError: `class_std` is not one-dimensional, or a value is negative or infinite.

    Source: Chen et al. 2025, "Medium-Difficulty Samples Constitute Smoothed Decision Boundary for
    Knowledge Distillation on Pruned Datasets".
    """

    class_std: Tensor

    def __init__(self, class_std: ArrayLike | Tensor) -> None:
        super().__init__()
        std = torch.as_tensor(class_std).clone()
        # Integers would truncate what is computed with them.
        std = std if std.is_floating_point() else std.float()
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
            labels: (B,) int64, each in [0, C); or (B, C) floating, the share of each class in an
                image that is mixed of several, whose deviation is the weighted mean of theirs.

        Returns:
            (B, C) float32, or float64 for float64 logits.
        """
        logits = logits if logits.dtype == torch.float64 else logits.float()
        # Unbiased, as the class std are.
        std = logits.std(dim=1, keepdim=True)
        class_std = self.class_std.to(logits.dtype)
        if labels.ndim == 1:
            target = class_std[labels].unsqueeze(1)
        else:
            # The share of a class without rows goes to the image's other classes; 0 / 0 is NaN.
            shares = labels.to(logits.dtype) * ~torch.isnan(class_std)
            mean = (shares @ class_std.nan_to_num()) / shares.sum(dim=1)
            target = mean.unsqueeze(1)
        # Rounding can leave constant logits a deviation just above zero.
        negligible = logits.abs().amax(dim=1, keepdim=True) * torch.finfo(logits.dtype).eps
        usable = (std > negligible) & ~torch.isnan(target)
        return logits * torch.where(usable, target / std, 1.0)


def standardize_logits(logits: Tensor) -> Tensor:
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


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher ‖ student) of every row of two (B, C) tables of log-probabilities: (B,)."""
    return functional.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1)


def _decoupled(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of label and not label (B, 2), and among the other classes (B, C - 1)."""
    log_shares = functional.log_softmax(logits, dim=1)
    # The columns but the label's, by index: a mask would need the host, or a number for log 0.
    columns = torch.arange(logits.shape[1] - 1, device=logits.device)
    others = columns + (columns >= labels.unsqueeze(1))
    log_others = log_shares.gather(1, others)
    log_rest = log_others.logsumexp(dim=1, keepdim=True)
    binary = torch.cat([log_shares.gather(1, labels.unsqueeze(1)), log_rest], dim=1)
    return binary, log_others - log_rest
