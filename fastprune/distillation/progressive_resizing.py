"""Progressive resizing: small images first, the full size at the end."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from fastprune.beton.beton import RowsLike
from fastprune.loading.loader import Loader
from fastprune.settings import DataSettings

logger = logging.getLogger(__name__)


def image_sizes(first: int, last: int, *, step: int) -> tuple[int, ...]:
    """The sizes that a run goes through.

    >>> image_sizes(128, 192, step=32)
    (128, 160, 192)
    >>> image_sizes(128, 176, step=32)
    (128, 160, 176)
    """
    return (*range(first, last, step), last)


def training_sizes(data: DataSettings) -> tuple[int, ...]:
    """The sides of the images that a run goes through, in pixels and in their order."""
    first = data.image_size if data.first_image_size is None else data.first_image_size
    return image_sizes(first, data.image_size, step=data.image_size_step)


def size_at(epoch: int, sizes: tuple[int, ...], *, epochs: int) -> int:
    """The side of the images of an epoch, in pixels: each size has an equal part of the epochs.

    The last epoch always has the last size.

    Args:
        epoch: in [0, epochs).
        sizes: in their order.
        epochs: of the run.

    >>> [size_at(epoch, (128, 160, 192), epochs=8) for epoch in range(8)]
    [128, 128, 160, 160, 160, 192, 192, 192]
    """
    return sizes[-1 - (epochs - 1 - epoch) * len(sizes) // epochs]


class GrowingLoader:
    """A loader whose images grow with the epochs.

    It is a `Loader` at a time, the one of the epoch's size, and does what a training loop needs of
    one. Order and crops of an epoch are those that a plain loader has in it.

    Attributes:
        batch_size: rows per batch and rank.
    """

    def __init__(
        self, make: Callable[[int], Loader], sizes: tuple[int, ...], *, epochs: int
    ) -> None:
        """Begin at the size of the first epoch.

        Args:
            make: opens a loader for an image size.
            sizes: in their order.
            epochs: of the run; an iterator behind them has the last size.
        """
        self._make = make
        self._sizes = sizes
        self._epochs = epochs
        self._size = sizes[0]
        self._loader = make(self._size)
        self.batch_size = self._loader.batch_size

    def __len__(self) -> int:
        """Batches of this rank in an epoch."""
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        """Run the epoch that was set; see `Loader`."""
        return iter(self._loader)

    def set_epoch(self, epoch: int) -> None:
        """Name the epoch that the next iterator runs; its images may have another size."""
        self._grow(epoch)
        self._loader.set_epoch(epoch)

    def set_rows(self, rows: RowsLike) -> None:
        """Change the kept rows from the next epoch on; see `Loader`."""
        self._loader.set_rows(rows)

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is; see `Loader`."""
        return self._loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where another loader of the same sizes was; see `Loader`."""
        self._grow(state["epoch"])
        # Between two epochs, the state is of a loader of the size before.
        self._loader.load_state_dict(state | {"image_size": self._size})

    def _grow(self, epoch: int) -> None:
        """Take a loader of the epoch's size."""
        # A state taken behind the last epoch names the one after it.
        size = size_at(min(epoch, self._epochs - 1), self._sizes, epochs=self._epochs)
        if size == self._size:
            return
        logger.info("from epoch %d on, images have %d pixels", epoch + 1, size)
        # Dynamic pruning has changed the rows of the old loader.
        rows = self._loader.rows
        # The old loader's threads and buffers end with its last reference.
        self._loader, self._size = self._make(size), size
        if not np.array_equal(rows, self._loader.rows):
            self._loader.set_rows(rows)
