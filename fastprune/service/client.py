"""The client of a loading service: an engine that takes views from it while it can.

Order, labels, normalization and faults stay with the loader; a service decodes, and nothing more.
So whatever becomes of it, no bit of a batch changes: what it cannot give is decoded here.
"""

import contextlib
import hashlib
import logging
import os
import sys
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from fastprune.base.errors import InvalidValueError
from fastprune.base.random_streams import row_keys
from fastprune.beton.beton import Beton
from fastprune.decoding.cpu import CpuDecoder
from fastprune.decoding.faults import ALTERED, ChangeDetector, RowFaults
from fastprune.service import wire
from fastprune.service.address import Address, Credentials
from fastprune.service.served_beton import Patience, RemoteBeton, unavailable
from fastprune.service.unix_session import Session
from fastprune.service.wire import ServiceError, ServiceRefusedError

if TYPE_CHECKING:
    from fastprune.service.flight_session import FlightSession

_LOG = logging.getLogger(__name__)

_BATCHES_AHEAD = 3  # as the CPU engine
_SECONDS_BETWEEN_TRIES = 5.0
_MOST_SECONDS_BETWEEN_TRIES = 60.0
_PROBED_ROWS = 16
# Rows that lie side by side in the file are one service's; few enough that shares come out even.
_ROWS_IN_BLOCK = 16

_Session: TypeAlias = "Session | FlightSession"


