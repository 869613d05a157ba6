"""Which row comes when: a pure function of (seed, epoch, subset), cut into batches and ranks."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastprune.base.errors import InvalidValueError
from fastprune.base.random_streams import epoch_stream
from fastprune.beton.beton import Beton


@dataclass(frozen=True)
class EpochSampler:
    """Orders the rows of an epoch, divides them among ranks, and cuts them into batches.

    A subset has the order of the whole beton with the other rows left out, so that nested
    subsets, and trainers of different subsets, meet the same rows at about the same time.

    Attributes:
        rows: (K,) int64, the subset, sorted and unique.
        num_rows: N, rows of the beton.
        batch_size: rows per batch and rank.
        order: "random", "sequential" or "pages".
        seed: of the order, in [0, 2**63).
        tail: what becomes of the rows that fill no batch: "drop" leaves them out (other ones in
            each epoch of a random order), "pad" repeats rows from the epoch's start until every
            batch of every rank is full, "exact" gives each row once, so that last batches and
            ranks are uneven.
        rank: this process among `world`.
        world: the number of processes that share an epoch.
        pages: (N,) int64, the page of the file on which each row lies, for the order "pages".
        open_pages: how many pages the order "pages" draws from at a time.
    """

    rows: NDArray[np.int64]
    num_rows: int
    batch_size: int
    order: str
    seed: int
    tail: str
    rank: int = 0
    world: int = 1
    pages: NDArray[np.int64] | None = None
    open_pages: int = 1

    def shared(self, distributed: str | tuple[int, int] | None, path: Path) -> "EpochSampler":
        """Return this rank's share, see `this_rank`; `path` is the beton's, for the message.

        Raises:
            InvalidValueError: every row of an epoch would be dropped.
        """
        rank, world = this_rank(distributed)
        share = replace(self, rank=rank, world=world)
        if share.tail == "drop" and share.num_batches() == 0:
            ranks = f" on each of {world} ranks" if world > 1 else ""
            raise InvalidValueError(
                f"{len(share.rows):,} kept rows of {path} fill no batch of {self.batch_size:,}"
                f'{ranks}. Use a smaller batch_size, or tail="pad" or "exact".'
            )
        return share

    def num_batches(self) -> int:
        """Count this rank's batches in an epoch; equal on all ranks unless the tail is "exact"."""
        num_rows, stride = len(self.rows), self.world * self.batch_size
        if self.tail == "drop":
            return num_rows // stride
        if self.tail == "pad":
            return -(-num_rows // stride)
        return -(-self.num_mine() // self.batch_size)

    def num_mine(self) -> int:
        """Count this rank's rows in an epoch with an exact tail."""
        return len(range(self.rank, len(self.rows), self.world))

    def num_repeated(self) -> int:
        """Count an epoch's repeated entries over all ranks: 0 unless the tail is "pad"."""
        if self.tail != "pad":
            return 0
        return self.num_batches() * self.world * self.batch_size - len(self.rows)

    def rank_rows(self, epoch: int) -> NDArray[np.int64]:
        """Return the rows of this rank in the order of an epoch.

        Rank r of W takes every W-th entry of the epoch from r, so that W ranks together see in
        batch b what a single rank with W times the batch size sees. (The last batch of "pad" is
        cut otherwise: rank r takes the r-th part of it, and the last ranks the repeated rows.)

        Args:
            epoch: in [0, 2**63).

        Returns:
            (n,) int64; n is a multiple of the batch size unless the tail is "exact".
        """
        entries = self._in_order(epoch)
        if self.tail != "exact":
            # Cuts for "drop"; for "pad" begins the epoch again, as often as it takes.
            entries = np.resize(entries, self.num_batches() * self.world * self.batch_size)
        # The padded last batches are cut in one piece a rank, so that all ranks' batches, laid end
        # to end, end with the repeated rows, as gathering code expects.
        num_last = self.world * self.batch_size if self.tail == "pad" else 0
        last = entries[len(entries) - num_last :]
        start = self.rank * self.batch_size
        mine = entries[: len(entries) - num_last][self.rank :: self.world]
        return np.concatenate([mine, last[start : start + self.batch_size]])

    def batches(self, epoch: int) -> list[NDArray[np.int64]]:
        """Return the rows of each batch of this rank: `num_batches()` arrays, see `rank_rows`."""
        mine = self.rank_rows(epoch)
        return [mine[i : i + self.batch_size] for i in range(0, len(mine), self.batch_size)]

    def terms(self) -> dict[str, Any]:
        """Return what decides which rows come when, in words and numbers."""
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "world": self.world,
            "order": self.order,
            "open_pages": self.open_pages,
            "tail": self.tail,
            "rows_digest": hashlib.blake2b(self.rows.tobytes(), digest_size=16).hexdigest(),
        }

    def _in_order(self, epoch: int) -> NDArray[np.int64]:
        """Return the subset in the order in which the epoch visits it."""
        if self.order == "sequential":
            return self.rows
        if self.order == "random":
            times: NDArray[Any] = epoch_stream(self.seed, epoch, self.num_rows)
        else:
            assert self.order == "pages" and self.pages is not None
            times = _page_times(self.pages, self.open_pages, self.seed, epoch)
        # Every row of the beton has a time, and the kept ones come by theirs; ties go by row.
        return self.rows[np.argsort(times[self.rows], kind="stable")]


@dataclass(frozen=True, eq=False)
class KeptImages:
    """The `loader.dataset` that other code expects.

    Attributes:
        targets: (K,) int64, the label of every kept row.
        classes: name of every class; the label itself where the beton knows no names.
    """

    targets: NDArray[np.int64]
    classes: tuple[str, ...]

    @classmethod
    def of(cls, beton: Beton, rows: NDArray[np.int64]) -> "KeptImages":
        """Describe some rows (K,) of a beton."""
        names = beton.class_names or tuple(str(label) for label in range(beton.num_classes))
        return cls(beton.labels[rows], names)

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True, eq=False)
class NextEpoch:
    """The `loader.sampler` and `loader.batch_sampler` that other code expects.

    Iterating gives the rows, or lists of rows, of the loader's next epoch.

    Attributes:
        current: gives the loader's sampler as it is now, for this rank.
        next_epoch: gives the epoch that the loader runs next.
        set_epoch: the loader's own.
        as_batches: whether this stands for the batch sampler.
    """

    # Functions and no values: rows, ranks and the epoch may change under a framework that keeps
    # this object for a whole run.
    current: Callable[[], EpochSampler]
    next_epoch: Callable[[], int]
    set_epoch: Callable[[int], None]
    as_batches: bool

    @property
    def batch_size(self) -> int:
        """Rows per batch and rank."""
        return self.current().batch_size

    @property
    def drop_last(self) -> bool:
        """Whether rows that fill no batch are left out."""
        return self.current().tail == "drop"

    @property
    def sampler(self) -> "NextEpoch":
        """The sampler beneath a batch sampler."""
        return replace(self, as_batches=False)

    def __len__(self) -> int:
        now = self.current()
        if self.as_batches:
            return now.num_batches()
        return now.num_mine() if now.tail == "exact" else now.num_batches() * now.batch_size

    def __iter__(self) -> Iterator[int] | Iterator[list[int]]:
        now, epoch = self.current(), self.next_epoch()
        if self.as_batches:
            return (rows.tolist() for rows in now.batches(epoch))
        return (row for row in now.rank_rows(epoch).tolist())


