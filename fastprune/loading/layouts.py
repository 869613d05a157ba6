"""How a batch is put together: the tuples that other codebases unpack."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastprune.errors import InvalidValueError

LAYOUTS = ("xy", "xyi", "xy_supp", "xyi_contrast", "two_view")

Transform = Callable[[torch.Tensor], torch.Tensor]


class ContrastRows:
    """Draws the rows that contrastive representation distillation compares a row with.

    The first is the row itself, the others are kept rows of other classes, drawn with replacement;
    a pure function of (seed, epoch, row).
    """

    def __init__(
        self, rows: NDArray[np.int64], labels: NDArray[np.int64], *, num_negatives: int, seed: int
    ):
        """Sort the rows by class.

        Args:
            rows: (K,) int64, the kept rows.
            labels: (K,) int64, their labels.
            num_negatives: rows of other classes to draw for each row.
            seed: in [0, 2**63).

        Raises:
            InvalidValueError: all rows are of one class.
        """
        by_class = np.argsort(labels, kind="stable")
        self._rows = rows[by_class]
        classes, self._start, self._count = np.unique(
            labels[by_class], return_index=True, return_counts=True
        )
        if len(classes) < 2:
            raise InvalidValueError(
                'layout="xyi_contrast" needs kept rows of at least two classes, but all are of '
                f"class {classes[0]}. Keep more classes, or use another layout."
            )
        self._classes = classes
        self._num_negatives = num_negatives
        self._seed = seed

    def draw(
        self, rows: NDArray[np.int64], labels: NDArray[np.int64], *, epoch: int
    ) -> NDArray[np.int64]:
        """The contrast rows of a batch: (B, 1 + num_negatives) int64."""
        drawn = np.empty((len(rows), 1 + self._num_negatives), np.int64)
        drawn[:, 0] = rows
        which = np.searchsorted(self._classes, labels)
        for i, c in enumerate(which):
            start, count = self._start[c], self._count[c]
            raw = _stream(self._seed, int(rows[i]), epoch).random_raw(self._num_negatives)
            others = np.uint64(len(self._rows) - count)
            position = ((raw >> np.uint64(32)) * others >> np.uint64(32)).astype(np.int64)
            drawn[i, 1:] = self._rows[position + count * (position >= start)]
        return drawn


def transformed(
    pixels: torch.Tensor, transform: Transform, rows: NDArray[np.int64], *, seed: int, epoch: int
) -> torch.Tensor:
    """Apply a random transform to each image, seeded by (seed, epoch, row).

    Args:
        pixels: (B, S, S, 3) uint8, on any device.
        transform: from (3, S, S) uint8 to (3, S, S) uint8, drawing from torch's generators, such as
            `torchvision.transforms.v2.RandAugment()`.
        rows: (B,) int64.
        seed: in [0, 2**63).
        epoch: in [0, 2**63).

    Returns:
        (B, S, S, 3) uint8 on the same device.
    """
    devices = [pixels.device] if pixels.is_cuda else []
    images = []
    with torch.random.fork_rng(devices):
        for row, image in zip(rows, pixels, strict=True):
            number = int(_stream(seed, int(row), epoch).random_raw() >> np.uint64(1))
            # Not torch.manual_seed, which reseeds every GPU, also those whose state is not kept.
            torch.default_generator.manual_seed(number)
            if pixels.is_cuda:
                with torch.cuda.device(pixels.device):
                    torch.cuda.manual_seed(number)
            images.append(transform(image.permute(2, 0, 1)))
    return torch.stack(images).permute(0, 2, 3, 1).contiguous()


def arranged(
    layout: str,
    images: torch.Tensor | tuple[torch.Tensor, ...],
    labels: torch.Tensor,
    rows: torch.Tensor,
    contrast: torch.Tensor | None = None,
) -> tuple[Any, ...]:
    """The tuple of a layout.

    Returns:
        "xy": (images, labels); "xyi": (images, labels, rows); "xy_supp": (images, labels,
        {"rows": rows}); "xyi_contrast": (images, labels, rows, contrast rows); "two_view":
        ((images, images), labels, rows).
    """
    if layout == "xy":
        return images, labels
    if layout == "xy_supp":
        return images, labels, {"rows": rows}
    if layout == "xyi_contrast":
        return images, labels, rows, contrast
    return images, labels, rows


def _stream(seed: int, row: int, epoch: int) -> np.random.Philox:
    """Random numbers that no other (seed, row, epoch) shares; disjoint from the orders' streams."""
    counter = np.array([0, 0, epoch, 1], np.uint64)
    return np.random.Philox(key=np.array([seed, row], np.uint64), counter=counter)
