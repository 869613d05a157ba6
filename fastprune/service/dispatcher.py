"""The dispatcher: what clients of every transport request, decoded once for all of them.

It belongs to the event loop: listeners call it there, and only there, so that nothing of it and of
the windows is locked. Decoding threads read the betons and write pixels into slots that no client
was told of yet; they hand each task back to the loop. `pump` sends what is ready and starts what
can be decoded.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from fastprune import __version__
from fastprune.base.checks import require_at_least
from fastprune.base.errors import InvalidValueError, LoadingError
from fastprune.base.threads import WorkerThreads
from fastprune.beton.beton import Beton
from fastprune.decoding.cpu import stored_images
from fastprune.decoding.faults import ALTERED, ChangeDetector, RowFaults
from fastprune.decoding.pixels import RowDecoder
from fastprune.service import wire
from fastprune.service.slab import Slab
from fastprune.service.streams import Client, Images, Request
from fastprune.service.window import Counts, Task, Window, require_room
from fastprune.service.wire import (
    MAX_REASON_CHARACTERS,
    REQUESTED,
    SLOT_HEADER_BYTES,
    FrameKind,
    ServiceError,
    ServiceRefusedError,
)

_LOG = logging.getLogger(__name__)

_MIN_MEMORY_BYTES = 4 << 20
# One task more than there are threads, so that none waits for the event loop.
_TASKS_AHEAD = 1


class Channel(Protocol):
    """Sends to one client, over one transport; used in the event loop alone."""

    @property
    def is_flushed(self) -> bool:
        """Whether everything was sent."""
        ...

    def send_views(self, request: Request) -> None:
        """Answer a request."""
        ...

    def send_heartbeat(self) -> None:
        """Show a client that waits that the service is alive."""
        ...

    def refuse(self, reason: str) -> None:
        """Send why the connection ends, and end it."""
        ...

    def pause(self) -> None:
        """Read nothing more from the client."""
        ...


@dataclass
class Served:
    """A beton that is served."""

    beton: Beton
    digest: str  # by which clients know its images; "" once its file changed
    changes: ChangeDetector = field(init=False)
    faults: RowFaults = field(init=False)  # compares checksums, once for all clients

    def __post_init__(self) -> None:
        self.changes = ChangeDetector(self.beton)
        self.faults = RowFaults(self.beton, skip=True, verify_crc=None)


class Dispatcher:
    """Admits clients, handles their messages, and has views decoded and sent.

    Attributes:
        betons: those served.
        windows: the decoded views, by image size.
        channels: how each client is answered.
        counts: totals over all windows.
    """

    def __init__(
        self, betons: Sequence[Beton], *, memory_bytes: int, num_sizes: int, num_workers: int
    ):
        """Prepare; see `Server`.

        Raises:
            InvalidValueError: a beton has no manifest, or an argument is out of its range.
        """
        if memory_bytes < _MIN_MEMORY_BYTES:
            raise InvalidValueError(
                f"memory must be at least {_MIN_MEMORY_BYTES:,} bytes, not {memory_bytes:,}."
            )
        require_at_least("num_sizes", num_sizes, 1)
        require_at_least("num_workers", num_workers, 1)
        self.betons = [Served(beton, wire.images_digest(beton)) for beton in betons]
        self.windows: dict[int, Window] = {}
        self.channels: dict[Client, Channel] = {}
        self.counts = Counts()
        self._decoders: dict[int, RowDecoder] = {}
        self._images: dict[tuple[int, int], Images] = {}  # by beton and image size
        self._memory_bytes = memory_bytes
        self._num_sizes = num_sizes
        self._num_workers = num_workers
        self._num_running = 0  # tasks that threads have
        self._num_fallbacks = 0
        self._started = time.monotonic()

    def open(self) -> None:
        """Start the decoding threads, in the event loop that owns the dispatcher."""
        self._loop = asyncio.get_running_loop()
        self._threads = WorkerThreads(self._num_workers, name="fastprune-serve")

    def close(self) -> None:
        """End the threads, and free the memory."""
        self._threads.close()
        for window in self.windows.values():
            window.slab.close()

    def admit(self, payload: bytes, peer_name: str, channel: Channel) -> Client:
        """Admit a client.

        Args:
            payload: of its HELLO.
            peer_name: who the transport knows it to be, for people.
            channel: how it is answered.

        Raises:
            ServiceRefusedError: it wants what is not served here.
        """
        try:
            hello = wire.read_message(payload, wire.Hello)
        except ServiceError as error:
            # Most likely a client of another version, whose HELLO has other keys.
            raise ServiceRefusedError(f"{error}; it speaks protocol {wire.PROTOCOL}") from error
        if hello.protocol != wire.PROTOCOL or hello.decoder != wire.decoder_name():
            raise ServiceRefusedError(
                f"the service is {wire.decoder_name()} with protocol {wire.PROTOCOL}, the client "
                f"{hello.decoder:.200} with {hello.protocol!s:.20}; they must be the same for "
                "pixels to be equal"
            )
        image_size = hello.image_size
        digests = [served.digest for served in self.betons]
        if not hello.images or hello.images not in digests:
            names = ", ".join(str(served.beton.path) for served in self.betons)
            raise ServiceRefusedError(f"the images are not those of a served beton ({names})")
        index = digests.index(hello.images)
        window = self._window(image_size)
        beton = self.betons[index].beton
        images = self._images.setdefault(
            (index, image_size),
            Images(str(beton.path), index, beton.widths, beton.heights, image_size),
        )
        name = "".join(c for c in hello.name[:64] if c.isprintable())
        client = window.join(f"{name} ({peer_name})", images, time.monotonic())
        self._num_fallbacks += hello.num_lost > 0
        self.channels[client] = channel
        return client

    def _window(self, image_size: int) -> Window:
        """Find the window of an image size, or make one with an equal share of the memory.

        Raises:
            ServiceRefusedError: the memory has no room for one more client, or for one more size.
        """
        share = self._memory_bytes // self._num_sizes
        window = self.windows.get(image_size)
        require_room(share, image_size, 1 if window is None else len(window.clients) + 1)
        if window is not None:
            return window
        if len(self.windows) == self._num_sizes:
            # Views of a size that no client takes make room.
            unused = [size for size, other in self.windows.items() if not other.clients]
            if not unused:
                sizes = ", ".join(map(str, sorted(self.windows)))
                raise ServiceRefusedError(
                    f"its memory is in use for views of {sizes} pixels; start it with "
                    f"--sizes {self._num_sizes + 1} to keep views of {image_size} pixels as well"
                )
            # A thread may still write into its slab, whose memory lives until it is done.
            self.windows.pop(unused[0]).slab.close()
        window = self.windows[image_size] = Window(Slab(share, image_size), self.counts)
        self._decoders[image_size] = RowDecoder(image_size)
        return window

    def window_of(self, client: Client) -> Window:
        """Return the window that a client takes views from."""
        return self.windows[client.images.image_size]

    def handle(self, client: Client, kind: FrameKind, payload: bytes) -> None:
        """Handle a message.

        Raises:
            ServiceError: it cannot be handled; the connection of this client is to end.
        """
        window, now = self.window_of(client), time.monotonic()
        if kind == FrameKind.REQUEST and len(payload) > wire.NUMBER.size:
            (number,) = wire.NUMBER.unpack_from(payload)
            window.request(client, number, payload[wire.NUMBER.size :], now)
        elif kind == FrameKind.RELEASE and len(payload) == wire.NUMBER.size:
            window.release(client, wire.NUMBER.unpack(payload)[0], now)
        elif kind == FrameKind.EPOCH and len(payload) == wire.max_payload_bytes(
            kind, client.images.num_rows
        ):
            name, times = wire.EPOCH_HEAD.unpack_from(payload)
            bits = np.frombuffer(payload, np.uint8, offset=wire.EPOCH_HEAD.size)
            is_kept = np.unpackbits(bits, count=client.images.num_rows)
            window.announce(client, name, is_kept * np.uint8(min(times, 255)), now)
        else:
            raise ServiceError(f"a frame of kind {kind} has a wrong length of {len(payload)}")
        self.pump()

    def leave(self, client: Client) -> None:
        """Forget a client."""
        if self.channels.pop(client, None) is not None:
            self.window_of(client).leave(client)
            self.pump()

    def pump(self) -> None:
        """Start what can be decoded, and send what is ready."""
        for size, window in list(self.windows.items()):
            tasks = window.advance(self._num_workers + _TASKS_AHEAD - self._num_running)
            for task in tasks:
                self._num_running += 1
                self._threads.submit(self._decode_task, task)
            if tasks:
                # To the end of the line: no image size keeps all threads.
                self.windows[size] = self.windows.pop(size)
            while window.answered:
                request = window.answered.popleft()
                channel = self.channels.get(request.client)
                if channel is not None:  # else it left
                    channel.send_views(request)

    def send_heartbeats(self) -> None:
        """Show clients that wait that the service is alive."""
        for client, channel in self.channels.items():
            if client.num_unanswered:
                channel.send_heartbeat()

    def detach_silent(self, now: float) -> None:
        """Let no client wait for one that was silent for too long."""
        for window in self.windows.values():
            for client in window.detach_silent(now):
                _LOG.info("%s is silent; nothing is kept for it", client.name)

    def refuse_changed_files(self) -> None:
        """Stop serving betons whose files changed since they were opened."""
        for served in self.betons:
            try:
                served.changes.check()
            except LoadingError as error:
                if served.digest:
                    _LOG.error("%s", error)
                served.digest = ""
        for client, channel in list(self.channels.items()):
            if not self.betons[client.images.index].digest:
                channel.refuse("its file changed")

    def status(self) -> dict[str, Any]:
        """Describe the service, for people and monitors."""
        now = time.monotonic()
        window_bytes = [len(w.views) * w.slab.slot_bytes for w in self.windows.values()]
        return {
            "version": __version__,
            "seconds": round(now - self._started, 1),
            "workers": self._num_workers,
            "betons": [str(served.beton.path) for served in self.betons],
            "memory_bytes": self._memory_bytes,
            "window_bytes": sum(window_bytes),
            "window_views": sum(len(window.views) for window in self.windows.values()),
            "views_decoded": self.counts.decoded,
            "views_served": self.counts.served,
            "detached": self.counts.detached,
            "fallbacks": self._num_fallbacks,
            "clients": [_describe(client, now) for client in self.channels],
        }

    def _decode_task(self, task: Task) -> None:
        """Decode a task and hand it back to the event loop; runs in a decoding thread."""
        try:
            reasons = self._decode(task)
        except Exception as error:  # such as a MemoryError: it concerns these views alone
            reason = f"{type(error).__name__}: {error}"
            reasons = dict.fromkeys(range(len(task.views)), reason)
        reasons = {i: text[:MAX_REASON_CHARACTERS] for i, text in reasons.items()}
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._finish, task, reasons)

    def _decode(self, task: Task) -> dict[int, str]:
        """Decode views into their slots; return why some cannot be decoded, by position."""
        requested = np.frombuffer(b"".join(view.key for view in task.views), REQUESTED)
        starts = np.array([view.offset for view in task.views]) + SLOT_HEADER_BYTES
        served = self.betons[task.images.index]
        reasons = (
            self._decoders[task.images.image_size]
            .decode_into(
                stored_images(served.beton, requested["row"]),
                np.ascontiguousarray(requested["view"]),
                task.window.slab.content,
                starts,
            )
            .faults
        )
        for i in np.flatnonzero(served.faults.altered(requested["row"])).tolist():
            reasons.setdefault(i, ALTERED)
        return reasons

    def _finish(self, task: Task, reasons: dict[int, str]) -> None:
        """Take a decoded task back, in the event loop."""
        self._num_running -= 1
        task.window.finish(task, reasons, time.monotonic())
        self.pump()


def _describe(client: Client, now: float) -> dict[str, Any]:
    """Describe a client, for the status."""
    return {
        "name": client.name,
        "beton": client.images.name,
        "image_size": client.images.image_size,
        "epochs": client.num_epochs,
        "position": round(client.progress, 4) if client.stream is not None else 0.0,
        "views": client.num_served,
        "views_per_second": round(client.num_served / max(1e-3, now - client.joined), 1),
        "shared_share": round(client.num_shared / max(1, client.num_served), 4),
        "state": "silent" if client.is_silent else "late" if client.is_late else "together",
    }
