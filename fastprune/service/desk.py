"""The desk of a service: what clients of every transport want passes over it, to one window.

It belongs to the event loop. Decoding threads get tasks from it and hand them back to the loop;
transports call it in the loop alone. `pump` sends what became ready and starts what can be decoded.
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
from fastprune.base.errors import LoadingError
from fastprune.beton.beton import Beton
from fastprune.decoding.faults import ChangeDetector
from fastprune.service import wire
from fastprune.service.decoding import Decoders
from fastprune.service.demand import Ask, Client, Images
from fastprune.service.slab import Slab
from fastprune.service.window import Task, Window
from fastprune.service.wire import Kind, ServiceError, ServiceRefusedError

_LOG = logging.getLogger(__name__)

# Tasks beyond those that threads work at, so that none waits for the event loop.
_TASKS_AHEAD = 1


class Peer(Protocol):
    """The other end of a conversation, over one transport; used in the event loop alone."""

    @property
    def is_flushed(self) -> bool:
        """Whether everything was sent."""
        ...

    def send_views(self, ask: Ask) -> None:
        """Send the answer to an ask, or begin to."""
        ...

    def send_alive(self) -> None:
        """Say that the service lives, to a client that waits."""
        ...

    def refuse(self, reason: str) -> None:
        """Say why the conversation ends, and end it."""
        ...

    def pause(self) -> None:
        """Take no more orders."""
        ...


@dataclass
class Served:
    """A beton that is served.

    Attributes:
        beton: open.
        digest: what clients know its images by; empty once its file changed.
        watch: notices that.
    """

    beton: Beton
    digest: str
    watch: ChangeDetector = field(init=False)

    def __post_init__(self) -> None:
        self.watch = ChangeDetector(self.beton)


class Desk:
    """Admits clients, does what they say, and has them answered.

    Attributes:
        betons: what is served.
        slab: where views lie.
        window: which views are kept.
        peers: how each client is answered.
    """

    def __init__(self, betons: Sequence[Beton], *, memory_bytes: int, num_workers: int, pace: str):
        """Prepare; see `Server`.

        Raises:
            InvalidValueError: a beton has no manifest, or the memory is too small.
        """
        self.betons = [Served(beton, wire.images_digest(beton)) for beton in betons]
        self.slab = Slab(memory_bytes)
        self.window = Window(self.slab, pace=pace)
        self.peers: dict[Client, Peer] = {}
        self._images: dict[tuple[str, int], Images] = {}
        self._pace = pace
        self._num_workers = num_workers
        self._num_running = 0  # tasks that threads have
        self._num_fallbacks = 0
        self._started = time.monotonic()

    def open(self) -> None:
        """Start the decoding threads, in the event loop that owns the desk."""
        self._loop = asyncio.get_running_loop()
        self._decoders = Decoders(
            [served.beton for served in self.betons],
            self.slab.content,
            num_threads=self._num_workers,
            done=self._hand_over,
        )

    def close(self) -> None:
        """End the threads, and give the memory back."""
        self._decoders.close()
        self.slab.close()

    def admit(self, hello: dict[str, Any], whence: str, peer: Peer) -> Client:
        """Admit a client.

        Args:
            hello: who it says it is, and what it wants.
            whence: what the transport knows of it, for people.
            peer: how it is answered.

        Raises:
            ServiceRefusedError: it wants what is not served here.
        """
        if hello.get("protocol") != wire.PROTOCOL or hello.get("decoder") != wire.decoder_name():
            raise ServiceRefusedError(
                f"the service is {wire.decoder_name()} with protocol {wire.PROTOCOL}, the client "
                f"{hello.get('decoder')!s:.200} with {hello.get('protocol')!s:.20}; they must be "
                "the same for pixels to be equal"
            )
        image_size = hello.get("image_size")
        indices = [
            i for i, served in enumerate(self.betons) if served.digest == str(hello.get("images"))
        ]
        if not indices or not isinstance(image_size, int) or image_size < 1:
            names = ", ".join(str(served.beton.path) for served in self.betons)
            raise ServiceRefusedError(f"the images are others than those served, of {names}")
        index = indices[0]
        served = self.betons[index]
        images = self._images.get((served.digest, image_size))
        if images is None:
            beton = served.beton
            images = Images(str(beton.path), index, beton.widths, beton.heights, image_size)
        name = "".join(c for c in str(hello.get("name"))[:64] if c.isprintable())
        client = self.window.join(f"{name} ({whence})", images, time.monotonic())
        self._images[served.digest, image_size] = images
        self._num_fallbacks += 1 if hello.get("num_lost") else 0
        self.peers[client] = peer
        return client

    def obey(self, client: Client, kind: Kind, payload: bytes) -> None:
        """Do what a client says.

        Raises:
            ServiceError: it cannot be done; this client alone is to end.
        """
        window, now = self.window, time.monotonic()
        if kind == Kind.ASK and len(payload) > wire.NUMBER.size:
            (number,) = wire.NUMBER.unpack_from(payload)
            window.ask(client, number, payload[wire.NUMBER.size :], now)
        elif kind == Kind.TAKEN and len(payload) == wire.NUMBER.size:
            window.take(client, wire.NUMBER.unpack(payload)[0], now)
        elif kind == Kind.EPOCH and len(payload) == wire.most_bytes(kind, client.images.num_rows):
            name, times = wire.EPOCH_HEAD.unpack_from(payload)
            bits = np.frombuffer(payload, np.uint8, offset=wire.EPOCH_HEAD.size)
            is_wanted = np.unpackbits(bits, count=client.images.num_rows)
            window.announce(client, name, is_wanted * np.uint8(min(times, 255)), now)
        else:
            raise ServiceError(f"a frame of kind {kind} has a wrong length of {len(payload)}")
        self.pump()

    def leave(self, client: Client) -> None:
        """Forget a client."""
        if self.peers.pop(client, None) is not None:
            self.window.leave(client)
            self.pump()

    def pump(self) -> None:
        """Start what can be decoded, and send what is ready."""
        window = self.window
        for task in window.advance(self._num_workers + _TASKS_AHEAD - self._num_running):
            self._num_running += 1
            self._decoders.submit(task)
        while window.answers:
            ask = window.answers.popleft()
            peer = self.peers.get(ask.client)
            if peer is not None:  # else it left
                peer.send_views(ask)

    def send_alive(self) -> None:
        """Say to clients that wait that the service lives."""
        for client, peer in self.peers.items():
            if client.num_unanswered:
                peer.send_alive()

    def refuse_changed_files(self) -> None:
        """Serve betons no more that are not the files that were opened."""
        for served in self.betons:
            try:
                served.watch.check()
            except LoadingError as error:
                if served.digest:
                    _LOG.error("%s", error)
                served.digest = ""
        indices = {i for i, served in enumerate(self.betons) if not served.digest}
        for client, peer in list(self.peers.items()):
            if client.images.index in indices:
                peer.refuse("its file changed")

    def status(self) -> dict[str, Any]:
        """What the service does, for people and monitors."""
        window, now = self.window, time.monotonic()
        return {
            "version": __version__,
            "seconds": round(now - self._started, 1),
            "pace": self._pace,
            "workers": self._num_workers,
            "betons": [str(served.beton.path) for served in self.betons],
            "memory_bytes": self.slab.num_bytes,
            "window_bytes": window.num_bytes,
            "window_views": window.num_views,
            "views_decoded": window.num_decoded,
            "views_served": window.num_served,
            "detached": window.num_detached,
            "fallbacks": self._num_fallbacks,
            "clients": [_describe(client, now) for client in window.clients],
        }

    def _hand_over(self, task: Task, reasons: dict[int, str]) -> None:
        """Bring a task back from a decoding thread to the event loop."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._finish, task, reasons)

    def _finish(self, task: Task, reasons: dict[int, str]) -> None:
        self._num_running -= 1
        self.window.finish(task, reasons, time.monotonic())
        self.pump()


def _describe(client: Client, now: float) -> dict[str, Any]:
    """A client's line in the status."""
    return {
        "name": client.name,
        "beton": client.images.name,
        "image_size": client.images.image_size,
        "epochs": client.num_epochs,
        "position": round(client.position[1], 4) if client.stream is not None else 0.0,
        "views": client.num_served,
        "views_per_second": round(client.num_served / max(1e-3, now - client.joined), 1),
        "shared_share": round(client.num_shared / max(1, client.num_served), 4),
        "state": "silent" if client.is_silent else "late" if client.is_late else "together",
    }
