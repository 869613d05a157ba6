"""The window: decoded views, kept as long as somebody who announced them has not taken them.

All of it belongs to one thread, the server's event loop; there are no locks. Invariants:

- A view that an open ask holds is never displaced. A client that was silent for too long loses its
  open asks, and finds out by the generation of the places.
- A view is `kept` by its stream while a client that announced it has not got it; it is `spare`,
  displaced first and longest unused first, once nobody wants it and no ask holds it.
- Who is furthest behind in its cohort can always go on: others leave it a reserve of places, and
  it may displace kept views. Those decoded last go first, for they will be wanted last.
- An ask holds at most 64 views, and each client may hold at least as many: no ask can starve.
"""

import itertools
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastprune.service.demand import Ask, Client, Cohort, Entry, Images, Stream
from fastprune.service.places import Places
from fastprune.service.slab import EXTENT_BYTES, Slab
from fastprune.service.wire import MOST_WANTED, WANTED, ServiceError, ServiceRefusedError

PACES = ("auto", "together", "free")

#: Seconds without a word from a client that waits for nothing, after which it is detached.
SILENT_SECONDS = 10.0
#: Open asks of one client at most; a client of ours has four batches on the way.
_MOST_OPEN = 1024
MOST_TOGETHER = 16  # in one task: about 4 ms of work
_RESERVED_SHARE = 8  # one place in so many is left to whoever is furthest behind
_LATE_SHARE = 4  # who missed more than one in so many of the window's views is late


@dataclass(frozen=True)
class Task:
    """Views to be decoded by one thread, all of the same images."""

    images: Images
    entries: list[Entry]


