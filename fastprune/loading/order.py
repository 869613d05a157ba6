"""Which row comes when: a pure function of (seed, epoch, subset), cut into batches and ranks."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ORDERS = ("random", "sequential")
TAILS = ("drop", "pad", "exact")


@dataclass(frozen=True)
class Plan:
    """How the rows of an epoch are ordered, divided among ranks, and cut into batches.

    Attributes:
        rows: (K,) int64, the subset, sorted and unique.
        batch_size: rows per batch and rank.
        order: "random" or "sequential".
        seed: of the order, in [0, 2**63).
        tail: what becomes of the rows that fill no batch: "drop" leaves them out (other ones in
            each epoch of a random order), "pad" repeats rows from the epoch's start until every
            batch of every rank is full, "exact" gives each row once, so that last batches and
            ranks are uneven.
        rank: this process among `world`.
        world: the number of processes that share an epoch.
    """

    rows: NDArray[np.int64]
    batch_size: int
    order: str
    seed: int
    tail: str
    rank: int = 0
    world: int = 1

    def num_batches(self) -> int:
        """Batches of this rank in an epoch; equal on all ranks unless the tail is "exact"."""
        num_rows, stride = len(self.rows), self.world * self.batch_size
        if self.tail == "drop":
            return num_rows // stride
        if self.tail == "pad":
            return -(-num_rows // stride)
        return -(-len(range(self.rank, num_rows, self.world)) // self.batch_size)

    def num_repeated(self) -> int:
        """Entries of an epoch, over all ranks, that are repetitions: 0 unless the tail is "pad"."""
        if self.tail != "pad":
            return 0
        return self.num_batches() * self.world * self.batch_size - len(self.rows)

    def batches(self, epoch: int) -> list[NDArray[np.int64]]:
        """The rows of each batch of this rank.

        Rank r of W takes every W-th entry of the epoch from r, so that W ranks together see in
        batch b what a single rank with W times the batch size sees.

        Args:
            epoch: in [0, 2**63).

        Returns:
            `num_batches()` arrays of up to `batch_size` int64 rows.
        """
        entries = epoch_order(self.rows, order=self.order, seed=self.seed, epoch=epoch)
        if self.tail != "exact":
            entries = np.resize(entries, self.num_batches() * self.world * self.batch_size)
        mine = entries[self.rank :: self.world]
        return [mine[i : i + self.batch_size] for i in range(0, len(mine), self.batch_size)]


def epoch_order(rows: NDArray[np.int64], *, order: str, seed: int, epoch: int) -> NDArray[np.int64]:
    """Put the rows in the order in which an epoch visits them.

    Args:
        rows: (K,) int64.
        order: one of `ORDERS`.
        seed: in [0, 2**63).
        epoch: in [0, 2**63).

    Returns:
        (K,) int64, a permutation of `rows`; the same for the same arguments everywhere.
    """
    if order == "sequential":
        return rows
    return rows[_shuffled(len(rows), seed, epoch)]


def _shuffled(count: int, seed: int, epoch: int) -> NDArray[np.intp]:
    """A permutation of range(count) that no other (seed, epoch) shares."""
    # The raw stream of Philox and a stable sort are fixed for all time; numpy reserves the right
    # to change what `permutation` makes of a stream.
    keys = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(count)
    return np.argsort(keys, kind="stable")
