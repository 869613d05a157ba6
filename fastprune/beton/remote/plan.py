"""Which byte ranges to ask for, so that rows come with few requests and few bytes beside them."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastprune.beton import layout

# Neighbors are joined across padding always, and across other rows as long as that costs 1% more
# bytes in all: a request costs about as much as 1 MB of bytes, but bytes are what pruning saves.
SLACK = 0.01
# Large enough that requests do not bind, small enough that 16 in flight stay within 128 MiB.
MOST_BYTES = 8 << 20


@dataclass(frozen=True, eq=False)
class Request:
    """One range of one file.

    Attributes:
        file: index of the file.
        start: in the file, in bytes.
        size: in bytes.
        rows: (n,) int64, the wanted rows in it, by offset.
    """

    file: int
    start: int
    size: int
    rows: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Places:
    """Where rows lie in their files.

    Attributes:
        files: (N,) index of each row's file.
        offsets: (N,) in the file, in bytes.
        sizes: (N,) in bytes.
    """

    files: NDArray[np.int64]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]


def requests_for(
    places: Places, rows: NDArray[np.int64], *, slack: float = SLACK, most_bytes: int = MOST_BYTES
) -> list[Request]:
    """Cover rows with ranges, by file and offset; each row is in one of them.

    Args:
        places: of all rows of the beton.
        rows: (K,) rows, each at most once.
        slack: bytes of other rows that may come along, as a share of the wanted bytes.
        most_bytes: of a range; larger ones are cut between rows.
    """
    if not len(rows):
        return []
    rows = rows[np.lexsort((places.offsets[rows], places.files[rows]))]
    files, starts = places.files[rows], places.offsets[rows]
    ends = starts + places.sizes[rows]
    gaps = starts[1:] - ends[:-1]
    is_neighbor = (files[1:] == files[:-1]) & (gaps >= 0)
    joined = is_neighbor & (gaps < layout.ALIGNMENT)
    # The smallest gaps first: they save most requests for the bytes.
    others = np.flatnonzero(is_neighbor & ~joined)
    others = others[np.argsort(gaps[others], kind="stable")]
    allowed = int(slack * places.sizes[rows].sum())
    joined[others[np.cumsum(gaps[others]) <= allowed]] = True
    group = np.concatenate([[0], np.cumsum(~joined)])
    first = np.searchsorted(group, np.arange(group[-1] + 1))
    # A new part of a group begins with the row that crosses each multiple of the largest size.
    part = (ends - starts[first][group] - 1) // most_bytes
    is_first = np.concatenate([[True], (np.diff(group) != 0) | (np.diff(part) != 0)])
    bounds = [*np.flatnonzero(is_first).tolist(), len(rows)]
    return [
        Request(int(files[a]), int(starts[a]), int(ends[a:b].max() - starts[a]), rows[a:b])
        for a, b in itertools.pairwise(bounds)
    ]


def in_windows(
    places: Places, rows: NDArray[np.int64], *, window_bytes: int
) -> Iterator[NDArray[np.int64]]:
    """Cut rows, in their order, into windows of about so many bytes; each has a row at least."""
    window = np.cumsum(places.sizes[rows]) // window_bytes
    yield from np.split(rows, np.flatnonzero(np.diff(window)) + 1) if len(rows) else ()