class Window:
    """A memo of decoded views in a slab.

    Attributes:
        clients: everybody who is connected.
        answers: asks whose views are there, to be sent by the server.
        num_decoded: views decoded so far, also those that could not be.
        num_served: views that clients got.
        num_detached: how often a silent client was detached.
    """

    def __init__(self, slab: Slab, *, pace: str):
        assert pace in PACES
        self.clients: list[Client] = []
        self.answers: deque[Ask] = deque()
        self.num_decoded = self.num_served = self.num_detached = 0
        self._places = Places(slab)
        self._pace = pace
        self._streams: dict[tuple[Images, bytes], Stream] = {}
        self._turns = itertools.count(1)

    @property
    def num_views(self) -> int:
        """Views that the slab holds."""
        return len(self._places.entries)

    @property
    def num_bytes(self) -> int:
        """Bytes of the slab that hold views."""
        return sum(entry.images.place_bytes for entry in self._places.entries.values())

    def join(self, name: str, images: Images, now: float) -> Client:
        """Admit a client.

        Raises:
            ServiceRefusedError: the memory is too small for one more.
        """
        if images.place_bytes > EXTENT_BYTES:
            raise ServiceRefusedError(
                f"views of {images.image_size} pixels are too large for this service"
            )
        slab, needed = self._places.slab, self._places.extents_needed(images.place_bytes)
        if needed > len(slab.extents):
            raise ServiceRefusedError(
                f"its memory of {slab.num_bytes >> 20} MiB is too small for "
                f"{len(self.clients) + 1} clients; start it with --memory "
                f"{needed * EXTENT_BYTES >> 20}MiB or more"
            )
        client = Client(name, images, now, now)
        self.clients.append(client)
        self._places.sizes[images.place_bytes] += 1
        return client

    def leave(self, client: Client) -> None:
        """Forget a client and all that it asked for."""
        self.clients.remove(client)
        self._places.sizes -= Counter([client.images.place_bytes])
        self._revoke(client, client.open.values())
        client.asks.clear()
        self._forget_demand(client)

    def announce(self, client: Client, name: bytes, counts: NDArray[np.uint8], now: float) -> None:
        """Begin an epoch.

        Args:
            client: who begins it.
            name: of the stream of views.
            counts: (N,) how many views of each row it will ask for.
            now: in seconds of a steady clock.

        Raises:
            ServiceError: the epoch before has asks that were not taken.
        """
        if client.open:
            raise ServiceError("an epoch begins before the views of the last one were taken")
        client.last_heard, client.is_silent = now, False
        before, images = client.stream, client.images
        stream = self._streams.get((images, name))
        if stream is None or stream is before:
            # The same stream again, as of central crops: its second epoch is another one.
            stream = Stream(
                name,
                images,
                Cohort() if before is None else before.cohort,
                0 if before is None else before.ordinal + 1,
                np.zeros(images.num_rows, np.uint16),
                np.zeros(images.num_rows, np.bool_),
            )
            self._streams[images, name] = stream
        client.stream, client.announced = stream, counts
        client.num_announced = client.num_remaining = int(counts.sum(dtype=np.int64))
        client.num_epochs += 1
        for other in [s for s in client.remaining if s is not stream]:
            if other.cohort is not stream.cohort or other.ordinal < stream.ordinal:
                self._drop(client, other)
        self._attach(client)
        self._expect_cohorts()
        self._close_streams()

    def ask(self, client: Client, number: int, payload: bytes, now: float) -> None:
        """Ask for views.

        Args:
            client: who asks.
            number: what the client calls it.
            payload: the views, up to `MOST_WANTED` of `WANTED`.
            now: in seconds of a steady clock.

        Raises:
            ServiceError: it cannot be answered; nothing was kept of it.
        """
        if client.stream is None:
            raise ServiceError("views are asked for before an epoch is announced")
        if len(payload) % WANTED.itemsize or len(client.open) >= _MOST_OPEN:
            raise ServiceError("an ask is of a wrong length, or one too many")
        if number in client.open:
            raise ServiceError(f"ask {number} is open already")
        if fault := client.images.fault_of(np.frombuffer(payload, WANTED)):
            raise ServiceError(fault)
        self._hear(client, now)
        ask = Ask(client, number, payload)
        client.open[number] = ask
        client.asks.append(ask)

    def take(self, client: Client, number: int, now: float) -> None:
        """Note that a client copied the views of an ask, which may have been revoked meanwhile.

        Raises:
            ServiceError: the ask was not answered yet.
        """
        self._hear(client, now)
        ask = client.open.get(number)
        if ask is None:
            return
        if not ask.is_assigned or ask.num_pending:
            raise ServiceError(f"ask {number} is taken before it was answered")
        self._revoke(client, [ask])

    def detach_silent(self, now: float) -> list[Client]:
        """Keep nothing any more for clients that wait for nothing and have long said nothing."""
        detached = []
        for client in self.clients:
            is_silent = now - client.last_heard > SILENT_SECONDS and not client.num_unanswered
            if is_silent and not client.is_silent:
                client.is_silent = True
                self._revoke(client, client.open.values())
                if self._forget_demand(client):
                    self.num_detached += 1
                    detached.append(client)
        return detached

    def advance(self, num_idle: int) -> list[Task]:
        """Find what was asked for, and what must be decoded.

        Cohorts take turns; within a cohort, whoever is furthest behind goes first.

        Args:
            num_idle: threads that could decode.

        Returns:
            At most so many tasks.
        """
        tasks: list[Task] = []
        asking = [client for client in self.clients if client.asks]
        for client in sorted(asking, key=_precedence):
            while entries := self._assign(client, num_idle - len(tasks)):
                tasks.append(Task(client.images, entries))
                assert client.stream is not None
                client.stream.cohort.turn = next(self._turns)
        return tasks

    def finish(self, task: Task, reasons: dict[int, str], now: float) -> None:
        """Note that the views of a task are there.

        Args:
            task: from `advance`.
            reasons: by position in the task, why a view could not be decoded.
            now: in seconds of a steady clock.
        """
        self.num_decoded += len(task.entries)
        for i, entry in enumerate(task.entries):
            entry.is_decoded = True
            for ask, position in entry.awaiting:
                if ask.client.open.get(ask.number) is not ask:
                    continue  # its client left
                ask.num_pending -= 1
                if i in reasons:
                    ask.entries[position] = None
                    ask.reasons[position] = reasons[i]
                    ask.client.num_lent -= 1
                self._answer_if_whole(ask, now)
            entry.awaiting = []
            if i in reasons:
                # Nobody holds it, and whoever asks next has it tried again.
                entry.num_lent = 0
                self._places.evict(entry)
                continue
            entry.stream.passed[entry.row] = True
            if entry.stream.wanted[entry.row]:
                entry.stream.kept[entry] = None
            self._places.settle(entry)

    def _hear(self, client: Client, now: float) -> None:
        """Note a word from a client; one that had been silent takes part again."""
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
        here = [e for e in client.images.memo.values() if e.stream is stream]
        num_missed = np.count_nonzero(stream.passed & (counts > 0)) - len({e.row for e in here})
        client.is_late = int(num_missed) > self._places.capacity(client.images) // _LATE_SHARE
        if not client.is_late:
            self._want(client, stream, counts)

    def _want(self, client: Client, stream: Stream, counts: NDArray[np.uint8]) -> None:
        """Count a client's rows among those wanted of a stream."""
        client.remaining[stream] = counts.copy()
        stream.wanted += counts
        for entry in stream.images.memo.values():
            if entry.stream is stream and entry.is_decoded and counts[entry.row]:
                stream.kept[entry] = None
                self._places.hold(entry)

    def _drop(self, client: Client, stream: Stream) -> bool:
        """Count a client's rows no more; whether they had been."""
        counts = client.remaining.pop(stream, None)
        if counts is None:
            return False
        stream.wanted -= counts
        for entry in [e for e in stream.kept if not stream.wanted[e.row]]:
            self._places.settle(entry)
        return True

    def _forget_demand(self, client: Client) -> bool:
        """Keep nothing for a client any more; whether anything had been."""
        dropped = [self._drop(client, stream) for stream in list(client.remaining)]
        self._close_streams()
        return any(dropped)

    def _expect_cohorts(self) -> None:
        """Keep views of a cohort's new stream also for its clients that are one stream behind.

        They will want what they wanted of the last one, most likely.
        """
        for stream in self._streams.values():
            for client in self.clients:
                last = client.stream
                if last is None or client.is_silent or stream in client.remaining:
                    continue
                if last.cohort is stream.cohort and last.ordinal == stream.ordinal - 1:
                    assert client.announced is not None
                    self._want(client, stream, client.announced)

    def _close_streams(self) -> None:
        """Forget streams in which nobody is any more."""
        used = {client.stream for client in self.clients}
        for client in self.clients:
            used.update(client.remaining)
        self._streams = {key: s for key, s in self._streams.items() if s in used}

    def _assign(self, client: Client, num_idle: int) -> list[Entry]:
        """Hold what a client asked for, in order, as far as it is there or can be decoded now.

        Returns:
            What is to be decoded, up to a chunk; nothing if no thread is idle.
        """
        misses: list[Entry] = []
        memo = client.images.memo
        most_lent = max(MOST_WANTED, self._places.capacity(client.images) // len(self.clients))
        while client.asks and client.num_lent < most_lent:
            ask = client.asks[0]
            position = len(ask.entries)
            key = ask.payload[position * WANTED.itemsize : (position + 1) * WANTED.itemsize]
            entry = memo.get(key)
            if entry is None:
                if num_idle <= 0 or len(misses) == MOST_TOGETHER:
                    break
                offset = self._place_for(client)
                if offset is None:
                    break
                assert client.stream is not None
                row = int.from_bytes(key[:8], "little")
                entry = self._places.put(offset, key, row, client.stream, client)
                misses.append(entry)
            elif entry.client is not client:
                client.num_shared += 1
            self._lend(entry, ask)
        return misses

    def _lend(self, entry: Entry, ask: Ask) -> None:
        """Let an ask hold a view."""
        if not entry.is_decoded:
            entry.awaiting.append((ask, len(ask.entries)))
            ask.num_pending += 1
        elif entry.num_lent == 0:
            self._places.hold(entry)
        entry.num_lent += 1
        ask.entries.append(entry)
        ask.client.num_lent += 1
        if ask.is_assigned:
            ask.client.asks.popleft()
            self._answer_if_whole(ask, ask.client.last_heard)

    def _answer_if_whole(self, ask: Ask, now: float) -> None:
        """Queue an ask for sending once all of its views are there, and count them as got."""
        client = ask.client
        if not ask.is_assigned or ask.num_pending or client.open.get(ask.number) is not ask:
            return
        self.answers.append(ask)
        client.last_heard = max(now, client.last_heard)
        client.num_served += ask.num_views
        self.num_served += ask.num_views
        rows, counts = np.unique(np.frombuffer(ask.payload, WANTED)["row"], return_counts=True)
        client.num_remaining = max(0, client.num_remaining - ask.num_views)
        assert client.stream is not None
        remaining = client.remaining.get(client.stream)
        if remaining is not None:
            got = np.minimum(remaining[rows], counts).astype(np.uint8)
            remaining[rows] -= got
            client.stream.wanted[rows] -= got

    def _revoke(self, client: Client, asks: Iterable[Ask]) -> None:
        """Let asks hold nothing any more."""
        for ask in list(asks):
            del client.open[ask.number]
            for entry in ask.entries:
                if entry is not None:
                    entry.num_lent -= 1
                    client.num_lent -= 1
                    self._places.settle(entry)

    def _place_for(self, client: Client) -> int | None:
        """A place for one more view, or None while a client has to wait for one."""
        images = client.images
        places, size = self._places, images.place_bytes
        is_last = self._is_last(client)
        is_led = self._pace == "together" and not is_last
        if is_led and places.num_left(size) <= places.capacity(images) // _RESERVED_SHARE:
            return None
        if (offset := places.take(size)) is not None:
            return offset
        victim = places.oldest_spare(size)
        if victim is None and (is_last or self._pace != "together"):
            victim = self._last_kept(client)
        if victim is None:
            return None
        places.evict(victim)
        return places.slab.take(size)

    def _last_kept(self, client: Client) -> Entry | None:
        """The kept view that will be wanted last, of a cohort that has more than its share.

        Cohorts share the places of one size equally; a client displaces views of its own cohort
        unless another one has more than that.
        """
        size = client.images.place_bytes
        streams = [s for s in self._streams.values() if s.kept and s.images.place_bytes == size]
        assert client.stream is not None
        own = client.stream.cohort
        kept = Counter({own: 0})
        for stream in streams:
            kept[stream.cohort] += len(stream.kept)
        richest = max(kept, key=kept.__getitem__)
        if kept[richest] <= self._places.capacity(client.images) // len(kept) and kept[own]:
            richest = own
        latest = sorted((s for s in streams if s.cohort is richest), key=lambda s: -s.ordinal)
        entries = itertools.chain.from_iterable(reversed(s.kept) for s in latest)
        return next((entry for entry in entries if entry.num_lent == 0), None)

    def _is_last(self, client: Client) -> bool:
        """Whether nobody that takes part in a client's cohort is further behind."""
        assert client.stream is not None
        cohort, position = client.stream.cohort, client.position
        return all(
            other.position >= position
            for other in self.clients
            if other.stream is not None
            and other.stream.cohort is cohort
            and not (other.is_silent or other.is_late)
        )


def _precedence(client: Client) -> tuple[int, int, float]:
    """Who goes first among those that ask."""
    assert client.stream is not None
    return (client.stream.cohort.turn, *client.position)
