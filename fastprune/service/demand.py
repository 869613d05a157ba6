"""Who will want which views: streams of views, and clients that go through them.

A stream is the views that one epoch draws of all rows: clients whose views are drawn in the same
way are in the same stream, whichever rows they keep. Nothing here decides what a client gets; it
decides how long a view is worth keeping, and who goes first.
"""

from collections import deque
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fastprune.service.slab import place_bytes
from fastprune.service.wire import WANTED


@dataclass(eq=False, repr=False)
class Images:
    """What is decoded: the images of one beton at one output size.

    Attributes:
        name: of the beton, for messages.
        index: of the beton, among those that are served.
        widths: (N,) in pixels.
        heights: (N,) in pixels.
        image_size: S, side of a view in pixels.
        memo: every view in the slab, by its row and box as they are sent.
    """

    name: str
    index: int
    widths: NDArray[np.uint16]
    heights: NDArray[np.uint16]
    image_size: int
    memo: "dict[bytes, Entry]" = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        """Rows of the beton, N."""
        return len(self.widths)

    @cached_property
    def place_bytes(self) -> int:
        """Bytes that a view takes in the slab."""
        return place_bytes(self.image_size)

    def fault_of(self, wanted: NDArray[np.void]) -> str | None:
        """Why views (n,) of `WANTED` cannot be decoded; None if they can."""
        rows = wanted["row"]
        if len(rows) == 0:
            return "no view is asked for"
        outside = (rows < 0) | (rows >= self.num_rows)
        if outside.any():
            return f"row {rows[outside][0]} is outside {self.name}, of {self.num_rows:,} rows"
        top, left, height, width, down, right, flip = wanted["view"].astype(np.int64).T
        fits = (top >= 0) & (left >= 0) & (height >= 1) & (width >= 1)
        fits &= (top + height <= self.heights[rows]) & (left + width <= self.widths[rows])
        fits &= (abs(down) <= self.image_size) & (abs(right) <= self.image_size)
        fits &= (flip == 0) | (flip == 1)
        if not fits.all():
            i = int(np.argmin(fits))
            return f"the view {wanted['view'][i].tolist()} does not lie inside row {rows[i]}"
        return None


class Cohort:
    """Clients that go through the same streams, one stream after the other.

    Attributes:
        turn: when views were last decoded for one of them; cohorts take turns.
    """

    turn: int = 0


@dataclass(eq=False, repr=False)
class Stream:
    """The views of one epoch.

    Attributes:
        name: what clients call it.
        images: what it is of.
        cohort: who goes through it.
        ordinal: number of the stream in its cohort.
        wanted: (N,) clients' announced views of each row that they have not got yet.
        passed: (N,) whether a view of the row was decoded already.
        kept: the decoded views that somebody still wants, the first decoded first.
    """

    name: bytes
    images: Images
    cohort: Cohort
    ordinal: int
    wanted: NDArray[np.uint16]
    passed: NDArray[np.bool_]
    kept: "dict[Entry, None]" = field(default_factory=dict)


@dataclass(eq=False, repr=False, slots=True)
class Entry:
    """A view in the slab.

    Attributes:
        images: what it is of.
        key: its row and box as they were sent.
        row: its row.
        stream: the stream for which it was decoded.
        client: who asked for it first.
        offset: its place in the slab.
        generation: of that place.
        num_lent: asks that hold it; it stays where it is while there is one.
        is_decoded: whether its pixels are there.
        awaiting: asks that wait for its pixels, and its position in each.
    """

    images: Images
    key: bytes
    row: int
    stream: Stream
    client: "Client"
    offset: int
    generation: int
    num_lent: int = 0
    is_decoded: bool = False
    awaiting: "list[tuple[Ask, int]]" = field(default_factory=list)


@dataclass(eq=False, repr=False)
class Ask:
    """Views that a client asked for together.

    Attributes:
        client: whose it is.
        number: what the client calls it.
        payload: the views in the layout `WANTED`.
        entries: the views found or being decoded so far; None for those that cannot be.
        reasons: by position, why a view cannot be decoded.
        num_pending: entries whose pixels are not there yet.
    """

    client: "Client"
    number: int
    payload: bytes
    entries: list[Entry | None] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)
    num_pending: int = 0

    @property
    def num_views(self) -> int:
        """Views asked for."""
        return len(self.payload) // WANTED.itemsize

    @property
    def is_assigned(self) -> bool:
        """Whether every view was found or is being decoded."""
        return len(self.entries) == self.num_views


@dataclass(eq=False, repr=False)
class Client:
    """Somebody who takes views.

    Attributes:
        name: for people.
        images: what it wants views of.
        joined: when it connected, in seconds of a steady clock.
        last_heard: when it said something or was last answered.
        stream: the one that it goes through, or went through last.
        announced: (N,) uint8, views of each row that it announced for that stream.
        remaining: of each stream that it is in, or will be in as its cohort is: the views of each
            row that it has not got yet.
        num_announced: the sum of `announced`.
        num_remaining: those that it has not got yet.
        is_silent: whether it was not heard of for too long; nothing is kept for it then.
        is_late: whether the others were too far ahead when it came; nothing is kept for it then.
        asks: what it asked for that is not wholly assigned.
        open: all that it asked for and has not taken yet, by number.
        num_lent: views in its open asks.
        num_epochs: streams announced.
        num_served: views it got.
        num_shared: those of them that were decoded for somebody else.
    """

    name: str
    images: Images
    joined: float
    last_heard: float
    stream: Stream | None = None
    announced: NDArray[np.uint8] | None = None
    remaining: dict[Stream, NDArray[np.uint8]] = field(default_factory=dict)
    num_announced: int = 0
    num_remaining: int = 0
    is_silent: bool = False
    is_late: bool = False
    asks: deque[Ask] = field(default_factory=deque)
    open: dict[int, Ask] = field(default_factory=dict)
    num_lent: int = 0
    num_epochs: int = 0
    num_served: int = 0
    num_shared: int = 0

    @property
    def position(self) -> tuple[int, float]:
        """How far it is within its cohort: the stream, and the share of it that it got."""
        assert self.stream is not None, "a client announces before it asks"
        return self.stream.ordinal, 1 - self.num_remaining / max(1, self.num_announced)

    @property
    def num_unanswered(self) -> int:
        """Asks that it waits for."""
        return sum(1 for ask in self.open.values() if not ask.is_assigned or ask.num_pending)
