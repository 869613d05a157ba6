"""The accuracy of a network on a beton."""

import json
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastprune.base.checks import require_one_of
from fastprune.base.errors import ArtifactMismatch, InvalidValueError
from fastprune.base.ranks import Ranks
from fastprune.loading.batch import choose_device
from fastprune.loading.loader import Loader
from fastprune.networks import build_network, load_weights, network_in_metadata, weights_metadata
from fastprune.settings.domains import IMAGENET_MEAN, IMAGENET_STD


@dataclass(frozen=True)
class Evaluation:
    """The accuracy of a network on a set of images.

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


def evaluate_checkpoint(
    checkpoint: str | Path,
    beton: str | Path,
    *,
    network: str | None = None,
    image_size: int | None = None,
    batch_size: int = 256,
    device: str = "auto",
    precision: str = "auto",
) -> Evaluation:
    """Measure a network in a file on every row of a beton, center-cropped.

    Args:
        checkpoint: weights; a student.safetensors of `distill` names its network, image size, mean
            and standard deviation (else ImageNet's are taken).
        beton: the images.
        network: name of the network; None for the one in the checkpoint.
        image_size: side of the crop in pixels; None for the one in the checkpoint.
        batch_size: images per step.
        device: "auto" takes CUDA where it is available.
        precision: "fp32", "bf16", or "auto" for the precision that the checkpoint was validated
            in, float32 where it is not recorded.

    Raises:
        InvalidValueError: network or image size is neither given nor in the checkpoint.
        ArtifactError: the checkpoint cannot be read or does not fit the network.
        ArtifactMismatch: the beton has more classes than the checkpoint, or others.
        BetonError: the beton cannot be read.
    """
    require_one_of("precision", precision, ("auto", "fp32", "bf16"))
    metadata = weights_metadata(checkpoint)
    network = network or network_in_metadata(metadata, checkpoint)
    size = metadata.get("image_size") if image_size is None else image_size
    for name, value in (("--network", network), ("--image-size", size)):
        if value is None:
            raise InvalidValueError(f"{checkpoint} does not record its {name[2:]}; give {name}.")
    assert network is not None
    assert size is not None
    place = choose_device(device)
    # This process alone, also under torchrun: each would print its own share.
    loader = Loader(
        beton,
        train=False,
        batch_size=batch_size,
        image_size=int(size),
        device=place,
        mean=json.loads(metadata["mean"]) if "mean" in metadata else IMAGENET_MEAN,
        std=json.loads(metadata["std"]) if "std" in metadata else IMAGENET_STD,
        distributed=None,
    )
    num_classes = int(metadata.get("num_classes", loader.num_classes))
    if num_classes == 0:
        raise ArtifactMismatch(
            f"{checkpoint} has no classifier: it was trained without labels and gives features. "
            "Train a classifier on them to measure top-1."
        )
    if not loader.beton.has_labels:
        raise ArtifactMismatch(
            f"{beton} was converted without labels, and top-1 needs them. Convert the images with "
            "labels."
        )
    # Fewer is fine: a validation set may lack the last classes.
    if loader.num_classes > num_classes:
        raise ArtifactMismatch(
            f"{checkpoint} knows {num_classes} classes, but {beton} has {loader.num_classes}. "
            "Evaluate on images of the classes that it was trained on."
        )
    # Labels are numbers; without names two betons may number other classes alike.
    names = json.loads(metadata.get("class_names", "null"))
    if names and loader.class_names and names[: loader.num_classes] != list(loader.class_names):
        raise ArtifactMismatch(
            f"the classes of {beton} have other names or another order than the classes of "
            f"{checkpoint}, so its labels have other meanings. Evaluate on images of the classes "
            "that it was trained on, none left out in the middle."
        )
    model = build_network(network, num_classes=num_classes)
    load_weights(model, checkpoint)
    # In the same precision, so that the accuracy is the one that the training reported.
    with autocast(place, metadata.get("precision", "fp32") if precision == "auto" else precision):
        return evaluate(model.to(place), loader)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """Let networks compute in "bf16", or in "fp32"."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[tuple[Tensor, ...]], *, ranks: Ranks | None = None
) -> Evaluation:
    """Run a network over batches, in eval mode and without gradients.

    Args:
        model: maps (B, 3, S, S) to (B, C) logits; its mode is restored afterwards.
        batches: pairs of images (B, 3, S, S) and labels (B,) int64 on the model's device.
        ranks: the processes that share the rows; None for this one alone.

    Returns:
        The shares and the mean loss; counted on the device, fetched once.

    Raises:
        InvalidValueError: the loader is empty.
    """
    # The caller may be in the middle of training.
    was_training = model.training
    model.eval()
    try:
        # In float64: sums of 50,000 losses, and counts, stay exact.
        totals = torch.zeros(4, dtype=torch.float64)
        for images, labels in batches:
            # The first sum moves the totals to the device, where they stay until the end.
            totals = totals.to(labels.device) + _counts(model(images).float(), labels)
    finally:
        model.train(was_training)
    rows, top1, top5, loss = (ranks or Ranks()).all_sum(totals.cpu()).tolist()
    if rows == 0:
        raise InvalidValueError("the loader yields no batch to evaluate.")
    return Evaluation(top1=top1 / rows, top5=top5 / rows, loss=loss / rows, rows=int(rows))


def _counts(logits: Tensor, labels: Tensor) -> Tensor:
    """Rows, hits among one and five guesses, and summed loss: (4,) float64 on the device."""
    # Of fewer than five classes all are guesses, and top-5 is 1.
    guesses = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = guesses == labels.unsqueeze(1)
    loss = functional.cross_entropy(logits, labels, reduction="sum")
    rows = torch.full((), len(labels), device=labels.device)
    return torch.stack([rows, hits[:, 0].sum(), hits.sum(), loss]).double()
