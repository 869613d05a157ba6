"""The difficulty of each row, from the teacher's logits and features: one formula a function.

All of them compute in float64: a sure teacher leaves errors that float32 would round to zero, and
rows that share a score cannot be told apart.
"""

import torch
from torch import Tensor
from torch.nn import functional

from fastprune.base.errors import InvalidValueError


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the cross-entropy, -log p_y, by which the MDSLR reference code ranks.

    Args:
        logits: (B, C) raw teacher outputs, any float dtype.
        labels: (B,) int64, each in [0, C).

    Returns:
        (B,) float64, >= 0; larger is harder.
    """
    return functional.cross_entropy(logits.double(), labels, reduction="none")


def el2n(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the L2 norm of the teacher's error vector, |p - e_y|.

    Args:
        logits: (B, C) raw teacher outputs, any float dtype.
        labels: (B,) int64, each in [0, C).

    Returns:
        (B,) float64 in [0, sqrt(2)]; larger is harder.

    Source: Paul et al. 2021, "Deep Learning on a Data Diet", eq. 3.
    """
    log_p = functional.log_softmax(logits.double(), dim=1)
    chosen = labels[:, None]
    # p_y - 1 as expm1(log p_y): exact where p_y is so near 1 that the difference would vanish.
    error = log_p.exp().scatter(1, chosen, torch.expm1(log_p.gather(1, chosen)))
    norm: Tensor = torch.linalg.vector_norm(error, dim=1)
    return norm


def grand_last(logits: Tensor, labels: Tensor, features: Tensor) -> Tensor:
    """Compute the norm of the loss's gradient in the last layer, |p - e_y| * sqrt(1 + |h|^2).

    Args:
        logits: (B, C) raw teacher outputs, any float dtype.
        labels: (B,) int64, each in [0, C).
        features: (B, D), the last layer's input.

    Returns:
        (B,) float64, >= 0; larger is harder.

    Source: Paul et al. 2021 (GraNd), for the last layer alone as in DeepCore.
    """
    return el2n(logits, labels) * (1 + features.double().square().sum(dim=1)).sqrt()


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute how far the best wrong class is above the right one, max_{k != y} p_k - p_y.

    Args:
        logits: (B, C) raw teacher outputs, any float dtype, C >= 2.
        labels: (B,) int64, each in [0, C).

    Returns:
        (B,) float64 in [-1, 1]; larger is harder, positive where the teacher is wrong.

    Source: one snapshot of AUM, as in Zheng et al. 2023 (CCS).
    """
    p = logits.double().softmax(dim=1)
    chosen = labels[:, None]
    # The label's own probability must not win the maximum.
    others = p.scatter(1, chosen, -torch.inf)
    return others.amax(dim=1) - p.gather(1, chosen)[:, 0]


def entropy(logits: Tensor) -> Tensor:
    """Compute how spread the teacher's prediction is, -sum p log p.

    Args:
        logits: (B, C) raw teacher outputs, any float dtype.

    Returns:
        (B,) float64 in [0, log C]; larger is harder.

    Source: uncertainty scores of DeepCore, Guo et al. 2022.
    """
    # log_softmax keeps p log p finite where p underflows to zero.
    log_p = functional.log_softmax(logits.double(), dim=1)
    return -(log_p.exp() * log_p).sum(dim=1)


def confidence(logits: Tensor) -> Tensor:
    """Compute how unsure the teacher is of its best class, 1 - max p.

    Args:
        logits: (B, C) raw teacher outputs, any float dtype.

    Returns:
        (B,) float64 in [0, 1 - 1/C]; larger is harder.

    Source: least confidence of DeepCore, Guo et al. 2022.
    """
    log_p = functional.log_softmax(logits.double(), dim=1)
    # 1 - p as -expm1(log p), exact for a sure teacher.
    return -torch.expm1(log_p.amax(dim=1))


def logit_std(logits: Tensor) -> Tensor:
    """Compute the unbiased standard deviation of the logits, for reshaping; no difficulty.

    Args:
        logits: (B, C) raw teacher outputs, any float dtype, C >= 2.

    Returns:
        (B,) float64, >= 0.

    Source: Chen et al. 2025 (MDSLR).
    """
    return logits.double().std(dim=1, correction=1)


def logit_metrics(logits: Tensor, labels: Tensor | None, features: Tensor) -> dict[str, Tensor]:
    """Compute the metrics that need one row alone: `LOGIT_METRICS`, each (B,) float64.

    Without labels these are `LABEL_FREE_METRICS`, and where the teacher has no classifier, none.

    Raises:
        InvalidValueError: the teacher has fewer than two classes.
    """
    if labels is None and logits.shape[1] == 0:
        return {}
    if logits.shape[1] < 2:
        raise InvalidValueError(
            f"the teacher gives {logits.shape[1]} logit per image; scores need at least 2 classes."
        )
    label_free = {
        "entropy": entropy(logits),
        "confidence": confidence(logits),
        "logit_std": logit_std(logits),
    }
    if labels is None:
        return label_free
    return {
        "loss": loss(logits, labels),
        "el2n": el2n(logits, labels),
        "grand_last": grand_last(logits, labels, features),
        "margin": margin(logits, labels),
        **label_free,
    }
