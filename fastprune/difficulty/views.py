"""The views that a pass shows to its teacher, and the loader that makes them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastprune.base.ranks import Ranks
from fastprune.beton.beton import Beton
from fastprune.difficulty.teacher import Teacher
from fastprune.loading.loader import Loader
from fastprune.settings import PassSettings
from fastprune.settings.domains import IMAGENET_MEAN, IMAGENET_STD

# Up to 64 pixels (CIFAR, Tiny ImageNet) networks are built for the images as they are; beyond,
# the literature looks at 224.
_SMALL_SIDE = 64
_LARGE_VIEW = 224


@dataclass(frozen=True)
class View:
    """How a pass looks at a row: size, normalization, and center crop or training views.

    Attributes:
        image_size: side of the square images, in pixels.
        mean: per channel, of pixel values in [0, 1].
        std: per channel, of pixel values in [0, 1].
        count: training views per row, which are averaged; 0 for one center crop.
        seed: of the training views.
        augment: how training views are taken, as for `Loader`; None for its default at this size.
    """

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    count: int
    seed: int
    augment: str | None

    def to_dict(self) -> dict[str, Any]:
        """Describe it in JSON values, for the score table."""
        # A center crop depends on no seed: without the key, an unfinished pass of another seed is
        # resumed.
        chance = {"views": self.count, "seed": self.seed} if self.count else {}
        return {
            "image_size": self.image_size,
            "augment": (self.augment or "train") if self.count else "center",
            **chance,
            "mean": list(self.mean),
            "std": list(self.std),
        }


def choose_view(beton: Beton, teacher: Teacher, settings: PassSettings, *, count: int) -> View:
    """Take the settings' view, else the one the teacher was trained on, else a usual one.

    Args:
        beton: the images: their median shorter side up to 64 pixels, else 224, is the usual size.
        teacher: its checkpoint or published weights may name a view.
        settings: image_size, mean and std, if given; augment and seed.
        count: training views per row; 0 for the center crop.
    """
    published = teacher.published
    size = settings.image_size or (published.image_size if published else teacher.image_size)
    if not size:
        side = int(np.median(np.minimum(beton.widths, beton.heights)))
        size = side if side <= _SMALL_SIDE else _LARGE_VIEW
    return View(
        image_size=size,
        mean=settings.mean or (published.mean if published else IMAGENET_MEAN),
        std=settings.std or (published.std if published else IMAGENET_STD),
        count=count,
        seed=settings.seed,
        augment=settings.augment if count else None,
    )


@dataclass(frozen=True)
class Reading:
    """How a pass reads the beton.

    Attributes:
        beton: the images.
        view: of each row.
        settings: batch size, engine and threads.
        device: that batches are delivered to.
    """

    beton: Beton
    view: View
    settings: PassSettings
    device: torch.device

    def open(self, rows: NDArray[np.int64], ranks: Ranks) -> Loader:
        """Open a loader of this rank's share of these rows, each once and in row order."""
        return Loader(
            self.beton,
            rows,
            batch_size=self.settings.batch_size,
            train=self.view.count > 0,
            backend=self.settings.backend,
            device=self.device,
            image_size=self.view.image_size,
            augment=self.view.augment,
            mean=self.view.mean,
            std=self.view.std,
            order="sequential",
            seed=self.view.seed,
            tail="exact",
            fields=("images", "labels", "rows"),
            num_workers=self.settings.num_workers,
            distributed=(ranks.rank, ranks.world),
        )

    def batches(
        self, rows: NDArray[np.int64], ranks: Ranks
    ) -> Iterator[Iterable[tuple[Tensor, ...]]]:
        """Yield this rank's batches of these rows, each in all of its views."""
        loader = self.open(rows, ranks)

        def epoch(number: int) -> Iterator[tuple[Tensor, ...]]:
            # A generator, so that every epoch begins under its own number.
            loader.set_epoch(number)
            yield from loader

        # View k of a row is its view in epoch k: the epochs run side by side, a batch at a time.
        first, *others = map(epoch, range(max(1, self.view.count)))
        for batch in first:
            # Each view is made on demand: all views of a batch at once would take much memory.
            yield chain([batch], map(next, others))
