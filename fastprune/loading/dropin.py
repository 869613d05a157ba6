"""What other codebases touch on a loader besides its batches."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fastprune.errors import InvalidValueError
from fastprune.loading.order import Plan


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
        plan: gives the loader's plan of epochs, for this rank.
        next_epoch: gives the epoch that the loader runs next.
        set_epoch: the loader's own.
        as_batches: whether this stands for the batch sampler.
    """

    plan: Callable[[], Plan]
    next_epoch: Callable[[], int]
    set_epoch: Callable[[int], None]
    as_batches: bool

    @property
    def batch_size(self) -> int:
        """Rows per batch and rank."""
        return self.plan().batch_size

    @property
    def drop_last(self) -> bool:
        """Whether rows that fill no batch are left out."""
        return self.plan().tail == "drop"

    @property
    def sampler(self) -> "EpochSampler":
        """The sampler beneath a batch sampler."""
        return replace(self, as_batches=False)

    def __len__(self) -> int:
        plan = self.plan()
        if self.as_batches:
            return plan.num_batches()
        return plan.num_mine() if plan.tail == "exact" else plan.num_batches() * plan.batch_size

    def __iter__(self) -> Iterator[int] | Iterator[list[int]]:
        plan = self.plan()
        if plan.order == "buffered":
            raise InvalidValueError(
                'order="buffered" tells its rows only with its batches, because DALI draws them. '
                'Use layout="xyi", or order="random".'
            )
        batches = (rows.tolist() for rows in plan.batches(self.next_epoch()))
        if self.as_batches:
            return batches
        return (row for rows in batches for row in rows)
