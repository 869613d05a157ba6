"""A decoder that takes views from loading services while it can, and decodes the rest here.

Order, labels, normalization and faulty rows stay with the loader; a service only decodes, by the
same code. So no bit of a batch depends on which services were there, or on when one was lost.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from fastprune.base.run_ahead import run_ahead
from fastprune.beton.beton import Beton
from fastprune.decoding.cpu import CpuDecoder
from fastprune.decoding.faults import ALTERED, ChangeDetector, RowFaults
from fastprune.service import wire
from fastprune.service.address import parse_addresses
from fastprune.service.connection import Connection
from fastprune.service.credentials import ClientCredentials
from fastprune.service.failover import Service, Services, split_rows
from fastprune.service.served_beton import Patience, ServedBeton, is_final, unavailable
from fastprune.service.wire import ServiceError

_BATCHES_AHEAD = 4
_PROBED_ROWS = 16

DrawViews = Callable[[NDArray[np.int64]], NDArray[np.int32]]
Decoded = tuple[torch.Tensor, NDArray[np.int64]]


@dataclass
class _Batch:
    """A batch on its way."""

    rows: NDArray[np.int64]  # (n,)
    views: NDArray[np.int32]  # (n, 7)
    pixels: torch.Tensor  # (n, S, S, 3) uint8, being filled
    num_pending: Counter[Service] = field(default_factory=Counter)  # requests not yet answered
    reasons: dict[int, str] = field(default_factory=dict)  # why views fail, by position


@dataclass
class _Request:
    """Views of a batch that were requested together."""

    batch: _Batch
    positions: NDArray[np.int64]  # (m,) in the batch
    # (m, S, S, 3), where they arrive: a slice of the batch's pixels, or a buffer of its own if the
    # positions lie apart.
    images: NDArray[np.uint8]


class ServiceDecoder:
    """Decodes by services, or with a local decoder; see the protocol of decoders."""

    # Pixels are the CPU decoder's: a run may be resumed with and without a service.
    name = "cpu"

    def __init__(
        self,
        beton: Beton,
        *,
        image_size: int,
        local: CpuDecoder,
        faults: RowFaults,
    ):
        """Prepare; services are connected when the first epoch begins.

        Args:
            beton: the open beton; its `service` names the services, which share the rows.
            image_size: S, in pixels.
            local: decodes what no service decodes.
            faults: decides on rows that cannot be decoded.

        Raises:
            InvalidValueError: an address or a token cannot be one, or the token would be sent in
                plain text.
        """
        self._services = Services(
            parse_addresses(beton.service),
            beton,
            credentials=ClientCredentials.find(beton.token),
            image_size=image_size,
        )
        self._beton = beton
        self._local = local
        self._faults = faults
        self._file = ChangeDetector(beton)

    def decode(
        self, batches: Sequence[NDArray[np.int64]], draw_views: DrawViews
    ) -> Generator[Decoded]:
        """Decode batches in order, a few ahead of the caller; see the protocol of decoders."""
        num_done, patience = 0, Patience()
        while num_done < len(batches):
            rest, connections = batches[num_done:], self._services.connect()
            if not connections and isinstance(self._beton, ServedBeton):
                self._wait(patience)
                continue
            source = (
                _Epoch(self, connections).decode(rest, draw_views)
                if connections
                else self._local.decode(rest, draw_views)
            )
            try:
                for decoded in source:
                    num_done += 1
                    patience = Patience()
                    # A suspended generator must not keep a batch that its caller has dropped.
                    parcel = [decoded]
                    del decoded
                    yield parcel.pop()
                    if not connections and self._services.is_back():
                        break
            except ServiceError:
                pass  # logged; the remaining services take its share, or we decode here
            finally:
                source.close()  # now, not when the garbage collector runs

    def _wait(self, patience: Patience) -> None:
        """Wait before trying again the services that alone have the images.

        Raises:
            LoadingError: the time is over, or all services refuse.
        """
        errors = self._services.errors
        if is_final(errors) or not patience.wait():
            raise unavailable(self._beton.path, errors)
        self._services.retry_now()


class _Epoch:
    """Takes the batches of one epoch from connected services."""

    def __init__(self, decoder: ServiceDecoder, connections: dict[Service, Connection]):
        self._beton = decoder._beton
        self._local = decoder._local
        self._faults = decoder._faults
        self._file = decoder._file
        self._services = decoder._services
        self._connections = connections
        self._requests: dict[tuple[Service, int], _Request] = {}

    def decode(
        self, batches: Sequence[NDArray[np.int64]], draw_views: DrawViews
    ) -> Generator[Decoded]:
        """Request batches a few ahead of the caller, and yield them in order.

        Raises:
            ServiceError: a service was lost.
        """
        self._num_left = len(batches)
        try:
            self._announce(batches, draw_views)

            def start(rows: NDArray[np.int64]) -> _Batch:
                self._file.check()
                return self._start(rows, draw_views(rows))

            yield from run_ahead(batches, start, self._finish, _BATCHES_AHEAD)
        finally:
            for service, connection in self._connections.items():
                # After an epoch that was left early, answers are still on their way: a service
                # forgets them only with the connection.
                if self._num_left == 0:
                    service.idle.append(connection)
                else:
                    connection.close()

    def _announce(self, batches: Sequence[NDArray[np.int64]], draw_views: DrawViews) -> None:
        """Tell each service which rows will be requested, and by what name others know the views.

        Clients that draw the same views of a few rows draw the same of all, so these name the
        stream.
        """
        probed = draw_views(np.arange(_PROBED_ROWS) % self._beton.num_rows)
        stream = hashlib.blake2b(probed.tobytes(), digest_size=16).digest()
        times = np.bincount(np.concatenate(batches))
        kept = np.flatnonzero(times)
        views_per_row = int(times[kept].min())
        for service, part in split_rows(kept, list(self._connections)).items():
            with self._services.blaming(service):
                self._connections[service].announce(stream, kept[part], views_per_row)

    def _start(self, rows: NDArray[np.int64], views: NDArray[np.int32]) -> _Batch:
        """Request the views of a batch."""
        requested = np.empty(len(rows), wire.REQUESTED)
        requested["row"], requested["view"] = rows, views
        batch = _Batch(rows, views, self._local.new_pixels(len(rows)))
        pixels = batch.pixels.numpy()
        for service, share in split_rows(rows, list(self._connections)).items():
            connection = self._connections[service]
            for start in range(0, len(share), connection.max_views):
                at = share[start : start + connection.max_views]
                if at[-1] - at[0] == len(at) - 1:
                    images = pixels[at[0] : at[-1] + 1]
                else:
                    images = np.empty((len(at), *pixels.shape[1:]), np.uint8)
                with self._services.blaming(service):
                    number = connection.request(requested[at], images)
                self._requests[service, number] = _Request(batch, at, images)
                batch.num_pending[service] += 1
        return batch

    def _finish(self, batch: _Batch) -> Decoded:
        """Wait for a batch, and leave out the rows that cannot be used."""
        while +batch.num_pending:
            service = next(iter(+batch.num_pending))
            with self._services.blaming(service):
                number, reasons = self._connections[service].wait()
            request = self._requests.pop((service, number))
            request.batch.num_pending[service] -= 1
            if request.images.base is None:
                request.batch.pixels.numpy()[request.positions] = request.images
            request.batch.reasons.update(
                {int(request.positions[i]): reason for i, reason in reasons.items()}
            )
        self._num_left -= 1
        if self._num_left == 0:
            # No request follows that would carry the releases.
            for service, connection in self._connections.items():
                with self._services.blaming(service):
                    connection.flush()
        if not isinstance(self._beton, ServedBeton):
            self._verify(batch)
        return self._faults.without_failed(batch.pixels, batch.rows, batch.reasons)

    def _verify(self, batch: _Batch) -> None:
        """Decode here the rows that a service's checksums refused, and compare ours if asked to."""
        # Our file may be whole though the service's is not, and checksums may be off here.
        for i in [i for i, reason in batch.reasons.items() if reason == ALTERED]:
            one = slice(i, i + 1)
            decoded = self._local.decode_rows(
                batch.rows[one], batch.views[one], batch.pixels.numpy()[one]
            )
            del batch.reasons[i]
            if decoded.faults:
                batch.reasons[i] = decoded.faults[0]
        # The service compares each row once, when it first reads it; only "always" is left to us.
        if self._faults.verifies_always:
            for i in np.flatnonzero(self._faults.altered(batch.rows)).tolist():
                batch.reasons.setdefault(i, ALTERED)
