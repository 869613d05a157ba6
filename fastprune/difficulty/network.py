"""The teacher of a pass: a network with its weights, and what identifies it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fastprune.errors import InvalidValueError
from fastprune.networks import (
    PublishedView,
    build_network,
    load_weights,
    published_view,
    published_weights,
    told_network,
    weights_digest,
    weights_metadata,
)


@dataclass(frozen=True)
class Teacher:
    """A network that scores.

    Attributes:
        network: maps (B, 3, S, S) images to (B, C) logits.
        num_classes: C.
        identity: network, checkpoint, published weights and digest of the weights, for the record.
        image_size: side of the images it was trained on, in pixels; None where nothing tells.
        published: the view that its weights were made for, where they tell all of it.
    """

    network: nn.Module
    num_classes: int
    identity: dict[str, Any]
    image_size: int | None = None
    published: PublishedView | None = None


def make_teacher(
    teacher: str | nn.Module | None,
    *,
    num_classes: int,
    checkpoint: str | Path | None = None,
    weights: str | None = None,
) -> Teacher:
    """Build the teacher, or take the network that is given.

    Args:
        teacher: a network, or the name of one (see `build_network`); None for the network that the
            checkpoint names.
        num_classes: C.
        checkpoint: its weights in a file.
        weights: its published weights, by name; by default the best ones, without a checkpoint.

    Raises:
        InvalidValueError: the arguments contradict each other, or do not say which network.
        ArtifactError: the checkpoint cannot be read or does not fit.
    """
    if isinstance(teacher, nn.Module):
        if checkpoint is not None or weights is not None:
            raise InvalidValueError(
                "the teacher is a network, which has its weights; leave the checkpoint and the "
                "weights out, or give its name."
            )
        return _described(teacher, type(teacher).__name__, num_classes)
    if checkpoint is None:
        return _published(teacher, weights, num_classes)
    if weights is not None:
        raise InvalidValueError(
            f"both a checkpoint ({checkpoint}) and published weights ({weights}) were given for "
            f"the teacher {teacher}. Leave one of them out."
        )
    told = weights_metadata(checkpoint)
    name = teacher or told_network(told, checkpoint)
    if name is None:
        raise InvalidValueError(
            f"{checkpoint} does not tell which network it is of. Name it (--teacher)."
        )
    network = build_network(name, num_classes=num_classes)
    load_weights(network, checkpoint)
    size = told.get("image_size")
    return _described(
        network,
        name,
        num_classes,
        checkpoint=Path(checkpoint).name,
        image_size=None if size is None else int(size),
        published=_told_view(told),
    )


def _told_view(told: dict[str, str]) -> PublishedView | None:
    """The view that the header of a file tells, as the students of `distill` do."""
    if not {"image_size", "mean", "std"} <= told.keys():
        return None
    mean, std = (json.loads(told[name]) for name in ("mean", "std"))
    return PublishedView(int(told["image_size"]), tuple(mean), tuple(std))


def _published(name: str | None, weights: str | None, num_classes: int) -> Teacher:
    """A teacher with published weights, or a factory's with its own."""
    if name is None:
        raise InvalidValueError(
            "there is no teacher. Name one (--teacher resnet50), or give a checkpoint "
            "(--teacher-checkpoint)."
        )
    weights = weights or published_weights(name)
    network = build_network(name, num_classes=num_classes, weights=weights)
    view = None if weights is None else published_view(name, weights)
    return _described(network, name, num_classes, weights=weights, published=view)


def _described(
    network: nn.Module,
    name: str,
    num_classes: int,
    *,
    checkpoint: str | None = None,
    weights: str | None = None,
    image_size: int | None = None,
    published: PublishedView | None = None,
) -> Teacher:
    """The record of a network, with the digest of its weights."""
    identity = {
        "network": name,
        "num_classes": num_classes,
        "checkpoint": checkpoint,
        "weights": weights,
        "weights_digest": weights_digest(network),
    }
    return Teacher(network, num_classes, identity, image_size, published)
