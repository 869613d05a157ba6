"""A client's connection to a loading service on another machine, by Arrow Flight.

Each connection has a thread of its own. It sends requests, receives views and copies them into the
batches while the trainer works; `wait` reads the results from a queue. A call of gRPC may block
forever, and only another thread can cancel it. Sending and receiving share that one thread, in
turns: Arrow's client ends a call from whichever side finds it broken, and when two threads do so at
once, the process aborts.
"""

import atexit
import contextlib
import os
import queue
import threading
import weakref
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

# gRPC repeats every error on stderr; the variable is read when its library is loaded.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import pyarrow as pa
from pyarrow import flight

from fastprune.service import wire
from fastprune.service.address import Address
from fastprune.service.credentials import ClientCredentials
from fastprune.service.wire import FrameKind, Hello, ServiceError, ServiceRefusedError

_HELLO_SECONDS = 1.5  # two seconds must be enough to reach the next address
_LOST = (flight.FlightError, pa.ArrowException, OSError, ValueError)
_MAX_FRAME_BYTES = 1 << 20  # metadata of a message, beside its views
_TIMED_OUT = "nothing was heard (timed out)"

_Result = tuple[int, dict[int, str]]
_used_in: int | None = None  # the process in which gRPC was first used


class FlightConnection:
    """A connection over Arrow Flight; see `connection.Connection`."""

    def __init__(
        self, address: Address, hello: Hello, *, num_rows: int, credentials: ClientCredentials
    ):
        """Connect; raises as `connection.connect`."""
        self.pid = os.getpid()
        self.max_views = wire.max_message_views(hello.image_size)
        self._num_rows = num_rows
        view_bytes = 3 * hello.image_size**2
        self._schema = wire.views_schema(view_bytes)
        self._numbers = count()
        self._open: dict[int, NDArray[np.uint8]] = {}
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        # None is a frame without views, a sign of life.
        self._arrived: queue.SimpleQueue[_Result | ServiceError | None] = queue.SimpleQueue()
        max_bytes = self.max_views * view_bytes + _MAX_FRAME_BYTES
        self._client = make_client(address, credentials, max_bytes=max_bytes)
        try:
            # An action makes the connection, because it can have a time limit. The exchange lasts
            # an epoch and cannot; it would wait for a connection as long as gRPC likes.
            list(self._client.do_action("ping", call_options(credentials, seconds=_HELLO_SECONDS)))
            self._writer, self._reader = self._client.do_exchange(
                flight.FlightDescriptor.for_command(hello.model_dump_json().encode()),
                call_options(credentials),
            )
        except _LOST as error:
            self._client.close()
            raise as_service_error(error) from error
        self._thread = threading.Thread(target=self._converse, name="fastprune-views", daemon=True)
        self._thread.start()
        _connections.add(self)
        try:
            if self._next(_HELLO_SECONDS) is not None:
                raise ServiceError("it does not speak as a loading service does")
        except BaseException:
            self.close()
            raise

    def announce(self, stream: bytes, rows: NDArray[np.int64], views_per_row: int) -> None:
        """Begin an epoch."""
        self._outgoing.put(wire.epoch_frame(stream, rows, views_per_row, self._num_rows))

    def request(self, requested: NDArray[np.void], images: NDArray[np.uint8]) -> int:
        """Request views."""
        number = next(self._numbers)
        self._open[number] = images
        payload = wire.NUMBER.pack(number), requested.tobytes()
        self._outgoing.put(wire.frame(FrameKind.REQUEST, *payload))
        return number

    def wait(self) -> _Result:
        """Wait for the views of a request."""
        while (found := self._next(wire.SERVER_SILENT_SECONDS)) is None:
            pass
        return found

    def flush(self) -> None:
        """Do nothing: requests are sent at once."""

    def is_alive(self) -> bool:
        """Whether the call goes on, and nothing arrived."""
        return self._arrived.empty() and self._thread.is_alive()

    def close(self) -> None:
        """Leave the service."""
        _connections.discard(self)
        if self.pid != os.getpid():
            # gRPC's threads stayed in the parent; any call here, even a destructor's, may wait for
            # them forever.
            _abandoned.append(self)
            return
        self._outgoing.put(None)
        self._reader.cancel()
        self._thread.join()  # until then it may copy views into batches
        self._client.close()

    def _next(self, seconds: float) -> _Result | None:
        """Return what arrives next; None for a frame without views.

        Raises:
            ServiceError: the service was lost, or nothing came for too long.
        """
        try:
            found = self._arrived.get(timeout=seconds)
        except queue.Empty:
            raise ServiceError(_TIMED_OUT) from None
        if isinstance(found, ServiceError):
            self._arrived.put(found)  # for the next call
            raise found
        return found

    def _converse(self) -> None:
        """Send and receive until there is None to send, in a thread of its own."""
        try:
            # The call's descriptor, HELLO, travels with its first message.
            self._writer.write_metadata(wire.frame(FrameKind.HEARTBEAT))
            self._arrived.put(self._read(self._reader.read_chunk()))
            num_awaited = 0  # answers
            while True:
                with contextlib.suppress(queue.Empty):
                    while (frame := self._outgoing.get(block=num_awaited == 0)) is not None:
                        self._writer.write_metadata(frame)
                        num_awaited += wire.HEADER.unpack_from(frame)[0] == FrameKind.REQUEST
                    return
                found = self._read(self._reader.read_chunk())
                num_awaited -= found is not None
                self._arrived.put(found)
        except ServiceError as error:
            self._arrived.put(error)
        except StopIteration:
            self._arrived.put(ServiceError("the connection was closed"))
        except Exception as error:  # of any kind: the trainer must not wait for more
            self._arrived.put(as_service_error(error))
        finally:
            self._reader.cancel()  # else `close` would wait until the service ends the call
            with contextlib.suppress(*_LOST):
                self._writer.close()

    def _read(self, chunk: Any) -> _Result | None:
        """Copy the views of a message into their batch.

        Returns:
            The number of the request, and by position why a view cannot be decoded; None for a
            frame without views.

        Raises:
            ServiceError: it does not fit.
            ServiceRefusedError: the service ends the connection.
        """
        data = b"" if chunk.app_metadata is None else chunk.app_metadata.to_pybytes()
        kinds = (FrameKind.ACCEPTED, FrameKind.VIEWS, FrameKind.HEARTBEAT, FrameKind.REFUSED)
        kind, payload = wire.split(data, kinds, self._num_rows)
        if kind == FrameKind.REFUSED:
            raise ServiceRefusedError(wire.read_message(payload, wire.Refused).reason)
        if kind != FrameKind.VIEWS:
            return None
        number = int.from_bytes(payload[: wire.NUMBER.size], "little")
        images = self._open.pop(number, None)
        if images is None or chunk.data is None or chunk.data.schema != self._schema:
            raise ServiceError("an answer does not fit its request")
        # Reading a message, Arrow checks no length of a buffer.
        chunk.data.validate()
        column = chunk.data.column(0)
        if len(column) != len(images) or column.null_count or column.offset:
            raise ServiceError("an answer does not fit its request")
        content = np.frombuffer(column.buffers()[1], np.uint8, count=images.size)
        images.reshape(-1)[:] = content
        return number, wire.read_reasons(payload[wire.NUMBER.size :], len(images))


