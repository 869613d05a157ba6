"""The server of a loading service: clients on a Unix socket, one event loop, decoding threads.

The event loop owns the window and all connections. Decoding threads get tasks from it and hand
them back to it; they share nothing else. Every conversation is one coroutine: it reads a frame,
changes the window, and lets `_pump` send what became ready and start what can be decoded.
"""

import asyncio
import contextlib
import json
import logging
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from fastprune import __version__
from fastprune.beton.reader import Beton
from fastprune.checks import require_at_least, require_one_of
from fastprune.errors import LoadingError
from fastprune.loading import service_wire as wire
from fastprune.loading.faults import FileWatch
from fastprune.loading.service_wire import Kind, ServiceError, ServiceRefusedError
from fastprune.service import unix
from fastprune.service.decoding import Decoders
from fastprune.service.demand import Ask, Client, Images
from fastprune.service.metrics import Monitor
from fastprune.service.slab import Slab
from fastprune.service.window import PACES, Task, Window

_LOG = logging.getLogger(__name__)

_HELLO_SECONDS = 10.0
_ALIVE_SECONDS = 2.0
_LOG_SECONDS = 60.0
_DRAIN_SECONDS = 10.0
_MOST_CONNECTIONS = 1024
# A client that asks and never reads: its answers are small, but not for nothing.
_MOST_UNREAD_BYTES = 4 << 20
# Tasks beyond those that threads work at, so that none waits for the event loop.
_TASKS_AHEAD = 1


