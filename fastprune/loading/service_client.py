"""The client of a loading service: an engine that takes views from it while it can.

Order, labels, normalization and faults stay with the loader; a service decodes, and nothing more.
So whatever becomes of it, no bit of a batch changes: what it cannot give is decoded here.
"""

import fcntl
import hashlib
import logging
import mmap
import os
import socket
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastprune.beton.reader import Beton
from fastprune.errors import InvalidValueError
from fastprune.loading import service_wire as wire
from fastprune.loading.cpu import CpuEngine
from fastprune.loading.faults import ALTERED, FileWatch, RowFaults
from fastprune.loading.service_wire import Kind, ServiceError, ServiceRefusedError

_LOG = logging.getLogger(__name__)

_BATCHES_AHEAD = 3  # as the CPU engine
_SILENT_SECONDS = 10.0  # the server says that it is alive every two
_HELLO_SECONDS = 1.0
_SECONDS_BETWEEN_TRIES = 5.0
_MOST_SECONDS_BETWEEN_TRIES = 60.0
_PROBED_ROWS = 16
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
        is_wanted = np.zeros(self._num_rows, np.bool_)
        is_wanted[rows] = True
        head = wire.EPOCH_HEAD.pack(stream, views_per_row)
        self._send(wire.frame(Kind.EPOCH, head, np.packbits(is_wanted).tobytes()))

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
        text = places_and_reasons[end:]
        found = {
            str(i): str(reason) for i, reason in (wire.read_json(text) if text else {}).items()
        }
        reasons = {i: found[str(i)] for i in range(len(images)) if str(i) in found}
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


@dataclass
class _Batch:
    """A batch on its way."""

    rows: NDArray[np.int64]
    pixels: torch.Tensor
    num_pending: int = 0
    reasons: dict[int, str] = field(default_factory=dict)  # by position


