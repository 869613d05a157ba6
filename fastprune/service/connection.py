"""A client's connection to a loading service, over a Unix socket or (flight_connection.py) Flight.

The trainer's thread requests views and waits for them. Over a socket it also copies them, from the
slab that the server shares with it.
"""

import fcntl
import mmap
import os
import socket
from itertools import count
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fastprune.service import wire
from fastprune.service.address import Address, parse_address
from fastprune.service.credentials import ClientCredentials
from fastprune.service.wire import FrameKind, Hello, ServiceError, ServiceRefusedError

_HELLO_SECONDS = 1.0
_STATUS_SECONDS = 10.0
_NEEDED_SEALS = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK


class Connection(Protocol):
    """A connection to a service, used for one epoch at a time.

    Every method raises ServiceError if the service is lost.

    Attributes:
        pid: of the process that made it; a forked child must not speak on it.
        max_views: views in one request at most.
    """

    pid: int
    max_views: int

    def announce(self, stream: bytes, rows: NDArray[np.int64], views_per_row: int) -> None:
        """Begin an epoch.

        Args:
            stream: 16 bytes, the same for all clients whose views are drawn in the same way.
            rows: that will be requested.
            views_per_row: how often each.
        """
        ...

    def request(self, requested: NDArray[np.void], images: NDArray[np.uint8]) -> int:
        """Request views.

        Args:
            requested: (n,) of `REQUESTED`, n up to `max_views`.
            images: (n, S, S, 3) uint8, where their pixels are put before `wait` returns.

        Returns:
            The number of the request.
        """
        ...

    def wait(self) -> tuple[int, dict[int, str]]:
        """Wait until all views of a request are in place.

        Returns:
            The number of the request, and by position why a view cannot be decoded.
        """
        ...

    def flush(self) -> None:
        """Send now what else would be sent with the next request."""
        ...

    def is_alive(self) -> bool:
        """Whether the service is there and nothing unexpected arrived between two epochs."""
        ...

    def close(self) -> None:
        """Leave the service, which forgets all that was requested."""
        ...


