"""Arrow Flight: lets clients of other machines in, over gRPC with TLS, certificates and tokens.

gRPC calls `do_exchange` in a thread of its own for each client. That thread reads what the client
says and hands it to the event loop, one frame at a time: a client that says more than the loop
takes waits. A second thread gathers views from the slab and sends them. A message is copied before
it is sent, and its views are given back with the copy: a client that never reads holds one message,
and is cut off.
"""

import asyncio
import contextlib
import ipaddress
import json
import logging
import os
import queue
import socket
import stat
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

# gRPC's log has a line for each stranger who knocks; read when its library is loaded.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import pyarrow as pa
from pyarrow import flight

from fastprune.base.errors import InvalidValueError
from fastprune.service import wire
from fastprune.service.address import Address
from fastprune.service.catalog import beton_table, find_served
from fastprune.service.demand import Ask, Client
from fastprune.service.desk import Desk
from fastprune.service.locks import Locks
from fastprune.service.wire import GUARD_BYTES, Kind, ServiceError

_LOG = logging.getLogger(__name__)
_Result = TypeVar("_Result")

_MOST_CALLS = 256  # a call has two threads, and up to two messages
_STUCK_SECONDS = 60.0  # of a message that is not read
_FAREWELL_SECONDS = 1.0  # from REFUSED until a client that does not leave is cut off
_TABLE_ROWS = 1 << 16  # in a message, 1 MB
_LOST = (flight.FlightError, pa.ArrowException, OSError)


class FlightDoor:
    """Lets clients in over the network; see `server.Door`."""

    def __init__(self, address: Address, desk: Desk, locks: Locks):
        """Prepare to listen."""
        self.address = str(address)
        self.desk = desk
        self._wanted = address
        self._locks = locks
        self._peers: set[FlightPeer] = set()
        self._ending: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Listen.

        Raises:
            InvalidValueError: the port is in use, or a certificate is none.
        """
        self._loop = asyncio.get_running_loop()
        host, port = self._wanted.host.strip("[]"), self._wanted.port
        try:
            # gRPC shares a port with another server without a word.
            for family, _, _, _, where in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
                socket.create_server(where[:2], family=family).close()
            self._service = _Service(self, self._wanted, self._locks)
        except (*_LOST, ValueError) as error:
            text = str(error).partition(". gRPC")[0]
            raise InvalidValueError(f"{self._wanted} cannot be used: {text}.") from error
        self.address = str(Address(self._wanted.scheme, "", self._wanted.host, self._service.port))
        self._watching = asyncio.create_task(self._watch())

    def stop_listening(self) -> None:
        """Let nobody in any more; calls that run go on."""
        if self._ending is None:
            # It ends when the last call has.
            self._ending = asyncio.create_task(asyncio.to_thread(self._service.shutdown))

    async def close(self) -> None:
        """End all calls."""
        if not hasattr(self, "_service"):
            return
        self.stop_listening()
        assert self._ending is not None
        for peer in self._peers:
            peer.refuse("the service ends")
        await asyncio.wait([self._ending], timeout=_FAREWELL_SECONDS)
        while not self._ending.done():
            _cut(self._service.port)
            await asyncio.wait([self._ending], timeout=0.1)
        self._watching.cancel()
        await asyncio.gather(self._watching, return_exceptions=True)

    def in_loop(self, function: Callable[..., _Result], *arguments: Any) -> _Result:
        """Call in the event loop, from another thread, and wait for what comes of it."""
        future: Future[_Result] = Future()

        def call() -> None:
            try:
                future.set_result(function(*arguments))
            except BaseException as error:
                future.set_exception(error)

        self._loop.call_soon_threadsafe(call)
        return future.result()

    def converse(self, whence: str, hello: bytes, reader: Any, writer: Any) -> None:
        """Do what a client says until it leaves, in a thread of gRPC's."""
        peer = FlightPeer(self, whence)
        self.in_loop(self._enter, peer)
        try:
            try:
                client = self.in_loop(self._admit, hello, peer)
            except ServiceError as error:
                _LOG.info("a client was refused: %s", error)
                peer.refuse(str(error))
                peer.end()
                peer.send_all(writer)
                _read_to_the_end(reader)
            else:
                self._serve(client, peer, reader, writer)
        except _LOST:
            pass  # it left
        finally:
            self.in_loop(self._peers.discard, peer)

    def _enter(self, peer: "FlightPeer") -> None:
        if len(self._peers) >= _MOST_CALLS:
            raise flight.FlightUnavailableError(f"{_MOST_CALLS} clients are connected already")
        self._peers.add(peer)

    def _admit(self, hello: bytes, peer: "FlightPeer") -> Client:
        if len(hello) > wire.most_bytes(Kind.HELLO):
            raise ServiceError(f"a greeting of {len(hello):,} bytes is not understood")
        return self.desk.admit(wire.read_json(hello), peer.whence, peer)

    def _serve(self, client: Client, peer: "FlightPeer", reader: Any, writer: Any) -> None:
        """Have a client answered by a thread of its own, and listen to it."""
        sending = threading.Thread(
            target=peer.send_all,
            args=(writer, client.images.image_size),
            name="fastprune-send",
            daemon=True,
        )
        sending.start()
        try:
            self._listen(client, peer, reader)
        except ServiceError as error:
            _LOG.info("a client was refused: %s", error)
            self.in_loop(self.desk.leave, client)
            self.in_loop(peer.refuse, str(error))
            _read_to_the_end(reader)
        finally:
            self.in_loop(self.desk.leave, client)
            peer.end()
            sending.join()

    def _listen(self, client: Client, peer: "FlightPeer", reader: Any) -> None:
        """Read frames, and have them obeyed, to the end of the stream.

        Raises:
            ServiceError: one cannot be done.
        """
        most_wanted = wire.most_in_message(client.images.image_size)
        while True:
            try:
                chunk = reader.read_chunk()
            except StopIteration:
                return
            if chunk.data is not None or chunk.app_metadata is None:
                raise ServiceError("a message that is no frame is not understood")
            kinds, num_rows = (Kind.EPOCH, Kind.ASK, Kind.ALIVE), client.images.num_rows
            kind, payload = wire.split(chunk.app_metadata.to_pybytes(), kinds, num_rows)
            if kind == Kind.ASK and len(payload) > most_wanted * wire.WANTED.itemsize + 4:
                raise ServiceError(f"more than {most_wanted} views are asked for at once")
            if not (peer.is_paused or kind == Kind.ALIVE):
                self.in_loop(self.desk.obey, client, kind, payload)

    async def _watch(self) -> None:
        """Cut off those who do not read, or do not leave."""
        while True:
            await asyncio.sleep(0.5)
            now = time.monotonic()
            for peer in self._peers:
                if peer.is_stuck(now):
                    _LOG.info("a client at %s was cut off", peer.whence)
                    _cut(self._service.port, peer.whence)


