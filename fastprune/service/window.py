"""The window: decoded views in a slab, kept while a client that announced them waits for them.

All of it belongs to one thread, the server's event loop; there are no locks. Invariants:

- The slot of a view that a request holds is not reused. Only a client that was silent for too long
  loses its requests, and it notices by the generations of the slots.
- A view is `kept` by its stream while a client that announced it has not received it. Once no
  client waits for it and no request holds it, it is spare: it stays, and is displaced first, the
  one unused for longest before the others.
- Among the clients of a stream, the one furthest behind is served first. Leaders may displace kept
  views, the last decoded first, because these will be wanted last.
- A request has at most 64 views, and each client may hold at least as many: none can starve.
"""

import itertools
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastprune.service.slab import Slab, slot_bytes
from fastprune.service.streams import CachedView, Client, Images, Request, Stream
from fastprune.service.wire import (
    MAX_REQUEST_VIEWS,
    REQUESTED,
    ServiceError,
    ServiceRefusedError,
)

#: A client that waits for nothing and sends nothing for so long is detached.
SILENT_SECONDS = 10.0
_MAX_REQUESTS = 1024  # of one client; ours has four batches on the way
MAX_TASK_VIEWS = 16  # about 4 ms of work
_LATE_SHARE = 4  # a client that missed more than 1/4 of a window's views is late


@dataclass
class Counts:
    """Totals since the server started."""

    decoded: int = 0  # views, and those that could not be decoded
    served: int = 0  # views that clients received
    detached: int = 0  # how often a silent client was


@dataclass(frozen=True)
class Task:
    """Views of the same images for one thread to decode into the slots of a window."""

    window: "Window"
    images: Images
    views: list[CachedView]


def require_room(memory_bytes: int, image_size: int, num_clients: int) -> None:
    """Refuse a client where each could not hold one whole request: it might wait forever.

    Raises:
        ServiceRefusedError: the memory is too small.
    """
    needed = num_clients * MAX_REQUEST_VIEWS * slot_bytes(image_size)
    if needed > memory_bytes:
        raise ServiceRefusedError(
            f"{memory_bytes >> 20} MiB for views of {image_size} pixels are too small for "
            f"{num_clients} clients, which need {-(-needed >> 20)} MiB; start the service with a "
            "larger --memory"
        )


