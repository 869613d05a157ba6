"""Listens for clients on other machines: Arrow Flight, over gRPC with TLS, certificates and tokens.

gRPC calls `do_exchange` in a thread of its own for each client. That thread reads messages and has
the event loop handle one at a time; a client that sends faster than the loop handles waits. A
second thread copies views out of the slab and sends them. Slots are released with the copy: a
client that never reads holds one message, and no slots. After a while its socket is shut down.
"""

import asyncio
import contextlib
import ipaddress
import json
import logging
import os
import queue
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

# gRPC logs a line for every stranger; the variable is read when its library is loaded.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import pyarrow as pa
from pyarrow import flight

from fastprune.base.errors import InvalidValueError
from fastprune.service import wire
from fastprune.service.address import Address
from fastprune.service.credentials import ServerCredentials
from fastprune.service.dispatcher import Dispatcher
from fastprune.service.served_beton import beton_table, find_served
from fastprune.service.slab import Slab
from fastprune.service.streams import Client, Request
from fastprune.service.wire import SLOT_HEADER_BYTES, FrameKind, ServiceError

_LOG = logging.getLogger(__name__)
_Result = TypeVar("_Result")

_MAX_CALLS = 256  # each has two threads, and up to two messages in memory
_STUCK_SECONDS = 60.0  # a message that is not read for so long ends its connection
_FAREWELL_SECONDS = 1.0  # a refused client has so long to leave by itself
_TABLE_ROWS = 1 << 16  # in one message of a beton's table, 1 MB
_LOST = (flight.FlightError, pa.ArrowException, OSError)


