"""How a pass of a teacher reads a beton."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastprune.base.ranks import Ranks
from fastprune.beton.beton import Beton
from fastprune.difficulty.network import ViewSpec
from fastprune.loading.loader import Loader


@dataclass(frozen=True)
class Reading:
    """How the pass reads the beton.

    Attributes:
        beton: the images.
        view: size, normalization and number of views.
        batch_size: rows per step and rank.
        device: that batches are delivered to.
        backend: the loader's engine.
        num_workers: decoding threads; None for one per usable CPU.
    """

    beton: Beton
    view: ViewSpec
    batch_size: int
    device: torch.device
    backend: str
    num_workers: int | None

    def open(self, rows: NDArray[np.int64], ranks: Ranks) -> Loader:
        """Open a loader of this rank's share of these rows, each once and in row order."""
        return Loader(
            self.beton.path,
            rows,
            batch_size=self.batch_size,
            train=self.view.count > 0,
            backend=self.backend,
            device=self.device,
            image_size=self.view.image_size,
            augment=self.view.augment,
            mean=self.view.mean,
            std=self.view.std,
            order="sequential",
            seed=self.view.seed,
            tail="exact",
            fields=("images", "labels", "rows"),
            num_workers=self.num_workers,
            distributed=(ranks.rank, ranks.world),
        )

    def batches(self, start: int, ranks: Ranks) -> Iterator[Iterable[tuple[Tensor, ...]]]:
        """Yield this rank's batches from row `start` on, each in all of its views."""
        loader = self.open(np.arange(start, self.beton.num_rows), ranks)

        def epoch(number: int) -> Iterator[tuple[Tensor, ...]]:
            # A generator, so that every epoch begins under its own number.
            loader.set_epoch(number)
            yield from loader

        # View k of a row is its view in epoch k: the epochs run side by side, a batch at a time.
        first, *others = map(epoch, range(max(1, self.view.count)))
        for batch in first:
            # A view is made when it is asked for: all views of a batch at once take much memory.
            yield chain([batch], map(next, others))
