"""Which clients read the same stream of views, and what each of them still waits for.

A stream is the views that one epoch draws of all rows. Clients whose views are drawn in the same
way read the same stream, whichever rows they keep. These are plain records: the window decides by
them how long a view is worth keeping, and whose views are decoded first.
"""

from collections import deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fastprune.service.wire import REQUESTED


@dataclass(frozen=True, eq=False, repr=False)
class Images:
    """The images of one beton at one output size."""

    name: str  # of the beton, for messages
    index: int  # of the beton among those served
    widths: NDArray[np.uint16]  # (N,) in pixels
    heights: NDArray[np.uint16]  # (N,) in pixels
    image_size: int  # S, side of a view in pixels

    @property
    def num_rows(self) -> int:
        """Rows of the beton, N."""
        return len(self.widths)

    def find_fault(self, requested: NDArray[np.void]) -> str | None:
        """Find why views (n,) of `REQUESTED` cannot be decoded; None if they can."""
        rows = requested["row"]
        if len(rows) == 0:
            return "a request names no view"
        outside = (rows < 0) | (rows >= self.num_rows)
        if outside.any():
            return f"row {rows[outside][0]} is outside {self.name}, of {self.num_rows:,} rows"
        # In int64: the sum of two int32 from the network may wrap around, and pass the test.
        top, left, height, width, down, right, flip = requested["view"].astype(np.int64).T
        fits = (top >= 0) & (left >= 0) & (height >= 1) & (width >= 1)
        fits &= (top + height <= self.heights[rows]) & (left + width <= self.widths[rows])
        fits &= (abs(down) <= self.image_size) & (abs(right) <= self.image_size)
        fits &= (flip == 0) | (flip == 1)
        if not fits.all():
            i = int(np.argmin(fits))
            return f"the view {requested['view'][i].tolist()} does not lie inside row {rows[i]}"
        return None


@dataclass(eq=False, repr=False)
class Stream:
    """The views of one epoch."""

    name: bytes  # given by the clients
    images: Images
    wanted: NDArray[np.uint16]  # (N,) views of each row announced by clients and not yet received
    decoded: NDArray[np.bool_]  # (N,) whether a view of the row was decoded before
    # Decoded views that some client still waits for; the first decoded come first.
    kept: "dict[CachedView, None]" = field(default_factory=dict)
    last_turn: int = 0  # when views were last decoded for it; streams take turns


@dataclass(eq=False, repr=False, slots=True)
class CachedView:
    """A view in the slab, decoded or being decoded."""

    key: bytes  # its row and box, as they were sent
    row: int
    stream: Stream  # for which it was decoded
    client: "Client"  # that requested it first
    offset: int  # of its slot
    generation: int  # of its slot
    num_holders: int = 0  # requests that hold it: while there is one, the slot is not reused
    is_decoded: bool = False
    # Requests that wait for its pixels, and its position in each.
    awaited_by: "list[tuple[Request, int]]" = field(default_factory=list)


@dataclass(eq=False, repr=False)
class Request:
    """Views that a client requested together."""

    client: "Client"
    number: int  # by which the client knows it
    payload: bytes  # the views, in the layout `REQUESTED`
    # The views found or being decoded so far, in order; None for one that cannot be decoded.
    views: list[CachedView | None] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)  # why it cannot be, by position
    num_pending: int = 0  # views whose pixels are not there yet

    @property
    def num_views(self) -> int:
        """Views requested."""
        return len(self.payload) // REQUESTED.itemsize

    @property
    def is_assigned(self) -> bool:
        """Whether every view has a slot or a reason."""
        return len(self.views) == self.num_views

    @property
    def is_answered(self) -> bool:
        """Whether every view is there."""
        return self.is_assigned and self.num_pending == 0


@dataclass(eq=False, repr=False)
class Client:
    """A trainer that takes views."""

    name: str  # for people
    images: Images
    joined: float  # in seconds of a steady clock
    last_heard: float  # when it sent something or was last answered
    stream: Stream | None = None  # that it reads, or read last
    announced: NDArray[np.uint8] | None = None  # (N,) views of each row, for that stream
    # Per stream in which views are kept for it: (N,) views of each row not yet received.
    remaining: dict[Stream, NDArray[np.uint8]] = field(default_factory=dict)
    num_announced: int = 0  # sum of `announced`
    num_remaining: int = 0  # how many of these it has not received
    is_silent: bool = False  # too long: nothing is kept for it until it sends something
    is_late: bool = False  # too far behind the others: nothing is kept for it in this epoch
    # Requests of which some view has no slot yet, the oldest first.
    unassigned: deque[Request] = field(default_factory=deque)
    requests: dict[int, Request] = field(default_factory=dict)  # not released, by number
    num_held: int = 0  # views that these hold
    num_epochs: int = 0  # announced
    num_served: int = 0  # views received
    num_shared: int = 0  # how many of these were decoded for another client

    @property
    def progress(self) -> float:
        """Share in [0, 1] of its epoch that it received."""
        return 1 - self.num_remaining / max(1, self.num_announced)

    @property
    def num_unanswered(self) -> int:
        """Requests that it waits for."""
        return sum(not request.is_answered for request in self.requests.values())
