"""The client of a loading service: an engine that takes views from it while it can.

Order, labels, normalization and faults stay with the loader; a service decodes, and nothing more.
So whatever becomes of it, no bit of a batch changes: what it cannot give is decoded here.
"""

import hashlib
import logging
import os
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
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
from fastprune.loading.service_session import Session
from fastprune.loading.service_wire import ServiceError

_LOG = logging.getLogger(__name__)

_BATCHES_AHEAD = 3  # as the CPU engine
_SECONDS_BETWEEN_TRIES = 5.0
_MOST_SECONDS_BETWEEN_TRIES = 60.0
_PROBED_ROWS = 16


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


def _close_all(sessions: list[Session]) -> None:
    for session in sessions:
        session.close()
