"""What other codebases touch on a loader besides its batches."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class KeptImages:
    """What is asked of `loader.dataset`.

    Attributes:
        targets: (K,) int64, the label of every kept row.
        classes: name of every class; the label itself where the beton knows no names.
    """

    targets: NDArray[np.int64]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True, eq=False)
class EpochSampler:
    """What is asked of `loader.sampler` and `loader.batch_sampler`: a length and `set_epoch`.

    Iterating gives the rows, or lists of rows, of the loader's next epoch.

    Attributes:
        batch_size: rows per batch and rank.
        drop_last: whether rows that fill no batch are left out.
        batches: gives the rows of every batch of the next epoch.
        set_epoch: the loader's own.
        as_batches: whether this stands for the batch sampler.
    """

    batch_size: int
    drop_last: bool
    batches: Callable[[], list[NDArray[np.int64]]]
    set_epoch: Callable[[int], None]
    as_batches: bool

    def __len__(self) -> int:
        batches = self.batches()
        return len(batches) if self.as_batches else sum(map(len, batches))

    def __iter__(self) -> Iterator[int] | Iterator[list[int]]:
        batches = (rows.tolist() for rows in self.batches())
        if self.as_batches:
            return batches
        return (row for rows in batches for row in rows)

    @property
    def sampler(self) -> "EpochSampler":
        """The sampler beneath a batch sampler."""
        return EpochSampler(self.batch_size, self.drop_last, self.batches, self.set_epoch, False)
