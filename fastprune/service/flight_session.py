"""A client's connection to a loading service on another machine, by Arrow Flight.

A thread belongs to a session: it sends what was asked for, receives views, and copies them to
where the trainer wants them while that does something else. gRPC's calls can wait without an end;
only another thread can cancel them. Sending and receiving are one thread's, by turns: Arrow's
client ends a call from whichever side finds it broken, and two that do so at once abort the
process.
"""

import atexit
import contextlib
import json
import os
import queue
import threading
import weakref
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

# gRPC's log repeats on stderr what errors say; read when its library is loaded.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import pyarrow as pa
from pyarrow import flight

from fastprune.service import wire
from fastprune.service.address import Address, Credentials
from fastprune.service.wire import Kind, ServiceError, ServiceRefusedError

_SILENT_SECONDS = 10.0  # the server says that it is alive every two
_HELLO_SECONDS = 1.5  # with the next address's it must not reach two
_LOST = (flight.FlightError, pa.ArrowException, OSError, ValueError)
_MOST_FRAME_BYTES = 1 << 20  # what a message has beside its views

_used_in: int | None = None  # the process in which gRPC was first used


class FlightSession:
    """A connection to a service, for one epoch at a time; see `service_session.Session`."""

    def __init__(
        self,
        address: Address,
        hello: dict[str, Any],
        *,
        image_size: int,
        num_rows: int,
        credentials: Credentials,
    ):
        """Connect.

        Raises:
            InvalidValueError: a token would be sent in plain text.
            ServiceError: nobody answers.
            ServiceRefusedError: the service does not serve these images, or not this client.
        """
        self.pid = os.getpid()
        self.most_wanted = wire.most_in_message(image_size)
        self._num_rows = num_rows
        self._view_bytes = 3 * image_size**2
        self._schema = wire.views_schema(self._view_bytes)
        self._numbers = count()
        self._open: dict[int, NDArray[np.uint8]] = {}
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._arrived: queue.SimpleQueue[tuple[int, dict[int, str]] | ServiceError | None]
        self._arrived = queue.SimpleQueue()
        most_bytes = self.most_wanted * self._view_bytes + _MOST_FRAME_BYTES
        self._client = connect(address, credentials, most_bytes=most_bytes)
        try:
            # With a time limit, which a call as long as an epoch cannot have; it makes the
            # connection, for which the other call would wait as long as gRPC likes.
            list(self._client.do_action("knock", call_options(credentials, seconds=_HELLO_SECONDS)))
            self._writer, self._reader = self._client.do_exchange(
                flight.FlightDescriptor.for_command(json.dumps(hello).encode()),
                call_options(credentials),
            )
        except _LOST as error:
            self._client.close()
            raise lost(error) from error
        self._thread = threading.Thread(target=self._converse, name="fastprune-views", daemon=True)
        self._thread.start()
        _sessions.add(self)
        try:
            if self._next(_HELLO_SECONDS) is not None:
                raise ServiceError("it does not speak as a loading service does")
        except BaseException:
            self.close()
            raise

    def announce(self, stream: bytes, rows: NDArray[np.int64], views_per_row: int) -> None:
        """Begin an epoch; see `service_session.Session.announce`."""
        self._outgoing.put(wire.epoch_frame(stream, rows, views_per_row, self._num_rows))

    def ask(self, wanted: NDArray[np.void], images: NDArray[np.uint8]) -> int:
        """Ask for views, up to `most_wanted`; see `service_session.Session.ask`."""
        number = next(self._numbers)
        self._open[number] = images
        self._outgoing.put(wire.frame(Kind.ASK, wire.NUMBER.pack(number), wanted.tobytes()))
        return number

    def wait(self) -> tuple[int, dict[int, str]]:
        """Wait until all views of an ask are in place; see `service_session.Session.wait`."""
        while (found := self._next(_SILENT_SECONDS)) is None:
            pass  # a sign of life
        return found

    def flush(self) -> None:
        """Nothing: what was asked for is sent without waiting for more."""

    def is_alive(self) -> bool:
        """Whether the service still listens, and has said nothing since the last epoch."""
        return self._arrived.empty() and self._thread.is_alive()

    def close(self) -> None:
        """Leave the service, which forgets all that was asked for."""
        _sessions.discard(self)
        if self.pid != os.getpid():
            # gRPC's threads are the parent's; whatever is called here may wait for them for ever.
            _abandoned.append(self)
            return
        self._outgoing.put(None)
        self._reader.cancel()
        self._thread.join()  # until then, views may still be copied into batches
        self._client.close()

    def _next(self, seconds: float) -> tuple[int, dict[int, str]] | None:
        """What arrives next; None for a frame without views.

        Raises:
            ServiceError: the service was lost, or nothing comes for too long.
        """
        try:
            found = self._arrived.get(timeout=seconds)
        except queue.Empty:
            raise ServiceError("nothing was heard (timed out)") from None
        if isinstance(found, ServiceError):
            self._arrived.put(found)  # whoever asks again gets it again
            raise found
        return found

    def _converse(self) -> None:
        """Send and receive until there is None to send, in a thread of its own."""
        try:
            # The greeting, a call's descriptor, travels with its first message.
            self._writer.write_metadata(wire.frame(Kind.ALIVE))
            self._arrived.put(self._understood(self._reader.read_chunk()))
            num_awaited = 0  # answers
            while True:
                with contextlib.suppress(queue.Empty):
                    while (frame := self._outgoing.get(block=num_awaited == 0)) is not None:
                        self._writer.write_metadata(frame)
                        num_awaited += wire.HEADER.unpack_from(frame)[0] == Kind.ASK
                    return
                found = self._understood(self._reader.read_chunk())
                num_awaited -= found is not None
                self._arrived.put(found)
        except ServiceError as error:
            self._arrived.put(error)
        except StopIteration:
            self._arrived.put(ServiceError("the connection was closed"))
        except Exception as error:  # whatever it is, the trainer must not wait for more
            self._arrived.put(lost(error))
        finally:
            self._reader.cancel()  # else the next would wait for the service to end the call
            with contextlib.suppress(*_LOST):
                self._writer.close()

    def _understood(self, chunk: Any) -> tuple[int, dict[int, str]] | None:
        """Copy the views that a message holds.

        Returns:
            The number of the ask, and by position why a view cannot be decoded; None for a frame
            without views.

        Raises:
            ServiceError: it is none that fits.
            ServiceRefusedError: the service says why it does not go on.
        """
        data = b"" if chunk.app_metadata is None else chunk.app_metadata.to_pybytes()
        kinds = (Kind.WELCOME, Kind.VIEWS, Kind.ALIVE, Kind.REFUSED)
        kind, payload = wire.split(data, kinds, self._num_rows)
        if kind == Kind.REFUSED:
            raise ServiceRefusedError(str(wire.read_json(payload).get("reason")))
        if kind != Kind.VIEWS:
            return None
        number = int.from_bytes(payload[: wire.NUMBER.size], "little")
        images = self._open.pop(number, None)
        if images is None or chunk.data is None or chunk.data.schema != self._schema:
            raise ServiceError("an answer does not fit the question")
        # Arrow checks no buffer's length when it reads a message.
        chunk.data.validate()
        column = chunk.data.column(0)
        if len(column) != len(images) or column.null_count or column.offset:
            raise ServiceError("an answer does not fit the question")
        content = np.frombuffer(column.buffers()[1], np.uint8, count=images.size)
        images.reshape(-1)[:] = content
        text = payload[wire.NUMBER.size :]
        return number, wire.read_reasons(text, len(images))


