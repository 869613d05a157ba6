"""What a pass looks at in every row."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastprune.beton.reader import Beton
from fastprune.difficulty.network import Teacher
from fastprune.errors import InvalidValueError
from fastprune.loading.pixels import IMAGENET_MEAN, IMAGENET_STD

Channels = tuple[float, float, float]

_SMALL_SIDE = 64
_LARGE_VIEW = 224


@dataclass(frozen=True)
class View:
    """The images that the teacher sees.

    Attributes:
        image_size: side of the square images, in pixels.
        mean: per channel, of pixel values in [0, 1].
        std: per channel, of pixel values in [0, 1].
        count: augmented views per row, which are averaged; 0 for one centre crop.
        seed: of the augmented views.
    """

    image_size: int
    mean: Channels
    std: Channels
    count: int = 0
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """For the record, as JSON values."""
        chance = {"views": self.count, "seed": self.seed} if self.count else {}
        return {
            "image_size": self.image_size,
            "augment": "train" if self.count else "center",
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
    views: int | None,
    seed: int,
) -> View:
    """What was asked for, else what the teacher was trained on, else what suits the images.

    Args:
        beton: the images; without a better word, their median shorter side where that is at most
            64 pixels, and 224 above.
        teacher: what its checkpoint or its published weights tell.
        image_size: side of the images in pixels, or None.
        mean: per channel, or None.
        std: per channel, or None.
        views: augmented views, or None for the centre crop.
        seed: of the augmented views.

    Raises:
        InvalidValueError: fewer than one pixel, or fewer than one view.
    """
    if views is not None and views < 1:
        raise InvalidValueError(f"views ({views}) must be at least 1; leave it out for the centre.")
    if image_size is not None and image_size < 1:
        raise InvalidValueError(f"image_size ({image_size}) must be at least 1 pixel.")
    published = teacher.published
    told_size = published.image_size if published else teacher.image_size
    return View(
        image_size=image_size or told_size or _suitable_size(beton),
        mean=mean or (published.mean if published else IMAGENET_MEAN),
        std=std or (published.std if published else IMAGENET_STD),
        count=views or 0,
        seed=seed,
    )


def _suitable_size(beton: Beton) -> int:
    """The images' own size where they are small, ImageNet's view else."""
    side = int(np.median(np.minimum(beton.widths, beton.heights)))
    return side if side <= _SMALL_SIDE else _LARGE_VIEW
