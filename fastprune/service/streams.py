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
    """The images of one beton at one output size.

    Attributes:
        name: of the beton, for messages.
        index: of the beton among those served.
        widths: (N,) in pixels.
        heights: (N,) in pixels.
        image_size: S, side of a view in pixels.
    """

    name: str
    index: int
    widths: NDArray[np.uint16]
    heights: NDArray[np.uint16]
    image_size: int

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
    """The views of one epoch.

    Attributes:
        name: given by the clients.
        images: the images it draws views of.
        wanted: (N,) uint16, views of each row that clients announced and have not received.
        decoded: (N,) whether a view of the row was decoded before.
        kept: decoded views that some client still waits for; the first decoded come first.
        last_turn: when views were last decoded for it; streams take turns.
    """

    name: bytes
    images: Images
    wanted: NDArray[np.uint16]
    decoded: NDArray[np.bool_]
    kept: "dict[CachedView, None]" = field(default_factory=dict)
    last_turn: int = 0


@dataclass(eq=False, repr=False, slots=True)
class CachedView:
    """A view in the slab, decoded or being decoded.

    Attributes:
        key: its row and box, as they were sent.
        row: its row.
        stream: the stream for which it was decoded.
        client: the client that requested it first.
        offset: of its slot.
        generation: of its slot.
        num_holders: requests that hold it. While there is one, the slot is not reused.
        is_decoded: whether its pixels are there.
        awaited_by: requests that wait for its pixels, and its position in each.
    """

    key: bytes
    row: int
    stream: Stream
    client: "Client"
    offset: int
    generation: int
    num_holders: int = 0
    is_decoded: bool = False
    awaited_by: "list[tuple[Request, int]]" = field(default_factory=list)


@dataclass(eq=False, repr=False)
class Request:
    """Views that a client requested together.

    Attributes:
        client: that requested them.
        number: by which the client knows the request.
        payload: the views, in the layout `REQUESTED`.
        views: those found or being decoded so far; None for one that cannot be decoded.
        reasons: why a view cannot be decoded, by position.
        num_pending: views whose pixels are not there yet.
    """

    client: "Client"
    number: int
    payload: bytes
    views: list[CachedView | None] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)
    num_pending: int = 0

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
    """A trainer that takes views.

    Attributes:
        name: for people.
        images: the images it takes views of.
        joined: when it connected, in seconds of a steady clock.
        last_heard: when it sent something or was last answered.
        stream: the stream that it reads, or read last.
        announced: (N,) uint8, views of each row that it announced for that stream.
        remaining: per stream that views are kept for it in: the views of each row not yet received.
        num_announced: sum of `announced`.
        num_remaining: how many of these it has not received.
        is_silent: not heard from for too long; nothing is kept for it until it sends something.
        is_late: joined too far behind the others; nothing is kept for it in this epoch.
        unassigned: requests of which some view has no slot yet, the oldest first.
        requests: all requests whose views it has not released, by number.
        num_held: views that these hold.
        num_epochs: epochs announced.
        num_served: views received.
        num_shared: how many of these were decoded for another client.
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
    unassigned: deque[Request] = field(default_factory=deque)
    requests: dict[int, Request] = field(default_factory=dict)
    num_held: int = 0
    num_epochs: int = 0
    num_served: int = 0
    num_shared: int = 0

    @property
    def progress(self) -> float:
        """Share in [0, 1] of its epoch that it received."""
        return 1 - self.num_remaining / max(1, self.num_announced)

    @property
    def num_unanswered(self) -> int:
        """Requests that it waits for."""
        return sum(not request.is_answered for request in self.requests.values())
