"""How good a network is on a beton."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastprune.errors import InvalidValueError


@dataclass(frozen=True)
class Evaluation:
    """What a network reached on a set of images.

    Attributes:
        top1: share in [0, 1] of rows whose label is the network's first guess.
        top5: share in [0, 1] of rows whose label is among its first five (or all, if fewer).
        loss: mean cross-entropy.
        rows: images evaluated.
    """

    top1: float
    top5: float
    loss: float
    rows: int


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Evaluation:
    """Run a network over batches, in eval mode and without gradients.

    Args:
        model: maps (B, 3, S, S) to (B, C) logits; its mode is restored afterwards.
        batches: pairs of images (B, 3, S, S) and labels (B,) int64 on the model's device.

    Returns:
        The shares and the mean loss; counted on the device, fetched once.

    Raises:
        InvalidValueError: there is no batch.
    """
    was_training = model.training
    model.eval()
    try:
        totals: Tensor | None = None
        for images, labels in batches:
            counts = _counts(model(images).float(), labels)
            totals = counts if totals is None else totals + counts
    finally:
        model.train(was_training)
    if totals is None:
        raise InvalidValueError("there is no batch to evaluate; the loader yields none.")
    rows, top1, top5, loss = totals.tolist()
    return Evaluation(top1=top1 / rows, top5=top5 / rows, loss=loss / rows, rows=int(rows))


def _counts(logits: Tensor, labels: Tensor) -> Tensor:
    """Rows, hits among one and five guesses, and summed loss: (4,) float64 on the device."""
    guesses = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = guesses == labels.unsqueeze(1)
    loss = functional.cross_entropy(logits, labels, reduction="sum")
    rows = torch.tensor(len(labels), device=labels.device)
    return torch.stack([rows, hits[:, 0].sum(), hits.sum(), loss]).double()
