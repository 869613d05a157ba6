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
    """List the image sizes of a run, in pixels.

    >>> image_sizes(128, 192, step=32)
    (128, 160, 192)
    >>> image_sizes(128, 176, step=32)
    (128, 160, 176)
    """
    return (*range(first, last, step), last)


def training_sizes(data: DataSettings) -> tuple[int, ...]:
    """List the image sizes that a recipe asks for, in pixels."""
    first = data.image_size if data.first_image_size is None else data.first_image_size
    return image_sizes(first, data.image_size, step=data.image_size_step)


def size_at(epoch: int, sizes: tuple[int, ...], *, epochs: int) -> int:
    """Return the image size of an epoch in [0, epochs): each has an equal share of the epochs.

    The last epoch always has the last size.

    >>> [size_at(epoch, (128, 160, 192), epochs=8) for epoch in range(8)]
    [128, 128, 160, 160, 160, 192, 192, 192]
    """
    return sizes[-1 - (epochs - 1 - epoch) * len(sizes) // epochs]


class GrowingLoader:
    """A loader whose images grow with the epochs.

    It wraps the `Loader` of the current size and has the methods that a training loop needs. Order
    and crops of an epoch are the same as a plain loader's.

    Attributes:
        batch_size: rows per batch and rank.
    """

    def __init__(
        self, make: Callable[[int], Loader], sizes: tuple[int, ...], *, epochs: int
    ) -> None:
        """Start at the size of the first epoch; `make` opens a loader for an image size."""
        self._make = make
        self._sizes = sizes
        self._epochs = epochs
        self._size = sizes[0]
        self._loader = make(self._size)
        self.batch_size = self._loader.batch_size

    def __len__(self) -> int:
        """Count the batches of this rank in an epoch."""
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
        """Return the position; see `Loader`."""
        return self._loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore from `state_dict`; see `Loader`."""
        self._grow(state["epoch"])
        # Between two epochs, the state is of a loader of the size before.
        self._loader.load_state_dict(state | {"image_size": self._size})

    def _grow(self, epoch: int) -> None:
        """Switch to a loader of the epoch's size."""
        # A state taken after the last epoch names the one after it.
        size = size_at(min(epoch, self._epochs - 1), self._sizes, epochs=self._epochs)
        if size == self._size:
            return
        logger.info("from epoch %d on, images have %d pixels", epoch + 1, size)
        # Dynamic pruning may have changed the rows of the old loader.
        rows = self._loader.rows
        # The old loader's threads and buffers end with its last reference.
        self._loader, self._size = self._make(size), size
        if not np.array_equal(rows, self._loader.rows):
            self._loader.set_rows(rows)
