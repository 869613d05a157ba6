"""The teacher of a pass: network, weights and identity, and a batch through it."""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastprune.base.errors import InvalidValueError
from fastprune.difficulty.metrics import logit_metrics
from fastprune.networks import (
    FeatureNetwork,
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
from fastprune.settings.score import LOGIT_METRICS

# Metrics stay float64 until the table is made: class std is a mean over many rows.
RECORD = np.dtype([*((name, "<f8") for name in LOGIT_METRICS), ("prediction", "<i8")])

# Called with the rows (B,), the number k and the logits (B, C) float32 of a batch's view k.
Keep = Callable[[Tensor, int, Tensor], None]


@dataclass(frozen=True)
class Teacher:
    """A network that scores.

    Attributes:
        network: maps (B, 3, S, S) images to (B, C) logits.
        num_classes: C; 0 without a classifier, for features alone.
        identity: network, checkpoint, published weights and digest of the weights, for the record.
        image_size: side of the images it was trained on, in pixels; None if unknown.
        published: size, mean and std that its weights were made for, if all are known.
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
    """Build the teacher, or take the given network.

    Args:
        teacher: a network, or the name of one (see `build_network`); None for the network that the
            checkpoint names.
        num_classes: C; None for the teacher's own number, or 0 if that is unknown.
        checkpoint: its weights in a file.
        weights: its published weights, by name; by default, without a checkpoint, the best ones.

    Raises:
        InvalidValueError: the arguments contradict each other, or do not determine the network.
        ArtifactError: the checkpoint cannot be read or does not fit.
    """
    if isinstance(teacher, nn.Module):
        if checkpoint is not None or weights is not None:
            raise InvalidValueError(
                "the teacher is a network, which has its weights; leave the checkpoint and the "
                "weights out, or give its name."
            )
        return _identified(teacher, type(teacher).__name__, num_classes or 0)
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
        raise InvalidValueError(f"{checkpoint} does not name its network. Name it (--teacher).")
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
    return _identified(
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
    return _identified(network, name, num_classes, weights=weights, published=view)


def _identified(
    network: nn.Module,
    name: str,
    num_classes: int,
    *,
    checkpoint: str | None = None,
    weights: str | None = None,
    image_size: int | None = None,
    published: PublishedView | None = None,
) -> Teacher:
    identity = {
        "network": name,
        "num_classes": num_classes,
        "checkpoint": checkpoint,
        "weights": weights,
        # Of the weights themselves: a file can be renamed or overwritten.
        "weights_digest": weights_digest(network),
    }
    return Teacher(network, num_classes, identity, image_size, published)


@dataclass(frozen=True)
class Forward:
    """The teacher, ready to run.

    Attributes:
        network: maps images to (features (B, D), logits (B, C)).
        device: of the network's weights.
        dtype: of its arithmetic: float32, or bfloat16 under autocast.
        width: D.
        num_classes: C; 0 for a teacher without a classifier.
        uses_labels: whether metrics of labels are computed.
    """

    network: nn.Module
    device: torch.device
    dtype: torch.dtype
    width: int
    num_classes: int
    uses_labels: bool = True

    def examine(
        self, views: Iterable[tuple[Tensor, ...]], *, keep: Keep | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[Any]]:
        """Run one batch, in each of its views, and average.

        Args:
            views: per view the images (B, 3, S, S), labels (B,) and rows (B,), on the device. One
                is held at a time.
            keep: called with each view's rows, number and logits.

        Returns:
            Rows (B,), features (B, D), and records (B,) of RECORD: NaN for metrics that need labels
            or logits the teacher does not have.

        Raises:
            InvalidValueError: a feature or a logit is not finite; the first such row is named.
        """
        features, metrics, probabilities = [], [], []
        for number, (images, labels, rows) in enumerate(views):
            hidden, logits = (
                part.float() for part in run_network(self.network, images, self.dtype)
            )
            _refuse_bad_rows(hidden, logits, rows)
            if keep is not None:
                keep(rows, number, logits)
            features.append(hidden)
            metrics.append(logit_metrics(logits, labels if self.uses_labels else None, hidden))
            probabilities.append(logits.softmax(dim=1))
        unknown = torch.full((len(rows),), torch.nan, dtype=torch.float64, device=rows.device)
        columns = [_mean([m.get(name, unknown) for m in metrics]) for name in LOGIT_METRICS]
        predictions = (
            _mean(probabilities).argmax(dim=1) if self.uses_labels else torch.full_like(rows, -1)
        )
        # One transfer for all; classes are exact in float64.
        table = torch.stack([*columns, predictions.double()]).cpu().numpy()
        records = np.empty(len(rows), RECORD)
        for name, column in zip(RECORD.names or (), table, strict=True):
            records[name] = column
        return rows.cpu().numpy(), _mean(features).cpu().numpy(), records


@contextmanager
def ready_forward(
    teacher: Teacher,
    *,
    feature_layer: str | None,
    image_size: int,
    device: torch.device,
    precision: str,
    compile_network: bool,
    uses_labels: bool = True,
) -> Iterator[Forward]:
    """Put a teacher on the device in eval mode, hook its features, and try it on one image.

    On leaving, the hook is removed and every module gets its mode back.

    Raises:
        InvalidValueError: the network returns another number of logits than C, or its features are
            not found.
    """
    network, num_classes = teacher.network, teacher.num_classes
    # Only CUDA devices are asked: torch emulates bfloat16 on CPUs that do not have it.
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    is_half = precision == "bf16" or (precision == "auto" and has_bfloat16)
    dtype = torch.bfloat16 if is_half else torch.float32
    # The caller's network is borrowed: it must not come back in eval mode.
    modes = [(module, module.training) for module in network.modules()]
    network.to(device).to(memory_format=torch.channels_last).eval()
    try:
        with FeatureNetwork(network, num_classes=num_classes, feature_layer=feature_layer) as tap:
            # One image shows the widths and finds a hook that does not fire, before hours of work.
            image = torch.zeros(1, 3, image_size, image_size, device=device)
            features, logits = run_network(tap, image, dtype)
            if logits.ndim != 2 or logits.shape[1] != num_classes:
                raise InvalidValueError(
                    f"the teacher {type(network).__name__} returned logits of shape "
                    f"{tuple(logits.shape)} for one image, but {num_classes:,} classes are wanted. "
                    "Take a teacher of these classes, or tell their number (--teacher-classes)."
                )
            compiled: Any = torch.compile(tap) if compile_network else tap
            yield Forward(compiled, device, dtype, features.shape[1], num_classes, uses_labels)
    finally:
        for module, was_training in modes:
            module.training = was_training


@torch.inference_mode()
def run_network(network: nn.Module, images: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Run a batch, under autocast if the dtype is not float32: (features, logits)."""
    with torch.autocast(images.device.type, dtype=dtype, enabled=dtype != torch.float32):
        features, logits = network(images)
    return features, logits


def _mean(views: list[Tensor]) -> Tensor:
    return torch.stack(views).mean(dim=0)


def _refuse_bad_rows(features: Tensor, logits: Tensor, rows: Tensor) -> None:
    is_bad = ~(features.isfinite().all(dim=1) & logits.isfinite().all(dim=1))
    if is_bad.any():
        row = int(rows[is_bad].min())
        raise InvalidValueError(
            f"the teacher returned NaN or infinity for row {row:,}. Score in float32 "
            "(--precision fp32), and check the teacher's weights."
        )
