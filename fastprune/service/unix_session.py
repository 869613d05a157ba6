"""A client's connection to a loading service: it asks for views, and copies them from the slab."""

import fcntl
import mmap
import os
import socket
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastprune.service import wire
from fastprune.service.wire import Kind, ServiceError, ServiceRefusedError

_SILENT_SECONDS = 10.0  # the server says that it is alive every two
_HELLO_SECONDS = 1.0
_NEEDED_SEALS = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK


class Session:
    """A connection to a service, for one epoch at a time."""

    def __init__(self, address: str, hello: dict[str, Any], *, image_size: int, num_rows: int):
        """Connect.

        Raises:
            ServiceError: nobody answers.
            ServiceRefusedError: the service does not serve these images.
        """
        self.pid = os.getpid()
        self.most_wanted = wire.MOST_WANTED
        self._shape = (image_size, image_size, 3)
        self._num_rows = num_rows
        self._numbers = count()
        self._open: dict[int, tuple[bytes, NDArray[np.uint8]]] = {}
        self._taken = b""  # frames that wait for the next one, to wake the service once for both
        self._socket = _connected(address)
        self._incoming = self._socket.makefile("rb")
        try:
            self._slab = self._greet(hello)
        except BaseException:
            self.close()
            raise
        self._generations = self._slab.view(np.uint64)
        self._socket.settimeout(_SILENT_SECONDS)

    def announce(self, stream: bytes, rows: NDArray[np.int64], views_per_row: int) -> None:
        """Begin an epoch.

        Args:
            stream: 16 bytes, the same for all whose views are drawn in the same way.
            rows: that will be asked for.
            views_per_row: how often.
        """
        self._send(wire.epoch_frame(stream, rows, views_per_row, self._num_rows))

    def ask(self, wanted: NDArray[np.void], images: NDArray[np.uint8]) -> int:
        """Ask for views.

        Args:
            wanted: (n,) of `WANTED`, n up to `MOST_WANTED`.
            images: (n, S, S, 3) uint8, where to put them.

        Returns:
            The number of the ask, for `wait`.
        """
        number = next(self._numbers)
        self._open[number] = wanted.tobytes(), images
        self._send(wire.frame(Kind.ASK, wire.NUMBER.pack(number), self._open[number][0]))
        return number

    def wait(self) -> tuple[int, dict[int, str]]:
        """Wait until all views of an ask are in place.

        Returns:
            Its number, and by position why a view cannot be decoded.

        Raises:
            ServiceError: the service was lost.
        """
        self.flush()
        while True:
            kind, payload = self._receive()
            if kind == Kind.ALIVE:
                continue
            number = int.from_bytes(payload[: wire.NUMBER.size], "little")
            if kind != Kind.VIEWS or number not in self._open:
                raise ServiceError(f"an answer of kind {kind} is not understood")
            asked, images = self._open.pop(number)
            is_whole, reasons = self._copy(payload[wire.NUMBER.size :], images)
            self._taken += wire.frame(Kind.TAKEN, wire.NUMBER.pack(number))
            if is_whole:
                return number, reasons
            # We had been silent for so long that the service used the memory for others.
            self._open[number] = asked, images
            self._send(wire.frame(Kind.ASK, wire.NUMBER.pack(number), asked))

    def flush(self) -> None:
        """Say now which views were taken."""
        if self._taken:
            self._send(b"")

    def is_alive(self) -> bool:
        """Whether the service still listens, and has said nothing since the last epoch."""
        self._socket.setblocking(False)
        try:
            self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            self._socket.settimeout(_SILENT_SECONDS)
            return True
        except OSError:
            pass
        return False

    def close(self) -> None:
        """Leave the service, which forgets all that was asked for."""
        self._incoming.close()
        self._socket.close()

    def _greet(self, hello: dict[str, Any]) -> NDArray[np.uint8]:
        """Say who we are, and map the slab that the service hands over."""
        self._send(wire.json_frame(Kind.HELLO, hello))
        descriptors: list[int] = []
        try:
            header, descriptors, _, _ = socket.recv_fds(
                self._socket, wire.HEADER.size, 1, socket.MSG_CMSG_CLOEXEC | socket.MSG_WAITALL
            )
            kind, payload = self._receive(header)
            if kind != Kind.WELCOME or len(descriptors) != 1:
                raise ServiceError("it does not speak as a loading service does")
            return _mapped(descriptors[0], wire.read_json(payload).get("slab_bytes"))
        except OSError as error:
            raise ServiceError(f"no answer ({error or type(error).__name__})") from error
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _copy(
        self, places_and_reasons: bytes, images: NDArray[np.uint8]
    ) -> tuple[bool, dict[int, str]]:
        """Copy views out of the slab; whether they are what was announced, and the reasons."""
        end = len(images) * wire.PLACE.itemsize
        places = np.frombuffer(places_and_reasons[:end].ljust(end, b"\xff"), wire.PLACE)
        reasons = wire.read_reasons(places_and_reasons[end:], len(images))
        is_there = places["offset"] != wire.NOWHERE
        there, num_bytes = np.flatnonzero(is_there), images[0].size
        last_place = len(self._slab) - wire.GUARD_BYTES - num_bytes
        # A view that lies nowhere for no reason would leave the batch's memory as it was.
        if not set(np.flatnonzero(~is_there)) <= set(reasons) or (
            len(there) and int(places["offset"][there].max()) > last_place
        ):
            raise ServiceError("an answer does not fit the question")
        offsets = places["offset"][there].astype(np.int64)
        for i, start in zip(there.tolist(), (offsets + wire.GUARD_BYTES).tolist(), strict=True):
            images[i] = self._slab[start : start + num_bytes].reshape(self._shape)
        # Read after the copies: the service changes a generation before it reuses a place.
        is_whole = bool((self._generations[offsets // 8] == places["generation"][there]).all())
        return is_whole, reasons

    def _send(self, data: bytes) -> None:
        data, self._taken = self._taken + data, b""
        try:
            self._socket.sendall(data)
        except OSError as error:
            # A service that refuses says why before it closes.
            self._raise_refusal()
            raise ServiceError(f"the connection was lost ({error})") from error

    def _raise_refusal(self) -> None:
        """Raise what the service said last, if it refused."""
        try:
            while self._receive()[0] != Kind.REFUSED:
                pass
        except ServiceRefusedError:
            raise
        except ServiceError:
            return

    def _receive(self, header: bytes | None = None) -> tuple[int, bytes]:
        """The next frame.

        Raises:
            ServiceError: the connection ended, or nothing came for too long.
            ServiceRefusedError: the service says that it will not go on, and why.
        """
        try:
            header = self._incoming.read(wire.HEADER.size) if header is None else header
            if len(header) < wire.HEADER.size:
                raise ServiceError("the connection was closed")
            kind, length = wire.HEADER.unpack(header)
            if length > wire.most_bytes(kind, self._num_rows):
                raise ServiceError(f"a frame of kind {kind} and {length:,} bytes is not understood")
            payload = self._incoming.read(length)
        except OSError as error:
            raise ServiceError(f"nothing was heard ({error})") from error
        if len(payload) < length:
            raise ServiceError("the connection was closed")
        if kind == Kind.REFUSED:
            raise ServiceRefusedError(str(wire.read_json(payload).get("reason")))
        return kind, payload


def _connected(address: str) -> socket.socket:
    """A connection to a service.

    Raises:
        ServiceError: nobody listens.
    """
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(_HELLO_SECONDS)
    try:
        connection.connect(wire.socket_path(address))
    except OSError as error:
        connection.close()
        raise ServiceError(f"nobody listens there ({error.strerror or error})") from error
    return connection


def _mapped(descriptor: int, num_bytes: Any) -> NDArray[np.uint8]:
    """Map a slab to read.

    Raises:
        ServiceError: it is not one that nobody can cut short.
    """
    # A file that was cut under the map would end this process with SIGBUS.
    seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    if seals & _NEEDED_SEALS != _NEEDED_SEALS or os.fstat(descriptor).st_size != num_bytes:
        raise ServiceError("its memory is not sealed")
    content = mmap.mmap(descriptor, num_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
    return np.frombuffer(content, np.uint8)
