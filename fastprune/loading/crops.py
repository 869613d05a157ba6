"""Which part of an image a batch shows: a pure function of (seed, slot, row, k).

Random numbers come from a counter-based hash without state, so that a view does not depend on
batch size, worker count, rank, backend, or where a run was resumed. Every engine gets its boxes
from here and only carries them out.
"""

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numba import njit
from numpy.typing import NDArray

from fastprune.base import random_streams as splitmix
from fastprune.base.compiled import cached
from fastprune.base.random_streams import GOLDEN, mix64
from fastprune.beton.beton import Beton
from fastprune.decoding import views as columns
from fastprune.decoding.views import FLIP, HEIGHT, LEFT, SHIFT_DOWN, SHIFT_RIGHT, TOP, WIDTH

_LOG = logging.getLogger(__name__)

AUGMENTS = ("rrc", "pad_crop", "center", "none")

# Up to this side, in pixels, images are CIFAR-like: shifted by a border, not cropped at random.
_MAX_SMALL_SIZE = 64
# As many as torchvision's RandomResizedCrop makes before it takes the central box.
_TRIES = 10
# CIFAR at 224 pixels is sevenfold. Tiny ImageNet at 224, which some do on purpose, is not reported.
_MOST_ENLARGED = 4
_ULP = 2.0**-53  # float64 has 53 bits: the top 53 of a draw times this lie evenly in [0, 1)
_RRC, _PAD_CROP, _CENTER = range(3)
_KINDS = {"rrc": _RRC, "pad_crop": _PAD_CROP, "center": _CENTER}