class Server:
    """Serves views of betons on one Unix socket.

    Attributes:
        monitor: what answers monitors while the server runs, if that was asked for.
    """

    def __init__(
        self,
        betons: Sequence[Beton],
        address: str,
        *,
        memory_bytes: int,
        num_workers: int,
        pace: str = "auto",
        metrics: str | None = None,
    ):
        """Prepare; `run` listens.

        Args:
            betons: the open betons.
            address: unix:PATH.
            memory_bytes: of the slab.
            num_workers: decoding threads.
            pace: "auto", "together" or "free", see docs/service.md.
            metrics: HOST:PORT of /metrics and /healthz; None for neither.

        Raises:
            InvalidValueError: a beton has no manifest, or an argument is outside its domain.
        """
        require_one_of("pace", pace, PACES)
        require_at_least("num_workers", num_workers, 1)
        self._path = Path(wire.socket_path(address))
        self._betons = [Served(beton, wire.images_digest(beton)) for beton in betons]
        self._images: dict[tuple[str, int], Images] = {}
        self._slab = Slab(memory_bytes)
        self._window = Window(self._slab, pace=pace)
        self._pace = pace
        self._metrics = metrics
        self.monitor: Monitor | None = None
        self._num_workers = num_workers
        self._num_running = 0  # tasks that threads have
        self._writers: dict[Client, asyncio.StreamWriter] = {}
        self._talks: set[asyncio.Task[None]] = set()
        self._num_fallbacks = 0
        self._started = time.monotonic()

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT, as `serve` does."""
        stopping = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stopping.set)
        await self.serve(stopping)

    async def serve(self, stopping: asyncio.Event) -> None:
        """Serve until told to stop; then answer what was asked for, and return.

        Raises:
            InvalidValueError: another service listens at the address.
        """
        self._loop = asyncio.get_running_loop()
        listening = unix.listening_socket(self._path)
        self._decoders = Decoders(
            [served.beton for served in self._betons],
            self._slab.content,
            num_threads=self._num_workers,
            done=self._hand_over,
        )
        server = await asyncio.start_unix_server(self._accept, sock=listening)
        ticking = asyncio.create_task(self._tick())
        try:
            if self._metrics is not None:
                self.monitor = Monitor(self._metrics, self.status, self._loop)
                _LOG.info("metrics at port %d", self.monitor.port)
            _LOG.info("listening at unix:%s", self._path)
            await stopping.wait()
            # First of all, so that whoever comes now finds the next server.
            server.close()
            self._path.unlink(missing_ok=True)
            await self._drain()
        finally:
            server.close()
            self._path.unlink(missing_ok=True)
            for task in (ticking, *self._talks):
                task.cancel()
            await asyncio.gather(ticking, *self._talks, return_exceptions=True)
            if self.monitor is not None:
                # In a thread: it may wait for an answer of this loop.
                await asyncio.to_thread(self.monitor.close)
            self._decoders.close()
            self._slab.close()
        _LOG.info("%d views were decoded, %d served", *self._counts())

    def status(self) -> dict[str, Any]:
        """What the server does, for people and monitors."""
        window, now = self._window, time.monotonic()
        return {
            "version": __version__,
            "seconds": round(now - self._started, 1),
            "pace": self._pace,
            "workers": self._num_workers,
            "betons": [str(served.beton.path) for served in self._betons],
            "memory_bytes": self._slab.num_bytes,
            "window_bytes": window.num_bytes,
            "window_views": window.num_views,
            "views_decoded": window.num_decoded,
            "views_served": window.num_served,
            "detached": window.num_detached,
            "fallbacks": self._num_fallbacks,
            "clients": [_describe(client, now) for client in window.clients],
        }

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Talk with whoever connected, until one of both ends it."""
        task = asyncio.current_task()
        assert task is not None
        self._talks.add(task)
        try:
            await self._talk(reader, writer)
        except ServiceError as error:
            _LOG.info("a client was refused: %s", error)
            writer.write(wire.json_frame(Kind.REFUSED, {"reason": str(error)}))
        except (OSError, EOFError, TimeoutError, asyncio.CancelledError):
            pass  # it left, or the server ends
        finally:
            self._talks.discard(task)
            writer.close()
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await writer.wait_closed()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Greet a client, then do what it says.

        Raises:
            ServiceError: it says what cannot be done; it alone is to end.
        """
        unix.require_own_user(writer.get_extra_info("socket"))
        if len(self._talks) > _MOST_CONNECTIONS:
            raise ServiceRefusedError(f"{_MOST_CONNECTIONS} clients are connected already")
        async with asyncio.timeout(_HELLO_SECONDS):
            kind, payload = await unix.read_frame(reader, (Kind.HELLO, Kind.STATUS))
        if kind == Kind.STATUS:
            writer.write(wire.json_frame(Kind.STATUS, self.status()))
            await writer.drain()
            return
        client = self._greet(wire.read_json(payload), writer)
        try:
            unix.send_welcome(writer, self._slab)
            self._writers[client] = writer
            while True:
                kinds = (Kind.EPOCH, Kind.ASK, Kind.TAKEN)
                kind, payload = await unix.read_frame(reader, kinds, client.images.num_rows)
                self._obey(client, kind, payload)
                self._pump()
        finally:
            self._writers.pop(client, None)
            self._window.leave(client)
            self._pump()

    def _greet(self, hello: dict[str, Any], writer: asyncio.StreamWriter) -> Client:
        """Admit a client.

        Raises:
            ServiceRefusedError: it wants what is not served here.
        """
        if hello.get("protocol") != wire.PROTOCOL or hello.get("decoder") != wire.decoder_name():
            raise ServiceRefusedError(
                f"the service is {wire.decoder_name()}, the client {hello.get('decoder')!s:.200}; "
                "they must be the same for pixels to be equal"
            )
        image_size = hello.get("image_size")
        indices = [
            i for i, served in enumerate(self._betons) if served.digest == str(hello.get("images"))
        ]
        if not indices or not isinstance(image_size, int) or image_size < 1:
            names = ", ".join(str(served.beton.path) for served in self._betons)
            raise ServiceRefusedError(f"the images are others than those served, of {names}")
        index = indices[0]
        served = self._betons[index]
        images = self._images.get((served.digest, image_size))
        if images is None:
            beton = served.beton
            images = Images(str(beton.path), index, beton.widths, beton.heights, image_size)
        pid, uid, _ = unix.peer(writer.get_extra_info("socket"))
        name = "".join(c for c in str(hello.get("name"))[:64] if c.isprintable())
        client = self._window.join(f"{name} (pid {pid}, uid {uid})", images, time.monotonic())
        self._images[served.digest, image_size] = images
        self._num_fallbacks += 1 if hello.get("num_lost") else 0
        return client

    def _obey(self, client: Client, kind: Kind, payload: bytes) -> None:
        """Do what a client says.

        Raises:
            ServiceError: it cannot be done.
        """
        window, now = self._window, time.monotonic()
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

    def _pump(self) -> None:
        """Start what can be decoded, and send what is ready."""
        window = self._window
        for task in window.advance(self._num_workers + _TASKS_AHEAD - self._num_running):
            self._num_running += 1
            self._decoders.submit(task)
        while window.answers:
            ask = window.answers.popleft()
            writer = self._writers.get(ask.client)
            if writer is None:
                continue  # it left
            writer.write(_views(ask))
            if writer.transport.get_write_buffer_size() > _MOST_UNREAD_BYTES:
                writer.transport.abort()  # its conversation ends, and frees what it held

    def _hand_over(self, task: Task, reasons: dict[int, str]) -> None:
        """Bring a task back from a decoding thread to the event loop."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._finish, task, reasons)

    def _finish(self, task: Task, reasons: dict[int, str]) -> None:
        self._num_running -= 1
        self._window.finish(task, reasons, time.monotonic())
        self._pump()

    async def _tick(self) -> None:
        """Do what is to be done now and then."""
        last_alive = last_log = time.monotonic()
        before = self._counts()
        while True:
            await asyncio.sleep(1)
            now = time.monotonic()
            for client in self._window.detach_silent(now):
                _LOG.info("%s is silent; the others do not wait for it", client.name)
            self._refuse_changed_files()
            self._pump()
            if now - last_alive >= _ALIVE_SECONDS:
                last_alive = now
                for client, writer in self._writers.items():
                    if client.num_unanswered:
                        writer.write(wire.frame(Kind.ALIVE))
            if now - last_log >= _LOG_SECONDS:
                decoded, served = self._counts()
                _LOG.info(
                    "%d clients; %.0f views/s decoded, %.0f served; window %d MiB of %d",
                    len(self._writers),
                    (decoded - before[0]) / (now - last_log),
                    (served - before[1]) / (now - last_log),
                    self._window.num_bytes >> 20,
                    self._slab.num_bytes >> 20,
                )
                last_log, before = now, (decoded, served)

    def _refuse_changed_files(self) -> None:
        """Serve betons no more that are not the files that were opened."""
        for served in self._betons:
            try:
                served.watch.check()
            except LoadingError as error:
                if served.digest:
                    _LOG.error("%s", error)
                served.digest = ""
        indices = {i for i, served in enumerate(self._betons) if not served.digest}
        for client, writer in list(self._writers.items()):
            if client.images.index in indices:
                writer.write(wire.json_frame(Kind.REFUSED, {"reason": "its file changed"}))
                writer.close()

    async def _drain(self) -> None:
        """Answer what was asked for, for a while."""
        for writer in self._writers.values():
            cast("asyncio.Transport", writer.transport).pause_reading()
        deadline = time.monotonic() + _DRAIN_SECONDS
        while time.monotonic() < deadline and any(c.num_unanswered for c in self._writers):
            await asyncio.sleep(0.01)
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(max(0.1, deadline - time.monotonic())):
                await asyncio.gather(*(writer.drain() for writer in self._writers.values()))

    def _counts(self) -> tuple[int, int]:
        return self._window.num_decoded, self._window.num_served


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
    watch: FileWatch = field(init=False)

    def __post_init__(self) -> None:
        self.watch = FileWatch(self.beton)