class FlightPeer:
    """The other end of a call; see `desk.Peer`."""

    def __init__(self, door: FlightDoor, whence: str):
        self.whence = whence
        self.is_paused = False
        self._door = door
        # As long as the asks that a client may have open, and short frames now and then.
        self._outgoing: queue.SimpleQueue[Ask | bytes | None] = queue.SimpleQueue()
        self._writing_since: float | None = None
        self._refused_at: float | None = None

    @property
    def is_flushed(self) -> bool:
        """Whether gRPC has everything."""
        return self._outgoing.empty() and self._writing_since is None

    def send_views(self, ask: Ask) -> None:
        """Have views gathered and sent."""
        self._outgoing.put(ask)

    def send_alive(self) -> None:
        """Send a frame that says nothing else, if nothing waits to be sent."""
        if self.is_flushed:
            self._outgoing.put(wire.frame(Kind.ALIVE))

    def refuse(self, reason: str) -> None:
        """Say why; the client is to leave, or is cut off."""
        if self._refused_at is None:
            self._refused_at = time.monotonic()
            self._outgoing.put(wire.json_frame(Kind.REFUSED, {"reason": reason}))

    def pause(self) -> None:
        """Ignore what comes."""
        self.is_paused = True

    def end(self) -> None:
        """Let the sending thread end after what waits."""
        self._outgoing.put(None)

    def is_stuck(self, now: float) -> bool:
        """Whether the client does not read, or was refused and does not leave."""
        writing, refused = self._writing_since, self._refused_at
        return (writing is not None and now - writing > _STUCK_SECONDS) or (
            refused is not None and now - refused > _FAREWELL_SECONDS
        )

    def send_all(self, writer: Any, image_size: int = 0) -> None:
        """Send what there is to send until the end; a welcome first to whoever was admitted."""
        size = 3 * image_size**2
        schema = wire.views_schema(size)
        with contextlib.suppress(*_LOST):  # it left; the reading thread finds out, too
            if image_size:
                writer.write_metadata(wire.json_frame(Kind.WELCOME, {}))
                writer.begin(schema)
            while (what := self._outgoing.get()) is not None:
                self._writing_since = time.monotonic()
                if isinstance(what, bytes):
                    writer.write_metadata(what)
                elif (column := self._gathered(what, size)) is not None:
                    batch = pa.RecordBatch.from_arrays([column], schema=schema)
                    writer.write_with_metadata(batch, _answer(what))
                self._writing_since = None

    def _gathered(self, ask: Ask, size: int) -> Any:
        """Copy an ask's views; None if they were displaced, and are asked for again."""
        slab = self._door.desk.slab
        buffer = pa.allocate_buffer(ask.num_views * size)
        pixels = np.frombuffer(buffer, np.uint8).reshape(ask.num_views, size)
        for image, entry in zip(pixels, ask.entries, strict=True):
            if entry is None:
                image[:] = 0
            else:
                start = entry.offset + GUARD_BYTES
                image[:] = slab.content[start : start + size]
        # Read after the copies: a place's generation changes before it is used again.
        is_whole = all(e is None or slab.generation(e.offset) == e.generation for e in ask.entries)
        self._door.in_loop(self._took, ask, is_whole)
        if not is_whole:
            return None
        buffers = [None, buffer]
        return pa.FixedSizeBinaryArray.from_buffers(pa.binary(size), ask.num_views, buffers)

    def _took(self, ask: Ask, is_whole: bool) -> None:
        """Give back what an ask holds; ask again if that was lost before it was copied."""
        number, desk = wire.NUMBER.pack(ask.number), self._door.desk
        if ask.client in desk.peers:
            desk.obey(ask.client, Kind.TAKEN, number)
            if not is_whole:
                desk.obey(ask.client, Kind.ASK, number + ask.payload)