@dataclass(frozen=True)
class CropPolicy:
    """How views are drawn.

    Attributes:
        kind: "rrc" (a random box, resized, flipped half the time), "pad_crop" (the whole image,
            resized, shifted by up to `padding` over a black border, flipped half the time),
            "center" (the central square) or "none" (the whole image).
        scale: bounds of the random box's share of the image's area.
        ratio: bounds of the random box's width / height.
        padding: largest shift in pixels of the output.
        center_ratio: side of the central square / the image's shorter side.
    """

    kind: str
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    padding: int = 4
    center_ratio: float = 1.0

    @classmethod
    def make(cls, kind: str | None, *, image_size: int, train: bool) -> "CropPolicy":
        """Make the usual policy for an output size: what torchvision's and CIFAR's references do.

        Args:
            kind: one of `AUGMENTS`; None for "rrc" (large) or "pad_crop" (small) in training,
                "center" in evaluation.
            image_size: S, side of the output in pixels.
            train: whether views are for training.
        """
        small = image_size <= _MAX_SMALL_SIZE
        if kind is None:
            kind = ("pad_crop" if small else "rrc") if train else "center"
        # 4 pixels of 32, and the central 224 of 256, are what CIFAR's and ImageNet's papers used.
        return cls(kind, padding=max(1, image_size // 8), center_ratio=1.0 if small else 224 / 256)

    def views(
        self,
        rows: NDArray[np.int64],
        widths: NDArray[np.int64],
        heights: NDArray[np.int64],
        *,
        seed: int,
        slot: int,
        k: int = 0,
    ) -> NDArray[np.int32]:
        """Draw one view of each row.

        Args:
            rows: (B,) int64.
            widths: (B,) int64 in pixels.
            heights: (B,) int64 in pixels.
            seed: of the views, in [0, 2**63).
            slot: which of a row's views, in [0, 2**63); the epoch where every epoch has new views.
            k: which view of the row within the slot.

        Returns:
            (B, 7) int32, see `decoding.views`.
        """
        views = np.zeros((len(rows), 7), np.int32)
        views[:, HEIGHT], views[:, WIDTH] = heights, widths
        if self.kind != "none":
            key = np.uint64(_slot_key(np.uint64(seed), np.uint64(slot), np.uint64(k)))
            settings = (*self.scale, *self.ratio, float(self.padding), self.center_ratio)
            _draw(views, rows, key, _KINDS[self.kind], settings)
        return views


_mix = njit(nogil=True)(mix64)
_compiled = cached(Path(__file__), Path(splitmix.__file__), Path(columns.__file__), nogil=True)


@njit(nogil=True)
def _absorb(key, value):  # type: ignore[no-untyped-def]
    """Extend a key by a value."""
    # An odd factor maps values one to one, and spreads small ones over all 64 bits. Both numbers
    # are part of what every view is: another one would change all training runs.
    return _mix((key ^ (value * np.uint64(0xBF58476D1CE4E5B9))) + GOLDEN)


@_compiled
def _slot_key(seed, slot, k):  # type: ignore[no-untyped-def]
    """Mix what all rows of a slot's k-th views share."""
    return _absorb(_absorb(_absorb(np.uint64(0), seed), slot), k)


@njit(nogil=True)
def _uniform(key, counter, low, high):  # type: ignore[no-untyped-def]
    """Return the draw number `counter` under a key: float64 in [low, high)."""
    unit = np.float64(_absorb(key, np.uint64(counter)) >> np.uint64(11)) * _ULP
    return low + unit * (high - low)


@_compiled
def _draw(views, rows, key, kind, settings):  # type: ignore[no-untyped-def]
    """Fill the (B, 7) views, which hold the whole image as box on entry."""
    scale_low, scale_high, ratio_low, ratio_high, padding, center_ratio = settings
    for i in range(len(rows)):
        row_key = _absorb(key, np.uint64(rows[i]))
        view = views[i]
        if kind == _CENTER:
            _center_box(view, center_ratio)
            continue
        # Draw 0 is the flip's in either kind; boxes and shifts count from 1.
        if kind == _RRC:
            _random_box(view, row_key, scale_low, scale_high, ratio_low, ratio_high)
        else:
            view[SHIFT_DOWN] = int(_uniform(row_key, 1, 0.0, 2 * padding + 1)) - int(padding)
            view[SHIFT_RIGHT] = int(_uniform(row_key, 2, 0.0, 2 * padding + 1)) - int(padding)
        view[FLIP] = int(_uniform(row_key, 0, 0.0, 2.0))


@njit(nogil=True)
def _random_box(view, key, scale_low, scale_high, ratio_low, ratio_high):  # type: ignore[no-untyped-def]
    """Draw as torchvision's RandomResizedCrop.get_params: tries, then the largest central box."""
    height, width = view[HEIGHT], view[WIDTH]
    for attempt in range(_TRIES):
        first = 1 + 4 * attempt  # four draws a try
        area = height * width * _uniform(key, first, scale_low, scale_high)
        aspect = math.exp(_uniform(key, first + 1, math.log(ratio_low), math.log(ratio_high)))
        box_width = round(math.sqrt(area * aspect))
        box_height = round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            view[TOP] = int(_uniform(key, first + 2, 0.0, height - box_height + 1))
            view[LEFT] = int(_uniform(key, first + 3, 0.0, width - box_width + 1))
            view[HEIGHT], view[WIDTH] = box_height, box_width
            return
    box_height, box_width = height, width
    if width < height * ratio_low:
        box_height = round(width / ratio_low)
    elif width > height * ratio_high:
        box_width = round(height * ratio_high)
    _set_central(view, box_height, box_width)


@njit(nogil=True)
def _center_box(view, center_ratio):  # type: ignore[no-untyped-def]
    """Set the central square."""
    side = max(1, int(center_ratio * min(view[HEIGHT], view[WIDTH])))
    _set_central(view, side, side)


@njit(nogil=True)
def _set_central(view, box_height, box_width):  # type: ignore[no-untyped-def]
    """Put a box of this size into the middle."""
    view[TOP] = (view[HEIGHT] - box_height) // 2
    view[LEFT] = (view[WIDTH] - box_width) // 2
    view[HEIGHT], view[WIDTH] = box_height, box_width


def warn_of_enlarging(beton: Beton, image_size: int) -> None:
    """Log a warning where views are far larger than the images: ImageNet's default on CIFAR."""
    side = float(np.median(np.minimum(beton.widths, beton.heights)))
    # A row that was skipped in the conversion has no size.
    if side and image_size > _MOST_ENLARGED * side:
        _LOG.warning(
            "image_size is %d, but half of the images in %s are at most %d pixels high or wide. "
            "Their own size is usual: image_size=%d",
            *(image_size, beton.path, side, side),
        )
