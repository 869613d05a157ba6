"""The server of a loading service: doors for clients, one event loop, decoding threads.

The event loop owns the desk, and with it the window. Doors let clients in, over a Unix socket or
over Arrow Flight; what they bring passes over the desk.
"""

import asyncio
import logging
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from fastprune.base.checks import require_at_least, require_one_of
from fastprune.base.errors import InvalidValueError
from fastprune.beton.beton import Beton
from fastprune.service.address import Address, parse_address
from fastprune.service.desk import Desk
from fastprune.service.locks import Locks
from fastprune.service.metrics import Monitor
from fastprune.service.unix import UnixDoor
from fastprune.service.window import PACES

_LOG = logging.getLogger(__name__)

_ALIVE_SECONDS = 2.0
_LOG_SECONDS = 60.0
_DRAIN_SECONDS = 10.0


class Door(Protocol):
    """Where clients of one transport come in; used in the event loop alone.

    Attributes:
        address: where clients find it.
    """

    address: str

    async def open(self) -> None:
        """Listen."""
        ...

    def stop_listening(self) -> None:
        """Let nobody in any more."""
        ...

    async def close(self) -> None:
        """End all conversations."""
        ...


class Server:
    """Serves views of betons at one or several addresses.

    Attributes:
        desk: what all clients share.
        doors: one for each address.
        monitor: what answers monitors while the server runs, if that was asked for.
    """

    def __init__(
        self,
        betons: Sequence[Beton],
        *addresses: str,
        memory_bytes: int,
        num_workers: int,
        pace: str = "auto",
        metrics: str | None = None,
        locks: Locks | None = None,
    ):
        """Prepare; `run` listens.

        Args:
            betons: the open betons.
            addresses: unix:PATH, grpc+tls://HOST:PORT or grpc://HOST:PORT.
            memory_bytes: of the slab.
            num_workers: decoding threads.
            pace: "auto", "together" or "free", see docs/service.md.
            metrics: HOST:PORT of /metrics and /healthz; None for neither.
            locks: certificate, key and tokens of addresses that other machines reach.

        Raises:
            InvalidValueError: a beton has no manifest, an argument is outside its domain, or an
                address would be open to anybody.
        """
        require_one_of("pace", pace, PACES)
        require_at_least("num_workers", num_workers, 1)
        locks = locks or Locks()
        parsed = [parse_address(address) for address in addresses]
        for address in parsed:
            if address.beton:
                raise InvalidValueError(
                    f"listen at {address}, without {address.beton!r}: clients name the beton."
                )
            locks.require_closed(address)
        self.desk = Desk(betons, memory_bytes=memory_bytes, num_workers=num_workers, pace=pace)
        self.doors = [self._door(address, locks) for address in parsed]
        self._metrics = metrics
        self.monitor: Monitor | None = None

    def _door(self, address: Address, locks: Locks) -> Door:
        if address.scheme == "unix":
            return UnixDoor(Path(address.path), self.desk)
        from fastprune.service.flight import FlightDoor  # gRPC's libraries take time to load

        return FlightDoor(address, self.desk, locks)

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT, as `serve` does."""
        stopping = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stopping.set)
        await self.serve(stopping)

    async def serve(self, stopping: asyncio.Event) -> None:
        """Serve until told to stop; then answer what was asked for, and return.

        Raises:
            InvalidValueError: another service listens at an address.
        """
        self.desk.open()
        ticking = asyncio.create_task(self._tick())
        try:
            for door in self.doors:
                await door.open()
                _LOG.info("listening at %s", door.address)
            if self._metrics is not None:
                loop = asyncio.get_running_loop()
                self.monitor = Monitor(self._metrics, self.status, loop)
                _LOG.info("metrics at port %d", self.monitor.port)
            await stopping.wait()
            for door in self.doors:
                door.stop_listening()
            await self._drain()
        finally:
            ticking.cancel()
            await asyncio.gather(ticking, return_exceptions=True)
            for door in self.doors:
                await door.close()
            if self.monitor is not None:
                # In a thread: it may wait for an answer of this loop.
                await asyncio.to_thread(self.monitor.close)
            self.desk.close()
        _LOG.info("%d views were decoded, %d served", *self._counts())

    def status(self) -> dict[str, Any]:
        """What the server does, for people and monitors."""
        return self.desk.status()

    async def _tick(self) -> None:
        """Do what is to be done now and then."""
        desk, window = self.desk, self.desk.window
        last_alive = last_log = time.monotonic()
        before = self._counts()
        while True:
            await asyncio.sleep(1)
            now = time.monotonic()
            for client in window.detach_silent(now):
                _LOG.info("%s is silent; the others do not wait for it", client.name)
            desk.refuse_changed_files()
            desk.pump()
            if now - last_alive >= _ALIVE_SECONDS:
                last_alive = now
                desk.send_alive()
            if now - last_log >= _LOG_SECONDS:
                decoded, served = self._counts()
                _LOG.info(
                    "%d clients; %.0f views/s decoded, %.0f served; window %d MiB of %d",
                    len(desk.peers),
                    (decoded - before[0]) / (now - last_log),
                    (served - before[1]) / (now - last_log),
                    window.num_bytes >> 20,
                    desk.slab.num_bytes >> 20,
                )
                last_log, before = now, (decoded, served)

    async def _drain(self) -> None:
        """Answer what was asked for, for a while."""
        peers = self.desk.peers
        for peer in peers.values():
            peer.pause()
        deadline = time.monotonic() + _DRAIN_SECONDS
        while time.monotonic() < deadline and any(
            client.num_unanswered or not peer.is_flushed for client, peer in peers.items()
        ):
            await asyncio.sleep(0.01)

    def _counts(self) -> tuple[int, int]:
        return self.desk.window.num_decoded, self.desk.window.num_served
