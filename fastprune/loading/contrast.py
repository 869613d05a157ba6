"""Rows that contrastive distillation compares a row with, drawn ahead of the training loop."""

from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

from fastprune.base import random_streams as splitmix
from fastprune.base.compiled import cached
from fastprune.base.errors import InvalidValueError
from fastprune.base.run_ahead import ordered_ahead
from fastprune.base.threads import WorkerThreads
from fastprune.decoding.memory import BatchMemory

_mix = njit(nogil=True)(splitmix.mix64)
_GOLDEN = splitmix.GOLDEN
# Sets these streams apart from the orders' and the crops', which begin with the seed itself.
_PURPOSE = 0xC2B2AE3D27D4EB4F
# Batches drawn ahead: two of 256 rows with 16,384 negatives take 67 MB.
_MOST_AHEAD = 2


class ContrastRows:
    """Draws the rows that contrastive representation distillation compares a row with.

    The first is the row itself, the others are kept rows of other classes, drawn with replacement;
    a pure function of (seed, epoch, row).

    Source: Tian et al. 2020, "Contrastive Representation Distillation".
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
            InvalidValueError: all rows are of one class, or they are 2**32 or more.
        """
        by_class = np.argsort(labels, kind="stable")
        self._rows = rows[by_class]
        classes, self._start, self._count = np.unique(
            labels[by_class], return_index=True, return_counts=True
        )
        if len(classes) < 2:
            raise InvalidValueError(
                'the field "contrast_rows" needs kept rows of at least two classes, but all are of '
                f"class {classes[0]}. Keep more classes, or leave the field out."
            )
        if len(rows) >= 2**32:
            raise InvalidValueError(
                f'the field "contrast_rows" draws from at most 2**32 - 1 rows, not {len(rows):,}.'
            )
        self._classes = classes
        self._num_negatives = num_negatives
        self._seed = seed
        self._memory = BatchMemory()

    def draw(
        self, rows: NDArray[np.int64], labels: NDArray[np.int64], *, epoch: int
    ) -> torch.Tensor:
        """Draw the contrast rows of a batch: (B, 1 + num_negatives) int64, on the CPU."""
        drawn = self._memory.take((len(rows), 1 + self._num_negatives), torch.int64)
        which = np.searchsorted(self._classes, labels)
        seed = splitmix.mix64(np.array([self._seed ^ _PURPOSE], np.uint64))[0]
        _draw(
            *(rows, self._start[which], self._count[which], self._rows),
            *(seed, np.uint64(epoch), drawn.numpy()),
        )
        return drawn


def contrast_batches(
    contrast: ContrastRows,
    labels: NDArray[np.int64],
    batches: Iterable[NDArray[np.int64]],
    *,
    epoch: int,
    num_workers: int,
) -> Iterator[torch.Tensor]:
    """Draw the contrast rows of an epoch's batches on threads, ahead of the training loop.

    Args:
        contrast: draws them.
        labels: (N,) int64, of every row of the beton.
        batches: rows of each batch.
        epoch: in [0, 2**63).
        num_workers: threads; they end with the iterator.
    """

    def draw(rows: NDArray[np.int64]) -> torch.Tensor:
        return contrast.draw(rows, labels[rows], epoch=epoch)

    with closing(WorkerThreads(min(num_workers, _MOST_AHEAD), name="contrast rows")) as threads:
        yield from ordered_ahead(threads, draw, batches, _MOST_AHEAD)


@cached(Path(__file__), Path(splitmix.__file__), nogil=True)
def _draw(
    rows: Any, start: Any, count: Any, by_class: Any, seed: Any, epoch: Any, drawn: Any
) -> None:
    """Fill each line of `drawn` with a row and rows of other classes.

    Args:
        rows: (B,) int64.
        start: (B,) int64, where the row's own class begins in `by_class`.
        count: (B,) int64, rows of its own class.
        by_class: (K,) int64, the kept rows, sorted by class.
        seed: uint64.
        epoch: uint64.
        drawn: (B, 1 + num_negatives) int64.
    """
    half = np.uint64(32)
    low = np.uint64(0xFFFFFFFF)
    of_epoch = _mix(seed + (epoch + np.uint64(1)) * _GOLDEN)
    for i in range(len(rows)):
        drawn[i, 0] = rows[i]
        state = _mix(of_epoch + (np.uint64(rows[i]) + np.uint64(1)) * _GOLDEN)
        others = np.uint64(len(by_class) - count[i])
        first, own = np.uint64(start[i]), np.uint64(count[i])
        for j in range(1, drawn.shape[1]):
            # Two draws of 32 bits from each number of the generator.
            if j & 1:
                state += _GOLDEN
                bits = _mix(state)
                draw = bits >> half
            else:
                draw = bits & low
            # A position among the rows of other classes; the rows of its own class, which lie
            # together, are stepped over.
            position = draw * others >> half
            drawn[i, j] = by_class[position + own * (position >= first)]
