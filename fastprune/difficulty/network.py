"""The teacher of a pass: its network and weights, its identity, and the images it is shown."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fastprune.base.errors import InvalidValueError
from fastprune.beton.beton import Beton
from fastprune.networks import (
    PublishedView,
    build_network,
    load_weights,
    network_in_metadata,
    own_classes,
    published_view,
    published_weights,
    weights_digest,
    weights_metadata,
)
from fastprune.settings.domains import IMAGENET_MEAN, IMAGENET_STD

Channels = tuple[float, float, float]

# Up to 64 pixels (CIFAR, Tiny ImageNet) networks are built for the images as they are; beyond,
# the literature looks at 224.
_SMALL_SIDE = 64
_LARGE_VIEW = 224


@dataclass(frozen=True)
class Teacher:
    """A network that scores.

    Attributes:
        network: maps (B, 3, S, S) images to (B, C) logits.
        num_classes: C; 0 where it has no classifier and gives features.
        identity: network, checkpoint, published weights and digest of the weights, for the record.
        image_size: side of the images it was trained on, in pixels; None where unknown.
        published: size, mean and std that its weights were made for, where all are known.
    """

    network: nn.Module
    num_classes: int
    identity: dict[str, Any]
    image_size: int | None = None
    published: PublishedView | None = None


def make_teacher(
    teacher: str | nn.Module | None,
    *,
    num_classes: int | None,
    checkpoint: str | Path | None = None,
    weights: str | None = None,
) -> Teacher:
    """Build the teacher, or take the network that is given.

    Args:
        teacher: a network, or the name of one (see `build_network`); None for the network that the
            checkpoint names.
        num_classes: C; None for as many as it knows by itself, and if nothing says, for features
            alone.
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
        return _described(teacher, type(teacher).__name__, num_classes or 0)
    if checkpoint is None:
        return _published(teacher, weights, num_classes)
    if weights is not None:
        raise InvalidValueError(
            f"both a checkpoint ({checkpoint}) and published weights ({weights}) were given for "
            f"the teacher {teacher}. Leave one of them out."
        )
    metadata = weights_metadata(checkpoint)
    name = teacher or network_in_metadata(metadata, checkpoint)
    if name is None:
        raise InvalidValueError(
            f"{checkpoint} does not say which network it is of. Name it (--teacher)."
        )
    if num_classes is None:
        num_classes = own_classes(name, checkpoint=checkpoint, weights=None)
    network = build_network(name, num_classes=num_classes)
    load_weights(network, checkpoint)
    size = metadata.get("image_size")
    published = None
    # Students of `distill` carry all three in their safetensors header.
    if {"image_size", "mean", "std"} <= metadata.keys():
        mean, std = (tuple(json.loads(metadata[name])) for name in ("mean", "std"))
        published = PublishedView(int(metadata["image_size"]), mean, std)
    return _described(
        network,
        name,
        num_classes,
        checkpoint=Path(checkpoint).name,
        image_size=None if size is None else int(size),
        published=published,
    )


def _published(name: str | None, weights: str | None, num_classes: int | None) -> Teacher:
    """Build a teacher with published weights, or call a factory, which brings its own."""
    if name is None:
        raise InvalidValueError(
            "there is no teacher. Name one (--teacher resnet50), or give a checkpoint "
            "(--teacher-checkpoint)."
        )
    weights = weights or published_weights(name)
    if num_classes is None:
        num_classes = own_classes(name, checkpoint=None, weights=weights)
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
    # The digest names the weights themselves: a file can be renamed or overwritten.
    identity = {
        "network": name,
        "num_classes": num_classes,
        "checkpoint": checkpoint,
        "weights": weights,
        "weights_digest": weights_digest(network),
    }
    return Teacher(network, num_classes, identity, image_size, published)


@dataclass(frozen=True)
class ViewSpec:
    """How a pass looks at a row: size, normalization, and center crop or augmented views.

    Attributes:
        image_size: side of the square images, in pixels.
        mean: per channel, of pixel values in [0, 1].
        std: per channel, of pixel values in [0, 1].
        count: augmented views per row, which are averaged; 0 for one center crop.
        seed: of the augmented views.
        augment: how augmented views are taken, as for `Loader`; None for its default at this size.
    """

    image_size: int
    mean: Channels
    std: Channels
    count: int = 0
    seed: int = 0
    augment: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Describe it in JSON values, for the score table."""
        # A center crop depends on no seed; without these keys, an unfinished pass of another seed
        # is resumed rather than started anew.
        chance = {"views": self.count, "seed": self.seed} if self.count else {}
        return {
            "image_size": self.image_size,
            "augment": (self.augment or "train") if self.count else "center",
            **chance,
            "mean": list(self.mean),
            "std": list(self.std),
        }


def choose_view(
    beton: Beton,
    teacher: Teacher,
    *,
    image_size: int | None,
    mean: Channels | None,
    std: Channels | None,
    views: int,
    seed: int,
    augment: str | None = None,
) -> ViewSpec:
    """Take the view that is asked for, else the one the teacher was trained on, else a usual one.

    Args:
        beton: the images; where nothing else is known, their median shorter side up to 64
            pixels, and 224 above.
        teacher: its checkpoint or published weights may name a view.
        image_size: side of the images in pixels, or None.
        mean: per channel, or None.
        std: per channel, or None.
        views: number of augmented views; 0 for the center crop.
        seed: of the augmented views.
        augment: how augmented views are taken, or None.
    """
    published = teacher.published
    size = image_size or (published.image_size if published else teacher.image_size)
    if not size:
        side = int(np.median(np.minimum(beton.widths, beton.heights)))
        size = side if side <= _SMALL_SIDE else _LARGE_VIEW
    return ViewSpec(
        image_size=size,
        mean=mean or (published.mean if published else IMAGENET_MEAN),
        std=std or (published.std if published else IMAGENET_STD),
        count=views,
        seed=seed,
        augment=augment if views else None,
    )
