"""Which loading services can be used now, and which rows each of them decodes."""

import contextlib
import hashlib
import logging
import os
import sys
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastprune.base.errors import InvalidValueError
from fastprune.base.random_streams import row_keys
from fastprune.beton.beton import Beton
from fastprune.service import wire
from fastprune.service.address import Address
from fastprune.service.connection import Connection, connect
from fastprune.service.credentials import ClientCredentials
from fastprune.service.served_beton import ServedBeton
from fastprune.service.wire import ServiceError

_LOG = logging.getLogger(__name__)

_RETRY_SECONDS = 5.0
_MAX_RETRY_SECONDS = 60.0
# Neighbors in the file go to one service, whose reads stay sequential; few enough that the shares
# come out even.
_ROWS_IN_BLOCK = 16


@dataclass(eq=False)
class Service:
    """One of the services, and whether it can be used."""

    address: Address
    idle: list[Connection] = field(default_factory=list)  # between two epochs
    is_lost: bool = False  # whether it could not be used when last tried
    next_try: float = 0.0  # in seconds of a steady clock
    pause: float = field(default_factory=lambda: _RETRY_SECONDS)  # to the try after that
    error: ServiceError | None = None  # why it could not be used when last tried

    @cached_property
    def seed(self) -> int:
        """Seed of its hashes, see `split_rows`."""
        digest = hashlib.blake2b(str(self.address).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little")


class Services:
    """Connects to services, tries lost ones again, and logs the first failure of each."""

    def __init__(
        self,
        addresses: Sequence[Address],
        beton: Beton,
        *,
        credentials: ClientCredentials,
        image_size: int,
    ):
        """Prepare; nothing is connected yet.

        Raises:
            InvalidValueError: a token would be sent in plain text.
        """
        for address in addresses:
            credentials.require_safe(address)
        self._services = [Service(address) for address in addresses]
        self._beton = beton
        self._credentials = credentials
        self._image_size = image_size
        self._num_lost = 0
        weakref.finalize(self, _close_idle, self._services)

    def connect(self) -> dict[Service, Connection]:
        """Connect for one epoch to all services that can be used."""
        found = {service: self._connect_to(service) for service in self._services}
        return {service: each for service, each in found.items() if each is not None}

    def is_back(self) -> bool:
        """Whether a service can be used, after none could; tried now and then."""
        found = self.connect()
        for service, connection in found.items():
            service.idle.append(connection)
        return bool(found)

    def retry_now(self) -> None:
        """Let the next `connect` try every service."""
        for service in self._services:
            service.next_try = 0.0

    @property
    def errors(self) -> dict[Address, ServiceError]:
        """Why services could not be used when last tried."""
        return {s.address: s.error for s in self._services if s.error is not None}

    @contextlib.contextmanager
    def blaming(self, service: Service) -> Iterator[None]:
        """Note that a service is lost if the block raises ServiceError."""
        try:
            yield
        except ServiceError as error:
            self._lose(service, error)
            raise

    def _connect_to(self, service: Service) -> Connection | None:
        """Connect to a service; None while it cannot be used."""
        while service.idle:
            connection = service.idle.pop()
            # A forked process must not speak on its parent's connection.
            if connection.pid == os.getpid() and connection.is_alive():
                return connection
            connection.close()
        if time.monotonic() < service.next_try:
            return None
        try:
            connection = connect(
                service.address,
                self._hello(),
                num_rows=self._beton.num_rows,
                credentials=self._credentials,
            )
        except ServiceError as error:
            service.next_try = time.monotonic() + service.pause
            service.pause = min(2 * service.pause, _MAX_RETRY_SECONDS)
            self._lose(service, error)
            return None
        service.next_try, service.pause = 0.0, _RETRY_SECONDS
        verb = "is back" if service.is_lost else "decodes"
        _LOG.info("%s: the loading service at %s %s", self._beton.path, service.address, verb)
        service.is_lost = False
        return connection

    def _lose(self, service: Service, error: ServiceError) -> None:
        """Note that a service cannot be used; logged once, until it was used again."""
        service.error = error
        if service.is_lost:
            return
        service.is_lost = True
        self._num_lost += 1
        has_others = len(self._services) > 1
        others = "the others decode its share, equal to the bit"
        if isinstance(self._beton, ServedBeton):
            remedy = f"It is tried again{f'; {others}' if has_others else ''}"
        elif has_others:
            remedy = f"Until it can, {others}, or they are decoded here"
        else:
            remedy = "Batches are decoded here, equal to the bit, until it can"
        _LOG.warning(
            "%s: the loading service at %s cannot be used: %s. %s.",
            self._beton.path,
            service.address,
            str(error).rstrip("."),
            remedy,
        )

    def _hello(self) -> wire.Hello:
        """Make our first message.

        Raises:
            ServiceError: the beton has no manifest to identify its images by.
        """
        return wire.Hello(
            protocol=wire.PROTOCOL,
            decoder=wire.decoder_name(),
            images=self._images,
            image_size=self._image_size,
            name=f"{Path(sys.argv[0]).name or 'python'}:{os.getpid()}",
            num_lost=self._num_lost,
        )

    @cached_property
    def _images(self) -> str:
        """Digest by which services know the images."""
        if isinstance(self._beton, ServedBeton):
            return self._beton.digest
        try:
            return wire.images_digest(self._beton)
        except InvalidValueError as error:
            raise ServiceError(str(error)) from error


def split_rows(
    rows: NDArray[np.int64], services: Sequence[Service]
) -> dict[Service, NDArray[np.int64]]:
    """Split rows (n,) among services; returns positions in [0, n) by service.

    Rendezvous hashing: a block of rows goes to the service with which its hash is the largest. All
    trainers choose alike, in whatever order they name the services, so that a view is decoded by
    one service only. When a service is lost, only its own blocks move.
    """
    if len(services) == 1:
        return {services[0]: np.arange(len(rows))}
    hashes = np.stack([row_keys(service.seed, rows // _ROWS_IN_BLOCK) for service in services])
    owners = hashes.argmax(axis=0)
    shares = {service: np.flatnonzero(owners == i) for i, service in enumerate(services)}
    return {service: share for service, share in shares.items() if len(share)}


def _close_idle(services: list[Service]) -> None:
    for service in services:
        for connection in service.idle:
            connection.close()