# Closed at the end of the process: a thread inside gRPC must not outlive the interpreter.
_connections: weakref.WeakSet[FlightConnection] = weakref.WeakSet()
_abandoned: list[FlightConnection] = []


def _close_connections() -> None:
    for each in list(_connections):
        each.close()


atexit.register(_close_connections)


def make_client(address: Address, credentials: ClientCredentials, *, max_bytes: int) -> Any:
    """Make a Flight client; nothing is sent yet.

    Args:
        address: of the service.
        credentials: shown to it.
        max_bytes: longest message that is received.

    Raises:
        InvalidValueError: a token would be sent in plain text.
        ServiceError: gRPC cannot be used in this process.
    """
    global _used_in
    credentials.require_safe(address)
    if _used_in not in (None, os.getpid()):
        raise ServiceError(
            "a process that was forked from one with a connection cannot have its own (start "
            "processes by spawn)"
        )
    _used_in = os.getpid()
    options = [
        ("grpc.max_receive_message_length", max_bytes),
        # A TCP connection for each client: what one leaves unread holds up no other.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_retries", 0),
        ("grpc.min_reconnect_backoff_ms", 1000),  # gRPC derives its time to connect from it
    ]
    tls = {}
    if address.scheme == "grpc+tls":
        tls = {"tls_root_certs": credentials.authorities}
        if credentials.certificate is not None:
            tls |= {"cert_chain": credentials.certificate, "private_key": credentials.key}
    return flight.FlightClient(str(address), generic_options=options, **tls)


def call_options(credentials: ClientCredentials, *, seconds: float | None = None) -> Any:
    """Make the options of a call: the token, and a time limit for all of it."""
    token = credentials.token
    headers = [] if token is None else [(b"authorization", f"Bearer {token}".encode())]
    return flight.FlightCallOptions(timeout=seconds, headers=headers)


def ask_status(
    address: Address, credentials: ClientCredentials, *, seconds: float
) -> dict[str, Any]:
    """Ask a service for its status; see `connection.ask_status`."""
    max_bytes = wire.max_payload_bytes(FrameKind.STATUS)
    with make_client(address, credentials, max_bytes=max_bytes) as client:
        try:
            results = list(client.do_action("status", call_options(credentials, seconds=seconds)))
        except Exception as error:
            raise as_service_error(error) from error
    return wire.read_json(results[0].body.to_pybytes() if results else b"")


def as_service_error(error: Exception) -> ServiceError:
    """Turn an error of gRPC, which takes many sentences, into one of ours."""
    text = str(error)
    if isinstance(error, flight.FlightUnauthenticatedError):
        return ServiceRefusedError(
            "it refuses the token. Pass its token to open_beton or in FASTPRUNE_SERVICE_TOKEN"
        )
    if isinstance(error, flight.FlightUnauthorizedError):
        return ServiceRefusedError(_server_text(text))
    if isinstance(error, flight.FlightTimedOutError):
        return ServiceError(_TIMED_OUT)
    if "Connection refused" in text:
        return ServiceError("no server listens there (Connection refused)")
    if isinstance(error, flight.FlightUnavailableError) and "failed to connect" in text:
        return ServiceError(
            "the connection cannot be made. One side speaks TLS and the other does not, or one "
            "does not trust the other's certificate (FASTPRUNE_SERVICE_CA, FASTPRUNE_SERVICE_CERT "
            "and _KEY)"
        )
    return ServiceError(f"the connection was lost ({_server_text(text)})")


def _server_text(text: str) -> str:
    """Cut the part that a server wrote out of gRPC's text."""
    before, _, after = text.partition(" gRPC client debug context")[0].partition("with message: ")
    return (after or before).rstrip(". ")[:300]