# Closed at the end of the process: a thread inside of gRPC must not outlive Python.
_sessions: weakref.WeakSet[FlightSession] = weakref.WeakSet()
_abandoned: list[FlightSession] = []


def _close_sessions() -> None:
    for session in list(_sessions):
        session.close()


atexit.register(_close_sessions)


def connect(address: Address, credentials: Credentials, *, most_bytes: int) -> Any:
    """Make a client; nothing is sent yet.

    Args:
        address: of the service.
        credentials: what it is shown.
        most_bytes: longest message that is received.

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
        ("grpc.max_receive_message_length", most_bytes),
        # A connection of its own for each session: what one leaves unread holds up no other.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_retries", 0),
        ("grpc.min_reconnect_backoff_ms", 1000),  # of which gRPC makes its time to connect
    ]
    tls = {}
    if address.scheme == "grpc+tls":
        tls = {"tls_root_certs": credentials.authorities}
        if credentials.certificate is not None:
            tls |= {"cert_chain": credentials.certificate, "private_key": credentials.key}
    return flight.FlightClient(str(address), generic_options=options, **tls)


def call_options(credentials: Credentials, *, seconds: float | None = None) -> Any:
    """Options of a call: the token, and the longest time for all of it."""
    token = credentials.token
    headers = [] if token is None else [(b"authorization", f"Bearer {token}".encode())]
    return flight.FlightCallOptions(timeout=seconds, headers=headers)


def lost(error: Exception) -> ServiceError:
    """Say in a sentence what gRPC says in many."""
    text = str(error)
    if isinstance(error, flight.FlightUnauthenticatedError):
        return ServiceRefusedError(
            "it refuses the token. Give its token as service_token or in FASTPRUNE_SERVICE_TOKEN"
        )
    if isinstance(error, flight.FlightUnauthorizedError):
        return ServiceRefusedError(_said(text))
    if isinstance(error, flight.FlightTimedOutError):
        return ServiceError("nothing was heard (timed out)")
    if "Connection refused" in text:
        return ServiceError("nobody listens there (Connection refused)")
    if isinstance(error, flight.FlightUnavailableError) and "failed to connect" in text:
        return ServiceError(
            "no connection comes about. One side speaks TLS and the other does not, or one does "
            "not believe the other's certificate (FASTPRUNE_SERVICE_CA, FASTPRUNE_SERVICE_CERT and "
            "_KEY)"
        )
    return ServiceError(f"the connection was lost ({_said(text)})")


def _said(text: str) -> str:
    """The part of gRPC's text that a server wrote."""
    before, _, after = text.partition(" gRPC client debug context")[0].partition("with message: ")
    return (after or before).rstrip(". ")[:300]