def this_rank(distributed: str | tuple[int, int] | None) -> tuple[int, int]:
    """Find this process among those that share an epoch.

    Args:
        distributed: "auto" asks torch.distributed, as it is now; (rank, world) is returned; None
            means this process alone.

    Returns:
        Rank and number of ranks.

    Raises:
        InvalidValueError: it is none of these, or the rank is not below the number of ranks.
    """
    if distributed is None:
        return 0, 1
    if distributed == "auto":
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1
    match distributed:
        case (int(rank), int(world)) if 0 <= rank < world:
            return rank, world
    raise InvalidValueError(
        f'distributed must be "auto", None or (rank, world) with 0 <= rank < world, not '
        f"{distributed!r}."
    )


def _page_times(
    pages: NDArray[np.int64], open_pages: int, seed: int, epoch: int
) -> NDArray[np.float64]:
    """Draw a time for every row, so that few pages are open at a time.

    The n-th of the shuffled pages gives each of its rows a random time in [n, n + open_pages):
    the open pages slide over the shuffled ones.
    """
    _, page_of_row = np.unique(pages, return_inverse=True)
    num_pages = int(page_of_row.max()) + 1
    turn = np.empty(num_pages, np.int64)
    turn[np.argsort(epoch_stream(seed, epoch, num_pages), kind="stable")] = np.arange(num_pages)
    # Draws from behind the page order's, so that the two are independent.
    delay = epoch_stream(seed, epoch, num_pages + len(pages))[num_pages:] * 2.0**-64
    times: NDArray[np.float64] = turn[page_of_row] + open_pages * delay
    return times