class ServiceEngine:
    """Takes views from a loading service, or decodes them here; see `engine.Engine`."""

    # A service decodes with the same code, to the same bits: a run may change between the two.
    name = "cpu"

    def __init__(
        self, address: str, beton: Beton, *, image_size: int, local: CpuEngine, faults: RowFaults
    ):
        """Prepare; the service is looked for when the first epoch begins.

        Args:
            address: unix:PATH.
            beton: the open beton.
            image_size: S, in pixels.
            local: decodes what the service does not.
            faults: what becomes of rows that cannot be decoded.

        Raises:
            InvalidValueError: it is no address.
        """
        wire.socket_path(address)
        self._address = address
        self._beton = beton
        self._image_size = image_size
        self._local = local
        self._faults = faults
        self._file = FileWatch(beton)
        # Connected, and between two epochs.
        self._idle: list[Session] = []
        self._num_lost = 0
        self._is_missed = False
        self._next_try = 0.0
        self._seconds_between_tries = _SECONDS_BETWEEN_TRIES
        weakref.finalize(self, _close_all, self._idle)

    def decode(
        self,
        batches: Sequence[NDArray[np.int64]],
        draw_views: Callable[[NDArray[np.int64]], NDArray[np.int32]],
    ) -> Generator[tuple[torch.Tensor, NDArray[np.int64]]]:
        """See `engine.Engine.decode`; batches that the service does not give are decoded here."""
        num_done = 0
        while num_done < len(batches):
            rest, session = batches[num_done:], self._session()
            source = (
                self._local.decode(rest, draw_views)
                if session is None
                else self._remote(session, rest, draw_views)
            )
            try:
                for decoded in source:
                    num_done += 1
                    # The suspended generator keeps no batch that its caller has let go of.
                    parcel = [decoded]
                    del decoded
                    yield parcel.pop()
                    if session is None and self._is_back():
                        break
            except ServiceError as error:
                self._miss(error)
            finally:
                source.close()  # now, not when the garbage collector comes by

    def _remote(
        self,
        session: Session,
        batches: Sequence[NDArray[np.int64]],
        draw_views: Callable[[NDArray[np.int64]], NDArray[np.int32]],
    ) -> Generator[tuple[torch.Tensor, NDArray[np.int64]]]:
        """Take batches from a service, a few ahead of the caller.

        Raises:
            ServiceError: the service was lost.
        """
        waiting: deque[_Batch] = deque()
        asks: dict[int, tuple[_Batch, int]] = {}  # by number: the batch, the first row's position
        is_finished = False
        try:
            # Whoever draws the same views of a few rows draws the same of all.
            probed = draw_views(np.arange(_PROBED_ROWS) % self._beton.num_rows)
            stream = hashlib.blake2b(probed.tobytes(), digest_size=16).digest()
            times = np.bincount(np.concatenate(batches))
            session.announce(stream, np.flatnonzero(times), int(times[times > 0].min()))
            for rows in batches:
                finished = []
                if len(waiting) > _BATCHES_AHEAD:
                    finished.append(self._finished(session, asks, waiting.popleft()))
                # Asked for before the caller goes to work on the batch that is there.
                self._file.check()
                waiting.append(self._start(session, asks, rows, draw_views(rows)))
                if finished:
                    yield finished.pop()
            while waiting:
                finished = [self._finished(session, asks, waiting.popleft())]
                session.flush()
                yield finished.pop()
            is_finished = True
        finally:
            # Left in the middle, the service is to forget what is on its way.
            if is_finished:
                self._idle.append(session)
            else:
                session.close()

    def _start(
        self,
        session: Session,
        asks: dict[int, tuple[_Batch, int]],
        rows: NDArray[np.int64],
        views: NDArray[np.int32],
    ) -> _Batch:
        """Ask for the views of a batch."""
        wanted = np.empty(len(rows), wire.WANTED)
        wanted["row"], wanted["view"] = rows, views
        batch = _Batch(rows, self._local.new_pixels(len(rows)))
        for start in range(0, len(rows), wire.MOST_WANTED):
            part = slice(start, start + wire.MOST_WANTED)
            asks[session.ask(wanted[part], batch.pixels.numpy()[part])] = batch, start
            batch.num_pending += 1
        return batch

    def _finished(
        self, session: Session, asks: dict[int, tuple[_Batch, int]], batch: _Batch
    ) -> tuple[torch.Tensor, NDArray[np.int64]]:
        """Wait for a batch, and leave out the rows that cannot be used."""
        while batch.num_pending:
            number, reasons = session.wait()
            other, start = asks.pop(number)
            other.num_pending -= 1
            other.reasons.update({start + i: reason for i, reason in reasons.items()})
        for i in np.flatnonzero(self._faults.altered(batch.rows)).tolist():
            batch.reasons.setdefault(i, ALTERED)
        return self._faults.without_failed(batch.pixels, batch.rows, batch.reasons)

    def _session(self) -> Session | None:
        """A session for one epoch; None while the service cannot be used."""
        while self._idle:
            session = self._idle.pop()
            # A forked process must not speak on its parent's connection.
            if session.pid == os.getpid() and session.is_alive():
                return session
            session.close()
        if time.monotonic() < self._next_try:
            return None
        try:
            session = Session(
                self._address,
                self._hello,
                image_size=self._image_size,
                num_rows=self._beton.num_rows,
            )
        except (ServiceError, InvalidValueError) as error:
            self._next_try = time.monotonic() + self._seconds_between_tries
            self._seconds_between_tries = min(
                2 * self._seconds_between_tries, _MOST_SECONDS_BETWEEN_TRIES
            )
            self._miss(error)
            return None
        self._next_try, self._seconds_between_tries = 0.0, _SECONDS_BETWEEN_TRIES
        word = "is back" if self._is_missed else "decodes"
        _LOG.info("%s: the loading service at %s %s", self._beton.path, self._address, word)
        self._is_missed = False
        return session

    def _is_back(self) -> bool:
        """Whether the service can be used again; looked at now and then."""
        session = self._session()
        if session is not None:
            self._idle.append(session)
        return session is not None

    def _miss(self, error: Exception) -> None:
        """Say once that the service cannot be used."""
        if not self._is_missed:
            self._num_lost += 1
            _LOG.warning(
                "%s: the loading service at %s cannot be used: %s. Batches are decoded here, equal "
                "to the bit, until it can.",
                self._beton.path,
                self._address,
                str(error).rstrip("."),
            )
        self._is_missed = True

    @property
    def _hello(self) -> dict[str, Any]:
        """Who we are, and what we want.

        Raises:
            InvalidValueError: the beton has no manifest to know its images by.
        """
        return {
            "protocol": wire.PROTOCOL,
            "decoder": wire.decoder_name(),
            "images": self._images,
            "image_size": self._image_size,
            "name": f"{Path(sys.argv[0]).name or 'python'}:{os.getpid()}",
            "num_lost": self._num_lost,
        }

    @cached_property
    def _images(self) -> str:
        return wire.images_digest(self._beton)


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


def _close_all(sessions: list[Session]) -> None:
    for session in sessions:
        session.close()