def ask_status(address: str) -> dict[str, Any]:
    """What a running service does; see `Server.status`.

    Raises:
        ServiceError: nobody answers.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_HELLO_SECONDS)
        try:
            connection.connect(wire.socket_path(address))
            connection.sendall(wire.frame(Kind.STATUS))
            with connection.makefile("rb") as incoming:
                header = incoming.read(wire.HEADER.size)
                if len(header) == wire.HEADER.size:
                    kind, length = wire.HEADER.unpack(header)
                    if kind == Kind.STATUS and length <= wire.most_bytes(kind):
                        return wire.read_json(incoming.read(length))
        except OSError as error:
            raise ServiceError(f"no service answers at {address}: {error}.") from error
    raise ServiceError(f"what listens at {address} is no loading service.")


def _views(ask: Ask) -> bytes:
    """The frame that answers an ask."""
    places = np.full(ask.num_views, 0, wire.PLACE)
    places["offset"] = [wire.NOWHERE if e is None else e.offset for e in ask.entries]
    places["generation"] = [0 if e is None else e.generation for e in ask.entries]
    reasons = json.dumps(ask.reasons).encode() if ask.reasons else b""
    return wire.frame(Kind.VIEWS, wire.NUMBER.pack(ask.number), places.tobytes(), reasons)


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
