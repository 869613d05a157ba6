"""The bar of a run, and the time that goes into waiting for its batches."""

import time
from collections.abc import Iterator

from torch import Tensor

from fastprune.distillation.clocks import Clocks
from fastprune.distillation.growth import GrowingLoader
from fastprune.distributed import Ranks
from fastprune.loading.loader import Loader
from fastprune.progress import track


class Watch:
    """Hands out the batches of each pass, and shows how far the run has come."""

    def __init__(self, *, epochs: int, ranks: Ranks, clocks: Clocks) -> None:
        """Begin with no pass.

        Args:
            epochs: passes of the run.
            ranks: the first process shows the bar.
            clocks: told of the waiting.
        """
        self._epochs = epochs
        self._ranks = ranks
        self._clocks = clocks
        self._began = time.monotonic()
        self._steps = self._steps_left = 0

    def over(
        self, loader: Loader | GrowingLoader, *, epoch: int, first: int
    ) -> Iterator[tuple[Tensor, ...]]:
        """The batches of a pass that are left.

        Args:
            loader: gives them.
            epoch: counted from 0.
            first: batches of it that were done before.
        """
        self._steps_left = len(loader) * (self._epochs - epoch) - first
        batches = self._timed(loader)
        if not self._ranks.is_first:
            return batches
        images_per_step = loader.batch_size * self._ranks.world
        return track(
            batches,
            description=f"epoch {epoch + 1}/{self._epochs}",
            total=len(loader) * images_per_step,
            done=first * images_per_step,
            unit="images",
            step=images_per_step,
            note=self._outlook,
        )

    def _timed(self, loader: Loader | GrowingLoader) -> Iterator[tuple[Tensor, ...]]:
        """Batches; the time until each arrives is waiting time."""
        asked = time.perf_counter()
        for batch in loader:
            self._clocks.add_wait(time.perf_counter() - asked)
            yield batch
            self._steps += 1
            self._steps_left -= 1
            asked = time.perf_counter()
        self._clocks.add_wait(time.perf_counter() - asked)

    def _outlook(self) -> str:
        """How much of the time goes into waiting, and when the run will be over."""
        minutes_per_step = (time.monotonic() - self._began) / 60 / max(self._steps, 1)
        minutes = self._steps_left * minutes_per_step
        return f"{self._clocks.waiting_share():.0%} waiting, run {minutes:,.0f} min left"