class FlightListener:
    """Accepts clients of other machines; see `server.Listener`."""

    def __init__(self, address: Address, dispatcher: Dispatcher, credentials: ServerCredentials):
        """Prepare to listen."""
        self.address = str(address)
        self.dispatcher = dispatcher
        self._requested = address
        self._credentials = credentials
        self._channels: set[FlightChannel] = set()
        self._ending: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Listen.

        Raises:
            InvalidValueError: the port is in use, or a certificate cannot be used.
        """
        self._loop = asyncio.get_running_loop()
        asked = self._requested
        try:
            # gRPC silently shares a port with another server, so the port is tried first.
            found = socket.getaddrinfo(asked.host.strip("[]"), asked.port, type=socket.SOCK_STREAM)
            for family, _, _, _, where in found:
                socket.create_server(where[:2], family=family).close()
            self._service = _FlightService(self, asked, self._credentials)
        except (*_LOST, ValueError) as error:
            text = str(error).partition(". gRPC")[0]
            raise InvalidValueError(f"{asked} cannot be used: {text}.") from error
        self.address = str(Address(asked.scheme, "", asked.host, self._service.port))
        self._watching = asyncio.create_task(self._watch())

    def stop_listening(self) -> None:
        """Accept no more clients; calls in progress continue."""
        if self._ending is None:
            # It ends when the last call has.
            self._ending = asyncio.create_task(asyncio.to_thread(self._service.shutdown))

    async def close(self) -> None:
        """End all calls."""
        if not hasattr(self, "_service"):
            return
        self.stop_listening()
        assert self._ending is not None
        for channel in self._channels:
            channel.refuse("the service ends")
        await asyncio.wait([self._ending], timeout=_FAREWELL_SECONDS)
        while not self._ending.done():
            _shut_down(self._service.port)
            await asyncio.wait([self._ending], timeout=0.1)
        self._watching.cancel()
        await asyncio.gather(self._watching, return_exceptions=True)

    def in_loop(self, function: Callable[..., _Result], *arguments: Any) -> _Result:
        """Call a function in the event loop, from another thread, and wait for its result."""
        future: Future[_Result] = Future()

        def call() -> None:
            try:
                future.set_result(function(*arguments))
            except BaseException as error:
                future.set_exception(error)

        self._loop.call_soon_threadsafe(call)
        return future.result()

    def converse(self, peer: str, hello: bytes, reader: Any, writer: Any) -> None:
        """Serve a client until it leaves; runs in a thread of gRPC."""
        channel = FlightChannel(self, peer)
        sending = threading.Thread(
            target=channel.send_all, args=(writer,), name="fastprune-send", daemon=True
        )
        client = None
        self.in_loop(self._add, channel)
        try:
            try:
                client = self.in_loop(self._admit, hello, channel)
            finally:
                sending.start()
            self._handle_messages(client, channel, reader)
        except ServiceError as error:
            _LOG.info("a client was refused: %s", error)
            self.in_loop(self._remove, client)
            self.in_loop(channel.refuse, str(error))
            with contextlib.suppress(StopIteration, *_LOST):
                # Until the client leaves: if the call ended now, the reason might be lost.
                while True:
                    reader.read_chunk()
        except _LOST:
            pass  # it left
        finally:
            self.in_loop(self._remove, client)
            channel.end()
            sending.join()
            self.in_loop(self._channels.discard, channel)

    def _add(self, channel: "FlightChannel") -> None:
        if len(self._channels) >= _MAX_CALLS:
            raise flight.FlightUnavailableError(f"{_MAX_CALLS} clients are connected already")
        self._channels.add(channel)

    def _admit(self, hello: bytes, channel: "FlightChannel") -> Client:
        wire.require_frame(FrameKind.HELLO, len(hello), (FrameKind.HELLO,))
        client = self.dispatcher.admit(hello, channel.peer, channel)
        channel.slab = self.dispatcher.window_of(client).slab
        channel.view_bytes = 3 * client.images.image_size**2
        return client

    def _remove(self, client: Client | None) -> None:
        if client is not None:
            self.dispatcher.leave(client)

    def _handle_messages(self, client: Client, channel: "FlightChannel", reader: Any) -> None:
        """Have the event loop handle messages, to the end of the stream.

        Raises:
            ServiceError: one cannot be handled.
        """
        max_views = wire.max_message_views(client.images.image_size)
        max_bytes = wire.NUMBER.size + max_views * wire.REQUESTED.itemsize
        kinds = (FrameKind.EPOCH, FrameKind.REQUEST, FrameKind.HEARTBEAT)
        while True:
            try:
                chunk = reader.read_chunk()
            except StopIteration:
                return
            if chunk.data is not None or chunk.app_metadata is None:
                raise ServiceError("a message that is not a frame is not understood")
            data = chunk.app_metadata.to_pybytes()
            kind, payload = wire.split(data, kinds, client.images.num_rows)
            if kind == FrameKind.REQUEST and len(payload) > max_bytes:
                raise ServiceError(f"more than {max_views} views are requested at once")
            if not (channel.is_paused or kind == FrameKind.HEARTBEAT):
                self.in_loop(self.dispatcher.handle, client, kind, payload)

    async def _watch(self) -> None:
        """Disconnect clients that do not read, or were refused and do not leave."""
        while True:
            await asyncio.sleep(0.5)
            now = time.monotonic()
            for channel in self._channels:
                if channel.is_stuck(now):
                    _LOG.info("a client at %s was disconnected", channel.peer)
                    _shut_down(self._service.port, channel.peer)


class FlightChannel:
    """Sends to the client of a call; see `dispatcher.Channel`.

    The event loop puts answers into a queue, which `send_all` empties in a thread of its own.

    Attributes:
        peer: address of the client, as gRPC writes it.
        is_paused: whether its messages are ignored.
        slab: where the views of an admitted client lie; None before.
        view_bytes: of one view.
    """

    def __init__(self, listener: FlightListener, peer: str):
        self.peer = peer
        self.is_paused = False
        self.slab: Slab | None = None
        self.view_bytes = 0
        self._listener = listener
        # Bounded by the requests that a client may have open.
        self._outgoing: queue.SimpleQueue[Request | bytes | None] = queue.SimpleQueue()
        self._writing_since: float | None = None
        self._refused_at: float | None = None

    @property
    def is_flushed(self) -> bool:
        """Whether gRPC has everything."""
        return self._outgoing.empty() and self._writing_since is None

    def send_views(self, request: Request) -> None:
        """Queue views to be copied and sent."""
        self._outgoing.put(request)

    def send_heartbeat(self) -> None:
        """Queue an empty frame, unless an answer is on its way."""
        if self.is_flushed:
            self._outgoing.put(wire.frame(FrameKind.HEARTBEAT))

    def refuse(self, reason: str) -> None:
        """Queue the reason; the client is to leave, or is disconnected."""
        if self._refused_at is None:
            self._refused_at = time.monotonic()
            self._outgoing.put(wire.refused_frame(reason))

    def pause(self) -> None:
        """Ignore the client's messages."""
        self.is_paused = True

    def end(self) -> None:
        """Let the sending thread end after all that is queued."""
        self._outgoing.put(None)

    def is_stuck(self, now: float) -> bool:
        """Whether the client does not read, or was refused and does not leave."""
        writing, refused = self._writing_since, self._refused_at
        return (writing is not None and now - writing > _STUCK_SECONDS) or (
            refused is not None and now - refused > _FAREWELL_SECONDS
        )

    def send_all(self, writer: Any) -> None:
        """Send what is queued, until `end`."""
        schema = wire.views_schema(self.view_bytes)
        with contextlib.suppress(*_LOST):  # it left; the reading thread notices, too
            if self.slab is not None:
                accepted = wire.message_frame(FrameKind.ACCEPTED, wire.Accepted())
                writer.write_metadata(accepted)
                writer.begin(schema)
            while (item := self._outgoing.get()) is not None:
                self._writing_since = time.monotonic()
                if isinstance(item, bytes):
                    writer.write_metadata(item)
                elif (column := self._copy_views(item)) is not None:
                    number, reasons = wire.NUMBER.pack(item.number), wire.pack_reasons(item.reasons)
                    writer.write_with_metadata(
                        pa.RecordBatch.from_arrays([column], schema=schema),
                        wire.frame(FrameKind.VIEWS, number, reasons),
                    )
                self._writing_since = None

    def _copy_views(self, request: Request) -> Any:
        """Copy a request's views, and release its slots; None if slots were reused before."""
        slab, size = self.slab, self.view_bytes
        assert slab is not None
        buffer = pa.allocate_buffer(request.num_views * size)
        pixels = np.frombuffer(buffer, np.uint8).reshape(request.num_views, size)
        for image, view in zip(pixels, request.views, strict=True):
            if view is None:
                image[:] = 0
            else:
                start = view.offset + SLOT_HEADER_BYTES
                image[:] = slab.content[start : start + size]
        # Read after the copies: a generation changes before its slot is overwritten.
        views = [view for view in request.views if view is not None]
        is_whole = all(slab.generation(view.offset) == view.generation for view in views)
        self._listener.in_loop(self._release, request, is_whole)
        if not is_whole:
            return None
        return pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(size), request.num_views, [None, buffer]
        )

    def _release(self, request: Request, is_whole: bool) -> None:
        """Release a request's slots, and request its views again if they were lost."""
        number, dispatcher = wire.NUMBER.pack(request.number), self._listener.dispatcher
        if request.client in dispatcher.channels:
            dispatcher.handle(request.client, FrameKind.RELEASE, number)
            if not is_whole:
                dispatcher.handle(request.client, FrameKind.REQUEST, number + request.payload)