class _Service(flight.FlightServerBase):
    """What gRPC calls."""

    def __init__(self, door: FlightDoor, address: Address, locks: Locks):
        self._door = door
        tls = address.scheme == "grpc+tls"
        super().__init__(
            str(address),
            tls_certificates=[(locks.certificate, locks.key)] if tls else None,
            verify_client=tls and locks.authorities is not None,
            root_certificates=locks.authorities if tls else None,
            middleware={"guard": _Guard(locks)},
        )

    def do_exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        """Talk with a client."""
        self._door.converse(context.peer(), descriptor.command or b"", reader, writer)

    def get_flight_info(self, context: Any, descriptor: Any) -> Any:  # noqa: ARG002
        """Describe the table of a beton."""
        name = b"/".join(descriptor.path or []).decode(errors="replace")
        table = self._table(name)
        endpoints = [flight.FlightEndpoint(name.encode(), [])]
        return flight.FlightInfo(
            table.schema, descriptor, endpoints, table.num_rows, table.get_total_buffer_size()
        )

    def do_get(self, context: Any, ticket: Any) -> Any:  # noqa: ARG002
        """Give the table of a beton."""
        table = self._table(ticket.ticket.decode(errors="replace"))
        batches = table.to_batches(max_chunksize=_TABLE_ROWS)
        return flight.RecordBatchStream(pa.RecordBatchReader.from_batches(table.schema, batches))

    def _table(self, name: str) -> pa.Table:
        try:
            return beton_table(find_served(self._door.desk.betons, name))
        except ServiceError as error:
            raise flight.FlightUnauthorizedError(str(error)) from error

    def do_action(self, context: Any, action: Any) -> Iterator[bytes]:  # noqa: ARG002
        """Answer "status", and "knock" with nothing: whoever asks only tries the door."""
        if action.type == "knock":
            return
        if action.type != "status":
            raise flight.FlightServerError("there is no such action")
        yield json.dumps(self._door.in_loop(self._door.desk.status)).encode()


class _Guard(flight.ServerMiddlewareFactory):
    """Refuses calls without a token, before anything of them is read."""

    def __init__(self, locks: Locks):
        self._locks = locks

    def start_call(self, info: Any, headers: dict[str, list[str]]) -> None:  # noqa: ARG002
        """Look at the headers of a call."""
        given = headers.get("authorization", [])
        if not self._locks.fits([value for value in given if isinstance(value, str)]):
            raise flight.FlightUnauthenticatedError("the token is missing or not the service's")


def _read_to_the_end(reader: Any) -> None:
    """Wait until a client that was refused leaves: a call that ends sooner may lose the reason."""
    with contextlib.suppress(StopIteration):
        while True:
            reader.read_chunk()


def _answer(ask: Ask) -> bytes:
    """The frame beside an ask's views."""
    reasons = json.dumps(ask.reasons).encode() if ask.reasons else b""
    return wire.frame(Kind.VIEWS, wire.NUMBER.pack(ask.number), reasons)


def _cut(port: int, whence: str | None = None) -> None:
    """Cut the connections that came in at a port; of one peer, or all.

    gRPC's server has no way to end a call whose client neither reads nor leaves. Once the socket
    is shut, its threads that wait for it return.
    """
    for link in Path("/proc/self/fd").iterdir():
        # A copy, so that nobody closes it and uses its number anew between the look and the cut.
        with contextlib.suppress(OSError):
            copy = os.dup(int(link.name))
            try:
                if stat.S_ISSOCK(os.fstat(copy).st_mode):
                    _cut_one(copy, port, whence)
            finally:
                os.close(copy)


def _cut_one(descriptor: int, port: int, whence: str | None) -> None:
    # Detached, for the descriptor is not its own.
    connection = socket.socket(fileno=descriptor)
    try:
        if connection.family not in (socket.AF_INET, socket.AF_INET6):
            return
        if connection.getsockname()[1] == port:
            other = connection.getpeername()  # fails for the one that listens
            if whence is None or _host_and_port(whence) == (_plain_host(other[0]), other[1]):
                connection.shutdown(socket.SHUT_RDWR)
    finally:
        connection.detach()


def _host_and_port(whence: str) -> tuple[str, int]:
    """The two in gRPC's name of a peer, such as ipv4:10.0.0.1:4711 or ipv6:%5B::1%5D:4711."""
    host, _, port = urllib.parse.unquote(whence).partition(":")[2].rpartition(":")
    return _plain_host(host.strip("[]")), int(port)


def _plain_host(host: str) -> str:
    found = ipaddress.ip_address(host.partition("%")[0])
    mapped = getattr(found, "ipv4_mapped", None)
    return str(mapped or found)
