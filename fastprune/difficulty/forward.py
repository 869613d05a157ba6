"""A batch through the teacher: features, and the metrics of its logits."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastprune.base.errors import InvalidValueError
from fastprune.difficulty.metrics import logit_metrics
from fastprune.networks import FeatureNetwork
from fastprune.settings.score import LOGIT_METRICS

PRECISIONS = ("auto", "fp32", "bf16")
# The names of earlier versions; recipes never had them.
_LONG_NAMES = {"float32": "fp32", "bfloat16": "bf16"}
# One float64 tensor carries all of them through a gather: rows beyond 2**53 do not occur.
COLUMNS = (*LOGIT_METRICS, "prediction", "row")


# What is done with the logits (B, C) float32 of a batch's rows (B,) in view number k.
Keep = Callable[[Tensor, int, Tensor], None]


@dataclass(frozen=True)
class Forward:
    """The teacher, ready to run.

    Attributes:
        network: maps images to (features (B, D), logits (B, C)).
        device: of the network's weights.
        dtype: of its arithmetic: float32, or bfloat16 under autocast.
        width: D.
        num_classes: C; 0 for a teacher without a classifier.
        uses_labels: whether rows are measured by their labels too.
    """

    network: nn.Module
    device: torch.device
    dtype: torch.dtype
    width: int
    num_classes: int
    uses_labels: bool = True

    def examine(
        self, views: Iterable[tuple[Tensor, ...]], *, keep: Keep | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run one batch, in each of its views, and average.

        Args:
            views: per view the images (B, 3, S, S), labels (B,) and rows (B,), on the device. One
                is held at a time.
            keep: given each view's rows, number and logits.

        Returns:
            features (B, D) float32 and COLUMNS (B, len(COLUMNS)) float64, on the CPU: NaN for
            metrics that need labels where none are used, or logits where there are none.

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
        columns += [predictions.double(), rows.double()]
        return _mean(features).cpu(), torch.stack(columns, dim=1).cpu()


@contextmanager
def ready_forward(
    network: nn.Module,
    *,
    num_classes: int,
    feature_layer: str | None,
    image_size: int,
    device: torch.device,
    precision: str,
    compile_network: bool,
    uses_labels: bool = True,
) -> Iterator[Forward]:
    """Put a network on the device in eval mode, hook its features, and try it on one image.

    On leaving, the hook is removed and every module gets its mode back.

    Raises:
        InvalidValueError: the network gives another number of logits than C, its features are not
            found, or there is no such precision.
    """
    precision = _LONG_NAMES.get(precision, precision)
    if precision not in PRECISIONS:
        raise InvalidValueError(f"precision {precision!r} is not one of {', '.join(PRECISIONS)}.")
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
                    "Take a teacher of these classes, or say how many it has (--teacher-classes)."
                )
            compiled: Any = torch.compile(tap) if compile_network else tap
            yield Forward(compiled, device, dtype, features.shape[1], num_classes, uses_labels)
    finally:
        for module, was_training in modes:
            module.training = was_training


@torch.inference_mode()
def run_network(network: nn.Module, images: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Run a batch, under autocast where the dtype is not float32: (features, logits)."""
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