class UnixConnection:
    """A connection over a Unix socket; see `Connection`."""

    def __init__(self, address: Address, hello: Hello, *, num_rows: int):
        """Connect.

        Raises:
            ServiceError: no service answers.
            ServiceRefusedError: the service does not serve these images.
        """
        self.pid = os.getpid()
        self.max_views = wire.MAX_REQUEST_VIEWS
        self._shape = (hello.image_size, hello.image_size, 3)
        self._num_rows = num_rows
        self._numbers = count()
        self._open: dict[int, tuple[bytes, NDArray[np.uint8]]] = {}
        self._unsent = b""  # releases wait for the next request, to wake the server once for both
        self._socket = _connect(address)
        self._incoming = self._socket.makefile("rb")
        try:
            self._slab = self._greet(hello)
        except BaseException:
            self.close()
            raise
        self._generations = self._slab.view(np.uint64)
        self._socket.settimeout(wire.SERVER_SILENT_SECONDS)

    def announce(self, stream: bytes, rows: NDArray[np.int64], views_per_row: int) -> None:
        """Begin an epoch."""
        self._send(wire.epoch_frame(stream, rows, views_per_row, self._num_rows))

    def request(self, requested: NDArray[np.void], images: NDArray[np.uint8]) -> int:
        """Request views."""
        number = next(self._numbers)
        self._open[number] = requested.tobytes(), images
        self._send_request(number)
        return number

    def wait(self) -> tuple[int, dict[int, str]]:
        """Wait for the views of a request, and copy them out of the slab."""
        self.flush()
        while True:
            kind, payload = self._receive()
            if kind == FrameKind.HEARTBEAT:
                continue
            number = int.from_bytes(payload[: wire.NUMBER.size], "little")
            if kind != FrameKind.VIEWS or number not in self._open:
                raise ServiceError(f"an answer of kind {kind} is not understood")
            is_whole, reasons = self._copy(payload[wire.NUMBER.size :], self._open[number][1])
            self._unsent += wire.frame(FrameKind.RELEASE, wire.NUMBER.pack(number))
            if is_whole:
                del self._open[number]
                return number, reasons
            # We were silent for so long that the server gave the slots to other views.
            self._send_request(number)

    def flush(self) -> None:
        """Send the releases."""
        if self._unsent:
            self._send(b"")

    def is_alive(self) -> bool:
        """Whether the socket is open, and nothing arrived."""
        self._socket.setblocking(False)
        try:
            self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            self._socket.settimeout(wire.SERVER_SILENT_SECONDS)
            return True
        except OSError:
            pass
        return False

    def close(self) -> None:
        """Leave the service."""
        self._incoming.close()
        self._socket.close()

    def _greet(self, hello: Hello) -> NDArray[np.uint8]:
        """Send who we are, and map the slab that the service hands over."""
        self._send(wire.message_frame(FrameKind.HELLO, hello))
        descriptors: list[int] = []
        try:
            # Only the first bytes of the frame carry the descriptor; a buffered read would lose it.
            header, descriptors, _, _ = socket.recv_fds(
                self._socket, wire.HEADER.size, 1, socket.MSG_CMSG_CLOEXEC | socket.MSG_WAITALL
            )
            kind, payload = self._receive(header)
            if kind != FrameKind.ACCEPTED or len(descriptors) != 1:
                raise ServiceError("it does not speak as a loading service does")
            slab_bytes = wire.read_message(payload, wire.Accepted).slab_bytes
            return _map_slab(descriptors[0], slab_bytes)
        except OSError as error:
            raise ServiceError(f"no answer ({error or type(error).__name__})") from error
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _copy(
        self, slots_and_reasons: bytes, images: NDArray[np.uint8]
    ) -> tuple[bool, dict[int, str]]:
        """Copy views out of the slab; return False if slots were reused meanwhile, and reasons."""
        end = len(images) * wire.SLOT.itemsize
        slots = np.frombuffer(slots_and_reasons[:end].ljust(end, b"\xff"), wire.SLOT)
        reasons = wire.read_reasons(slots_and_reasons[end:], len(images))
        is_there = slots["offset"] != wire.NO_SLOT
        there, num_bytes = np.flatnonzero(is_there), images[0].size
        last_offset = len(self._slab) - wire.SLOT_HEADER_BYTES - num_bytes
        # A view without slot and reason would leave the batch's memory as it was.
        if not set(np.flatnonzero(~is_there)) <= set(reasons) or (
            len(there) and int(slots["offset"][there].max()) > last_offset
        ):
            raise ServiceError("an answer does not fit its request")
        offsets = slots["offset"][there].astype(np.int64)
        starts = (offsets + wire.SLOT_HEADER_BYTES).tolist()
        for i, start in zip(there.tolist(), starts, strict=True):
            images[i] = self._slab[start : start + num_bytes].reshape(self._shape)
        # Read after the copies: the server changes a generation before it overwrites the pixels.
        generations = self._generations[offsets // 8]
        return bool((generations == slots["generation"][there]).all()), reasons

    def _send_request(self, number: int) -> None:
        requested = self._open[number][0]
        self._send(wire.frame(FrameKind.REQUEST, wire.NUMBER.pack(number), requested))

    def _send(self, data: bytes) -> None:
        data, self._unsent = self._unsent + data, b""
        try:
            self._socket.sendall(data)
        except OSError as error:
            self._raise_refusal()
            raise ServiceError(f"the connection was lost ({error})") from error

    def _raise_refusal(self) -> None:
        """Raise the reason that a service which refuses sent before it closed, if there is one."""
        try:
            while self._receive()[0] != FrameKind.REFUSED:
                pass
        except ServiceRefusedError:
            raise
        except ServiceError:
            return

    def _receive(self, header: bytes | None = None) -> tuple[int, bytes]:
        """Read the next frame.

        Raises:
            ServiceError: the connection ended, or nothing came for too long.
            ServiceRefusedError: the service ends the connection.
        """
        try:
            header = self._incoming.read(wire.HEADER.size) if header is None else header
            if len(header) < wire.HEADER.size:
                raise ServiceError("the connection was closed")
            kind, length = wire.HEADER.unpack(header)
            wire.require_frame(kind, length, tuple(FrameKind), self._num_rows)
            payload = self._incoming.read(length)
        except OSError as error:
            raise ServiceError(f"nothing was heard ({error})") from error
        if len(payload) < length:
            raise ServiceError("the connection was closed")
        if kind == FrameKind.REFUSED:
            raise ServiceRefusedError(wire.read_message(payload, wire.Refused).reason)
        return kind, payload


def _connect(address: Address) -> socket.socket:
    """Connect to a socket.

    Raises:
        ServiceError: no server listens there.
    """
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(_HELLO_SECONDS)
    try:
        connection.connect(address.path)
    except OSError as error:
        connection.close()
        raise ServiceError(f"no server listens there ({error.strerror or error})") from error
    return connection


def _map_slab(descriptor: int, num_bytes: int | None) -> NDArray[np.uint8]:
    """Map a slab to read.

    Raises:
        ServiceError: its length could change.
    """
    # A file that was cut under the map would end this process with SIGBUS.
    seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    if (
        seals & _NEEDED_SEALS != _NEEDED_SEALS
        or not num_bytes
        or os.fstat(descriptor).st_size != num_bytes
    ):
        raise ServiceError("its memory is not sealed")
    content = mmap.mmap(descriptor, num_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
    return np.frombuffer(content, np.uint8)


def connect(
    address: Address, hello: Hello, *, num_rows: int, credentials: ClientCredentials
) -> Connection:
    """Connect to a service.

    Raises:
        InvalidValueError: a token would be sent in plain text.
        ServiceError: no service answers.
        ServiceRefusedError: the service does not serve these images, or not this client.
    """
    if address.scheme == "unix":
        return UnixConnection(address, hello, num_rows=num_rows)
    from fastprune.service.flight_connection import FlightConnection  # gRPC takes time to load

    return FlightConnection(address, hello, num_rows=num_rows, credentials=credentials)


def ask_status(address: str, *, token: str | None = None) -> dict[str, Any]:
    """Ask a running service for its status; see `dispatcher.Dispatcher.status`.

    Args:
        address: of the service.
        token: for a service that asks for one; None for the environment's.

    Raises:
        InvalidValueError: the address has another form.
        ServiceError: no service answers.
    """
    parsed = parse_address(address)
    try:
        if parsed.scheme != "unix":
            from fastprune.service.flight_connection import ask_status as ask_flight

            return ask_flight(parsed, ClientCredentials.find(token), seconds=_STATUS_SECONDS)
        with _connect(parsed) as connection, connection.makefile("rb") as incoming:
            connection.settimeout(_STATUS_SECONDS)
            connection.sendall(wire.frame(FrameKind.STATUS))
            header = incoming.read(wire.HEADER.size)
            if len(header) == wire.HEADER.size:
                kind, length = wire.HEADER.unpack(header)
                wire.require_frame(kind, length, (FrameKind.STATUS,))
                return wire.read_json(incoming.read(length))
    except (OSError, ServiceError) as error:
        raise ServiceError(f"no service answers at {address}: {error}.") from error
    raise ServiceError(f"{address} is not a loading service.")