@dataclass(eq=False)
class _Link:
    """One of the services, and how things stand with it.

    Attributes:
        address: where it is.
        idle: connections between two epochs.
        is_missed: whether it could not be used when it was tried last.
        next_try: when it is tried again, in seconds of a steady clock.
        pause: from that try to the next, in seconds.
        error: why it could not be used last.
    """

    address: Address
    idle: list[_Session] = field(default_factory=list)
    is_missed: bool = False
    next_try: float = 0.0
    pause: float = _SECONDS_BETWEEN_TRIES
    error: ServiceError | None = None

    @cached_property
    def seed(self) -> int:
        """What makes its share of the rows its own."""
        digest = hashlib.blake2b(str(self.address).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little")


@dataclass
class _Batch:
    """A batch on its way."""

    rows: NDArray[np.int64]
    views: NDArray[np.int32]
    pixels: torch.Tensor
    pending: Counter[_Link] = field(default_factory=Counter)
    reasons: dict[int, str] = field(default_factory=dict)  # by position


@dataclass
class _Asked:
    """Views of a batch that were asked for together: their positions, and where they arrive."""

    batch: _Batch
    positions: NDArray[np.int64]
    images: NDArray[np.uint8]


class ServiceEngine:
    """Takes views from loading services, or decodes them here; see `engine.Engine`."""

    # A service decodes with the same code, to the same bits: a run may change between the two.
    name = "cpu"

    def __init__(
        self,
        addresses: Sequence[Address],
        beton: Beton,
        *,
        credentials: Credentials,
        image_size: int,
        local: CpuDecoder,
        faults: RowFaults,
    ):
        """Prepare; services are looked for when the first epoch begins.

        Args:
            addresses: of the services, which share the rows.
            beton: the open beton.
            credentials: what services are shown.
            image_size: S, in pixels.
            local: decodes what no service does.
            faults: what becomes of rows that cannot be decoded.

        Raises:
            InvalidValueError: a token would be sent in plain text.
        """
        for address in addresses:
            credentials.require_safe(address)
        self._links = [_Link(address) for address in addresses]
        self._beton = beton
        self._credentials = credentials
        self._image_size = image_size
        self._local = local
        self._faults = faults
        self._file = ChangeDetector(beton)
        self._num_lost = 0
        weakref.finalize(self, _close_all, self._links)

    def decode(
        self,
        batches: Sequence[NDArray[np.int64]],
        draw_views: Callable[[NDArray[np.int64]], NDArray[np.int32]],
    ) -> Generator[tuple[torch.Tensor, NDArray[np.int64]]]:
        """See `engine.Engine.decode`; batches that no service gives are decoded here."""
        num_done, patience = 0, Patience()
        while num_done < len(batches):
            rest, sessions = batches[num_done:], self._sessions()
            if not sessions and isinstance(self._beton, RemoteBeton):
                self._wait(patience)
                continue
            source = (
                self._remote(sessions, rest, draw_views)
                if sessions
                else self._local.decode(rest, draw_views)
            )
            try:
                for decoded in source:
                    num_done += 1
                    patience = Patience()
                    # The suspended generator keeps no batch that its caller has let go of.
                    parcel = [decoded]
                    del decoded
                    yield parcel.pop()
                    if not sessions and self._is_back():
                        break
            except ServiceError:
                pass  # said by `_blaming`; the others go on, or we do
            finally:
                source.close()  # now, not when the garbage collector comes by

    def _wait(self, patience: Patience) -> None:
        """Wait before services are tried again that alone have the images.

        Raises:
            LoadingError: that helps no more.
        """
        errors = {link.address: link.error for link in self._links if link.error is not None}
        are_final = all(isinstance(error, ServiceRefusedError) for error in errors.values())
        if are_final or not patience.wait():
            raise unavailable(self._beton.path, errors)
        for link in self._links:
            link.next_try = 0.0

    def _remote(
        self,
        sessions: dict[_Link, _Session],
        batches: Sequence[NDArray[np.int64]],
        draw_views: Callable[[NDArray[np.int64]], NDArray[np.int32]],
    ) -> Generator[tuple[torch.Tensor, NDArray[np.int64]]]:
        """Take batches from services, a few ahead of the caller.

        Raises:
            ServiceError: a service was lost.
        """
        waiting: deque[_Batch] = deque()
        asks: dict[tuple[_Link, int], _Asked] = {}
        is_finished = False
        try:
            # Whoever draws the same views of a few rows draws the same of all.
            probed = draw_views(np.arange(_PROBED_ROWS) % self._beton.num_rows)
            stream = hashlib.blake2b(probed.tobytes(), digest_size=16).digest()
            times = np.bincount(np.concatenate(batches))
            wanted = np.flatnonzero(times)
            for link, part in _shares(wanted, list(sessions)).items():
                with self._blaming(link):
                    sessions[link].announce(stream, wanted[part], int(times[times > 0].min()))
            for rows in batches:
                finished = []
                if len(waiting) > _BATCHES_AHEAD:
                    finished.append(self._finished(sessions, asks, waiting.popleft()))
                # Asked for before the caller goes to work on the batch that is there.
                self._file.check()
                waiting.append(self._start(sessions, asks, rows, draw_views(rows)))
                if finished:
                    yield finished.pop()
            while waiting:
                finished = [self._finished(sessions, asks, waiting.popleft())]
                for link, session in sessions.items():
                    with self._blaming(link):
                        session.flush()
                yield finished.pop()
            is_finished = True
        finally:
            for link, session in sessions.items():
                # Left in the middle, a service is to forget what is on its way.
                if is_finished:
                    link.idle.append(session)
                else:
                    session.close()

    def _start(
        self,
        sessions: dict[_Link, _Session],
        asks: dict[tuple[_Link, int], _Asked],
        rows: NDArray[np.int64],
        views: NDArray[np.int32],
    ) -> _Batch:
        """Ask for the views of a batch."""
        wanted = np.empty(len(rows), wire.WANTED)
        wanted["row"], wanted["view"] = rows, views
        batch = _Batch(rows, views, self._local.new_pixels(len(rows)))
        pixels = batch.pixels.numpy()
        for link, share in _shares(rows, list(sessions)).items():
            session = sessions[link]
            for start in range(0, len(share), session.most_wanted):
                at = share[start : start + session.most_wanted]
                if at[-1] - at[0] == len(at) - 1:
                    images = pixels[at[0] : at[-1] + 1]
                else:
                    images = np.empty((len(at), *pixels.shape[1:]), np.uint8)
                with self._blaming(link):
                    asks[link, session.ask(wanted[at], images)] = _Asked(batch, at, images)
                batch.pending[link] += 1
        return batch

    def _finished(
        self,
        sessions: dict[_Link, _Session],
        asks: dict[tuple[_Link, int], _Asked],
        batch: _Batch,
    ) -> tuple[torch.Tensor, NDArray[np.int64]]:
        """Wait for a batch, and leave out the rows that cannot be used."""
        while +batch.pending:
            link = next(iter(+batch.pending))
            with self._blaming(link):
                number, reasons = sessions[link].wait()
            asked = asks.pop((link, number))
            asked.batch.pending[link] -= 1
            if asked.images.base is None:  # gathered from several places of the batch
                asked.batch.pixels.numpy()[asked.positions] = asked.images
            asked.batch.reasons.update({int(asked.positions[i]): r for i, r in reasons.items()})
        if not isinstance(self._beton, RemoteBeton):
            self._verify(batch)
        return self._faults.without_failed(batch.pixels, batch.rows, batch.reasons)

    def _verify(self, batch: _Batch) -> None:
        """Decode here what a service's checksums refused; compare others if that was asked for."""
        # Our file may be whole where the service's is not, and checksums may be off here.
        refused = [i for i, reason in batch.reasons.items() if reason == ALTERED]
        for i in refused:
            one = slice(i, i + 1)
            decoded = self._local.decode_rows(
                batch.rows[one], batch.views[one], batch.pixels.numpy()[one]
            )
            del batch.reasons[i]
            if decoded.faults:
                batch.reasons[i] = decoded.faults[0]
        # The first time that a row is read is the service's.
        if self._faults.verifies_always:
            for i in np.flatnonzero(self._faults.altered(batch.rows)).tolist():
                batch.reasons.setdefault(i, ALTERED)

    def _sessions(self) -> dict[_Link, _Session]:
        """A session of each service that can be used, for one epoch."""
        found = {link: self._session(link) for link in self._links}
        return {link: session for link, session in found.items() if session is not None}

    def _session(self, link: _Link) -> "_Session | None":
        """A session for one epoch; None while the service cannot be used."""
        while link.idle:
            session = link.idle.pop()
            # A forked process must not speak on its parent's connection.
            if session.pid == os.getpid() and session.is_alive():
                return session
            session.close()
        if time.monotonic() < link.next_try:
            return None
        try:
            session = self._connected(link.address)
        except ServiceError as error:
            link.next_try = time.monotonic() + link.pause
            link.pause = min(2 * link.pause, _MOST_SECONDS_BETWEEN_TRIES)
            self._miss(link, error)
            return None
        link.next_try, link.pause = 0.0, _SECONDS_BETWEEN_TRIES
        word = "is back" if link.is_missed else "decodes"
        _LOG.info("%s: the loading service at %s %s", self._beton.path, link.address, word)
        link.is_missed = False
        return session

    def _connected(self, address: Address) -> _Session:
        sizes = {"image_size": self._image_size, "num_rows": self._beton.num_rows}
        if address.scheme == "unix":
            return Session(str(address), self._hello, **sizes)
        from fastprune.service.flight_session import FlightSession  # gRPC takes time to load

        return FlightSession(address, self._hello, credentials=self._credentials, **sizes)

    def _is_back(self) -> bool:
        """Whether a service can be used again; looked at now and then."""
        sessions = self._sessions()
        for link, session in sessions.items():
            link.idle.append(session)
        return bool(sessions)

    @contextlib.contextmanager
    def _blaming(self, link: _Link) -> Iterator[None]:
        """Say which service was lost."""
        try:
            yield
        except ServiceError as error:
            self._miss(link, error)
            raise

    def _miss(self, link: _Link, error: ServiceError) -> None:
        """Say once that a service cannot be used."""
        link.error = error
        if not link.is_missed:
            self._num_lost += 1
            others = "the others decode its share, equal to the bit"
            if isinstance(self._beton, RemoteBeton):
                remedy = f"It is looked for again{f'; {others}' if len(self._links) > 1 else ''}"
            elif len(self._links) > 1:
                remedy = f"Until it can, {others}, or they are decoded here"
            else:
                remedy = "Batches are decoded here, equal to the bit, until it can"
            _LOG.warning(
                "%s: the loading service at %s cannot be used: %s. %s.",
                self._beton.path,
                link.address,
                str(error).rstrip("."),
                remedy,
            )
        link.is_missed = True

    @property
    def _hello(self) -> dict[str, Any]:
        """Who we are, and what we want.

        Raises:
            ServiceError: the beton has no manifest to know its images by.
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
        """What services know the images by.

        Raises:
            ServiceError: there is nothing.
        """
        if isinstance(self._beton, RemoteBeton):
            return self._beton.digest
        try:
            return wire.images_digest(self._beton)
        except InvalidValueError as error:
            raise ServiceError(str(error)) from error


def _shares(rows: NDArray[np.int64], links: Sequence[_Link]) -> dict[_Link, NDArray[np.int64]]:
    """Positions of rows (n,), by the service that decodes them.

    Rendezvous hashing: a block of rows is the service's whose hash with it is the largest. All
    trainers choose alike, whatever the order of their addresses, and when a service is lost, its
    blocks alone move.
    """
    if len(links) == 1:
        return {links[0]: np.arange(len(rows))}
    hashes = np.stack([row_keys(link.seed, rows // _ROWS_IN_BLOCK) for link in links])
    owners = hashes.argmax(axis=0)
    shares = {link: np.flatnonzero(owners == i) for i, link in enumerate(links)}
    return {link: share for link, share in shares.items() if len(share)}


def _close_all(links: list[_Link]) -> None:
    for link in links:
        for session in link.idle:
            session.close()