class Window:
    """A cache of the decoded views of one image size.

    Attributes:
        slab: where the views lie.
        clients: all that take views of this size.
        answered: requests whose views are all there, for the dispatcher to send.
        views: every view in the slab, by its images and key.
        counts: totals, of this window or of several.
    """

    def __init__(self, slab: Slab, counts: Counts):
        self.slab = slab
        self.clients: list[Client] = []
        self.answered: deque[Request] = deque()
        self.views: dict[tuple[Images, bytes], CachedView] = {}
        self.counts = counts
        self._spare: dict[CachedView, None] = {}  # the one unused for longest first
        self._streams: dict[tuple[Images, bytes], Stream] = {}
        self._turns = itertools.count(1)

    def join(self, name: str, images: Images, now: float) -> Client:
        """Add a client; see `require_room`."""
        client = Client(name, images, now, now)
        self.clients.append(client)
        return client

    def leave(self, client: Client) -> None:
        """Forget a client and all that it requested."""
        self.clients.remove(client)
        self._revoke(client, client.requests.values())
        client.unassigned.clear()
        self._forget_demand(client)

    def announce(self, client: Client, name: bytes, counts: NDArray[np.uint8], now: float) -> None:
        """Begin an epoch of a client, which will request `counts` (N,) views of each row.

        Raises:
            ServiceError: views of the last epoch were not released.
        """
        if client.requests:
            raise ServiceError("an epoch begins before the views of the last one were released")
        client.last_heard, client.is_silent = now, False
        before, images = client.stream, client.images
        stream = self._streams.get((images, name))
        # The same name again, as of central crops, is another epoch: its rows are wanted again.
        if stream is None or stream is before:
            wanted = np.zeros(images.num_rows, np.uint16)
            stream = Stream(name, images, wanted, np.zeros(images.num_rows, np.bool_))
            self._streams[images, name] = stream
        client.stream, client.announced = stream, counts
        client.num_announced = client.num_remaining = int(counts.sum(dtype=np.int64))
        client.num_epochs += 1
        for other in [s for s in client.remaining if s is not stream]:
            self._drop(client, other)
        self._attach(client)
        # Clients still in the last epoch will most likely want the same rows of the new stream.
        for follower in self.clients:
            is_behind = follower.stream is before is not None and not follower.is_silent
            if is_behind and stream not in follower.remaining and follower.announced is not None:
                self._want(follower, stream, follower.announced)
        self._close_streams()

    def request(self, client: Client, number: int, payload: bytes, now: float) -> None:
        """Queue a request for up to `MAX_REQUEST_VIEWS` views in the layout `REQUESTED`.

        Raises:
            ServiceError: it cannot be answered, and was not queued.
        """
        if client.stream is None:
            raise ServiceError("views are requested before an epoch is announced")
        if len(payload) % REQUESTED.itemsize:
            raise ServiceError("a request is of a wrong length")
        if len(client.requests) >= _MAX_REQUESTS:
            raise ServiceError(f"more than {_MAX_REQUESTS} requests are open")
        if number in client.requests:
            raise ServiceError(f"request {number} is open already")
        if fault := client.images.find_fault(np.frombuffer(payload, REQUESTED)):
            raise ServiceError(fault)
        self._hear(client, now)
        request = Request(client, number, payload)
        client.requests[number] = request
        client.unassigned.append(request)

    def release(self, client: Client, number: int, now: float) -> None:
        """Note that a client copied the views of a request, which may have been revoked before.

        Raises:
            ServiceError: the request was not answered yet.
        """
        self._hear(client, now)
        request = client.requests.get(number)
        if request is None:
            return
        if not request.is_answered:
            raise ServiceError(f"request {number} is released before it was answered")
        self._revoke(client, [request])

    def detach_silent(self, now: float) -> list[Client]:
        """Stop keeping views for clients that wait for nothing and have long sent nothing."""
        detached = []
        for client in self.clients:
            is_silent = now - client.last_heard > SILENT_SECONDS and not client.num_unanswered
            if is_silent and not client.is_silent:
                client.is_silent = True
                self._revoke(client, client.requests.values())
                if self._forget_demand(client):
                    self.counts.detached += 1
                    detached.append(client)
        return detached

    def advance(self, num_idle: int) -> list[Task]:
        """Find what was requested, and choose what to decode next.

        Streams take turns; within a stream, the client furthest behind goes first.

        Returns:
            At most `num_idle` tasks.
        """
        tasks: list[Task] = []
        waiting = [client for client in self.clients if client.unassigned]
        for client in sorted(waiting, key=_precedence):
            while views := self._assign(client, num_idle - len(tasks)):
                tasks.append(Task(self, client.images, views))
                views[0].stream.last_turn = next(self._turns)
        return tasks

    def finish(self, task: Task, reasons: dict[int, str], now: float) -> None:
        """Note that the views of a task are there, or by position why one cannot be decoded."""
        self.counts.decoded += len(task.views)
        for i, view in enumerate(task.views):
            view.is_decoded = True
            for request, position in view.awaited_by:
                if request.client.requests.get(request.number) is not request:
                    continue  # its client left
                request.num_pending -= 1
                if i in reasons:
                    request.views[position] = None
                    request.reasons[position] = reasons[i]
                    request.client.num_held -= 1
                self._complete_if_answered(request, now)
            view.awaited_by = []
            if i in reasons:
                # Not cached: the next request for it tries again.
                view.num_holders = 0
                self._evict(view)
                continue
            view.stream.decoded[view.row] = True
            if view.stream.wanted[view.row]:
                view.stream.kept[view] = None
            self._settle(view)

    def _hear(self, client: Client, now: float) -> None:
        """Note a sign of life; a client that had been silent takes part again."""
        client.last_heard = now
        if client.is_silent:
            client.is_silent = False
            self._attach(client)

    def _attach(self, client: Client) -> None:
        """Keep views for a client from now on, unless the others are far ahead of it."""
        stream, counts = client.stream, client.announced
        if stream is None or counts is None or client.num_remaining == 0:
            return
        self._drop(client, stream)
        here = {view.row for view in self.views.values() if view.stream is stream}
        num_missed = int(np.count_nonzero(stream.decoded & (counts > 0))) - len(here)
        # Views kept for a client far behind would fill the slab, and the others would lose theirs.
        client.is_late = num_missed > self.slab.num_slots // _LATE_SHARE
        if not client.is_late:
            self._want(client, stream, counts)

    def _want(self, client: Client, stream: Stream, counts: NDArray[np.uint8]) -> None:
        """Add a client's rows to those wanted of a stream."""
        client.remaining[stream] = counts.copy()
        stream.wanted += counts
        for view in self.views.values():
            if view.stream is stream and view.is_decoded and counts[view.row]:
                stream.kept[view] = None
                self._spare.pop(view, None)

    def _drop(self, client: Client, stream: Stream) -> bool:
        """Subtract a client's rows from those wanted of a stream; False if there were none."""
        counts = client.remaining.pop(stream, None)
        if counts is None:
            return False
        stream.wanted -= counts
        for view in [view for view in stream.kept if not stream.wanted[view.row]]:
            self._settle(view)
        return True

    def _forget_demand(self, client: Client) -> bool:
        """Stop keeping views for a client; False if none were kept."""
        dropped = [self._drop(client, stream) for stream in list(client.remaining)]
        self._close_streams()
        return any(dropped)

    def _close_streams(self) -> None:
        """Forget streams that no client reads any more."""
        used = {client.stream for client in self.clients}
        for client in self.clients:
            used.update(client.remaining)
        self._streams = {key: s for key, s in self._streams.items() if s in used}

    def _assign(self, client: Client, num_idle: int) -> list[CachedView]:
        """Hold the views a client requested, in order, as far as they are there or can be decoded.

        Returns:
            What is to be decoded, up to one task; nothing if no thread is idle.
        """
        misses: list[CachedView] = []
        max_held = max(MAX_REQUEST_VIEWS, self.slab.num_slots // len(self.clients))
        while client.unassigned and client.num_held < max_held:
            request = client.unassigned[0]
            start = len(request.views) * REQUESTED.itemsize
            key = request.payload[start : start + REQUESTED.itemsize]
            view = self.views.get((client.images, key))
            if view is None:
                if num_idle <= 0 or len(misses) == MAX_TASK_VIEWS:
                    break
                view = self._add(client, key)
                if view is None:
                    break
                misses.append(view)
            elif view.client is not client:
                client.num_shared += 1
            self._hold(view, request)
        return misses

    def _add(self, client: Client, key: bytes) -> CachedView | None:
        """Give a view a slot: a free one, or that of a spare or else a kept view.

        Returns:
            The view, to be decoded; None while requests hold all slots.
        """
        assert client.stream is not None
        offset = self.slab.take()
        if offset is None:
            victim = next(iter(self._spare), None) or self._last_kept(client.stream)
            if victim is None:
                return None
            self._evict(victim)
            offset = self.slab.take()
            assert offset is not None
        row = int.from_bytes(key[:8], "little")
        view = CachedView(key, row, client.stream, client, offset, self.slab.generation(offset))
        self.views[client.images, key] = view
        return view

    def _hold(self, view: CachedView, request: Request) -> None:
        """Let a request hold a view."""
        if not view.is_decoded:
            view.awaited_by.append((request, len(request.views)))
            request.num_pending += 1
        self._spare.pop(view, None)
        view.num_holders += 1
        request.views.append(view)
        request.client.num_held += 1
        if request.is_assigned:
            request.client.unassigned.popleft()
            self._complete_if_answered(request, request.client.last_heard)

    def _complete_if_answered(self, request: Request, now: float) -> None:
        """Queue a request for sending once all its views are there, and count them as received."""
        client = request.client
        if not request.is_answered or client.requests.get(request.number) is not request:
            return
        self.answered.append(request)
        client.last_heard = max(now, client.last_heard)
        client.num_served += request.num_views
        self.counts.served += request.num_views
        client.num_remaining = max(0, client.num_remaining - request.num_views)
        assert client.stream is not None
        remaining = client.remaining.get(client.stream)
        if remaining is not None:
            requested = np.frombuffer(request.payload, REQUESTED)["row"]
            rows, counts = np.unique(requested, return_counts=True)
            # A client may request more than it announced; `wanted` must not fall below zero.
            received = np.minimum(remaining[rows], counts).astype(np.uint8)
            remaining[rows] -= received
            client.stream.wanted[rows] -= received

    def _revoke(self, client: Client, requests: Iterable[Request]) -> None:
        """Let requests hold nothing any more."""
        for request in list(requests):
            del client.requests[request.number]
            for view in request.views:
                if view is not None:
                    view.num_holders -= 1
                    client.num_held -= 1
                    self._settle(view)

    def _settle(self, view: CachedView) -> None:
        """Make a view spare if no client waits for it and no request holds it."""
        if not view.is_decoded:
            return
        if not view.stream.wanted[view.row]:
            view.stream.kept.pop(view, None)
        if view.num_holders == 0 and view not in view.stream.kept:
            self._spare[view] = None

    def _evict(self, view: CachedView) -> None:
        """Forget a view, and give its slot back."""
        assert view.num_holders == 0
        assert view.is_decoded
        del self.views[view.stream.images, view.key]
        view.stream.kept.pop(view, None)
        self._spare.pop(view, None)
        self.slab.give_back(view.offset)

    def _last_kept(self, own: Stream) -> CachedView | None:
        """Find the kept view that will be wanted last.

        Streams share the slots equally: views of the client's own stream are displaced, unless
        another stream keeps more than its share.
        """
        streams = [stream for stream in self._streams.values() if stream.kept]
        richest = max(streams, key=lambda stream: len(stream.kept), default=own)
        if own.kept and len(richest.kept) <= self.slab.num_slots // len(streams):
            richest = own
        return next((view for view in reversed(richest.kept) if view.num_holders == 0), None)


def _precedence(client: Client) -> tuple[int, float]:
    """Sort key: streams that waited longest first, then clients furthest behind."""
    assert client.stream is not None
    return client.stream.last_turn, client.progress