class _FlightService(flight.FlightServerBase):
    """Methods that gRPC calls, each call in a thread of its own."""

    def __init__(self, listener: FlightListener, address: Address, credentials: ServerCredentials):
        self._listener = listener
        tls = address.scheme == "grpc+tls"
        super().__init__(
            str(address),
            tls_certificates=[(credentials.certificate, credentials.key)] if tls else None,
            verify_client=tls and credentials.authorities is not None,
            root_certificates=credentials.authorities if tls else None,
            middleware={"token": _TokenCheck(credentials)},
        )

    def do_exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        """Serve views."""
        self._listener.converse(context.peer(), descriptor.command or b"", reader, writer)

    def do_get(self, context: Any, ticket: Any) -> Any:  # noqa: ARG002
        """Send the table of a beton, which the ticket names."""
        try:
            served = find_served(
                self._listener.dispatcher.betons, ticket.ticket.decode(errors="replace")
            )
        except ServiceError as error:
            raise flight.FlightUnauthorizedError(str(error)) from error
        table = beton_table(served.beton, served.digest)
        batches = table.to_batches(max_chunksize=_TABLE_ROWS)
        return flight.RecordBatchStream(pa.RecordBatchReader.from_batches(table.schema, batches))

    def do_action(self, context: Any, action: Any) -> Iterator[bytes]:  # noqa: ARG002
        """Answer "status", and "ping" with nothing."""
        if action.type == "ping":
            return
        if action.type != "status":
            raise flight.FlightServerError("the action is unknown")
        status = self._listener.in_loop(self._listener.dispatcher.status)
        yield json.dumps(status).encode()


class _TokenCheck(flight.ServerMiddlewareFactory):
    """Refuses calls without a token before any message of them is handled."""

    def __init__(self, credentials: ServerCredentials):
        self._credentials = credentials

    def start_call(self, info: Any, headers: dict[str, list[str]]) -> None:  # noqa: ARG002
        """Check the headers of a call."""
        given = headers.get("authorization", [])
        if not self._credentials.accepts([value for value in given if isinstance(value, str)]):
            raise flight.FlightUnauthenticatedError("the token is missing or not the service's")


def _shut_down(port: int, peer: str | None = None) -> None:
    """Shut down the sockets that were accepted at a port: one peer's, or all.

    gRPC's server cannot end a call whose client neither reads nor leaves. Once the socket is shut
    down, the threads of gRPC that wait for it return.
    """
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            # A duplicate, because gRPC may close the descriptor, and another thread be given its
            # number, between our look and the shutdown.
            descriptor = os.dup(int(link.name))
            try:
                connection = socket.socket(fileno=descriptor)
            except OSError:
                os.close(descriptor)  # not a socket
                continue
            with connection:
                if connection.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                if connection.getsockname()[1] != port:
                    continue
                other = connection.getpeername()  # fails for the listening socket
                if peer is None or _host_and_port(peer) == (_plain_host(other[0]), other[1]):
                    connection.shutdown(socket.SHUT_RDWR)


def _host_and_port(peer: str) -> tuple[str, int]:
    """Split gRPC's name of a peer, such as ipv4:10.0.0.1:4711 or ipv6:%5B::1%5D:4711."""
    host, _, port = urllib.parse.unquote(peer).partition(":")[2].rpartition(":")
    return _plain_host(host.strip("[]")), int(port)


def _plain_host(host: str) -> str:
    """Write an address in one form, whether its socket is of version 4 or 6."""
    found = ipaddress.ip_address(host.partition("%")[0])
    mapped = getattr(found, "ipv4_mapped", None)
    return str(mapped or found)
