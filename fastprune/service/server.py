"""The server of a loading service: listeners for clients, one event loop, decoding threads.

The event loop's thread owns the dispatcher and its windows. Listeners accept clients, over a Unix
socket or over Arrow Flight, and hand their messages to the dispatcher. Decoding threads get tasks
from it. Flight runs two more threads for each client, and metrics one for each HTTP request; all of
them reach the dispatcher by calls in the loop.
"""

import asyncio
import logging
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from fastprune.base.errors import InvalidValueError
from fastprune.beton.beton import Beton
from fastprune.service.address import Address, parse_address
from fastprune.service.credentials import ServerCredentials
from fastprune.service.dispatcher import Dispatcher
from fastprune.service.metrics import MetricsServer
from fastprune.service.unix_listener import UnixListener

_LOG = logging.getLogger(__name__)

_HEARTBEAT_SECONDS = 2.0
_LOG_SECONDS = 60.0
_DRAIN_SECONDS = 10.0


class Listener(Protocol):
    """Accepts clients of one transport; used in the event loop alone.

    Attributes:
        address: where clients reach it.
    """

    address: str

    async def open(self) -> None:
        """Listen."""
        ...

    def stop_listening(self) -> None:
        """Accept no more clients; connections stay."""
        ...

    async def close(self) -> None:
        """End all connections."""
        ...


class Server:
    """Serves views of betons at one or several addresses.

    Attributes:
        dispatcher: shared by all clients.
        listeners: one for each address.
        metrics: the HTTP server, while the server runs and if it was asked for.
    """

    def __init__(
        self,
        betons: Sequence[Beton],
        *addresses: str,
        memory_bytes: int,
        num_workers: int,
        num_sizes: int = 1,
        metrics: str | None = None,
        credentials: ServerCredentials | None = None,
    ):
        """Prepare; `run` listens.

        Args:
            betons: the open betons.
            addresses: unix:PATH, grpc+tls://HOST:PORT or grpc://HOST:PORT.
            memory_bytes: most memory for decoded views.
            num_workers: decoding threads.
            num_sizes: image sizes at a time, which share the memory equally.
            metrics: HOST:PORT of /metrics and /healthz; None for neither.
            credentials: certificate, key and tokens of addresses that other machines reach.

        Raises:
            InvalidValueError: a beton has no manifest, an argument is out of its range, or an
                address would be open to everyone.
        """
        credentials = credentials or ServerCredentials()
        parsed = [parse_address(address) for address in addresses]
        for address in parsed:
            if address.beton:
                raise InvalidValueError(
                    f"listen at {address}, without {address.beton!r}: clients name the beton."
                )
            credentials.require_closed(address)
        self.dispatcher = Dispatcher(
            betons, memory_bytes=memory_bytes, num_sizes=num_sizes, num_workers=num_workers
        )
        self.listeners = [self._listener(address, credentials) for address in parsed]
        self.metrics: MetricsServer | None = None
        self._metrics_address = metrics

    def _listener(self, address: Address, credentials: ServerCredentials) -> Listener:
        if address.scheme == "unix":
            return UnixListener(Path(address.path), self.dispatcher)
        # gRPC's libraries take time to load.
        from fastprune.service.flight_listener import FlightListener

        return FlightListener(address, self.dispatcher, credentials)

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT, as `serve` does."""
        stopping = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stopping.set)
        await self.serve(stopping)

    async def serve(self, stopping: asyncio.Event) -> None:
        """Serve until the event is set; then answer what was requested, and return.

        Raises:
            InvalidValueError: an address cannot be used.
        """
        self.dispatcher.open()
        ticking = asyncio.create_task(self._tick())
        try:
            for listener in self.listeners:
                await listener.open()
                _LOG.info("listening at %s", listener.address)
            if self._metrics_address is not None:
                loop = asyncio.get_running_loop()
                self.metrics = MetricsServer(self._metrics_address, self.status, loop)
                _LOG.info("metrics at port %d", self.metrics.port)
            await stopping.wait()
            for listener in self.listeners:
                listener.stop_listening()
            await self._drain()
        finally:
            ticking.cancel()
            await asyncio.gather(ticking, return_exceptions=True)
            for listener in self.listeners:
                await listener.close()
            if self.metrics is not None:
                # In a thread: it may wait for an answer of this loop.
                await asyncio.to_thread(self.metrics.close)
            self.dispatcher.close()
        counts = self.dispatcher.counts
        _LOG.info("%d views were decoded, %d served", counts.decoded, counts.served)

    def status(self) -> dict[str, Any]:
        """Describe the service, for people and monitors."""
        return self.dispatcher.status()

    async def _tick(self) -> None:
        """Do what is due, once a second."""
        dispatcher = self.dispatcher
        last_heartbeat = last_log = time.monotonic()
        before = self.status()
        while True:
            await asyncio.sleep(1)
            now = time.monotonic()
            dispatcher.detach_silent(now)
            dispatcher.refuse_changed_files()
            dispatcher.pump()
            if now - last_heartbeat >= _HEARTBEAT_SECONDS:
                last_heartbeat = now
                dispatcher.send_heartbeats()
            if now - last_log >= _LOG_SECONDS:
                status, seconds = self.status(), now - last_log
                _LOG.info(
                    "%d clients; %.0f views/s decoded, %.0f served; window %d MiB of %d",
                    len(status["clients"]),
                    (status["views_decoded"] - before["views_decoded"]) / seconds,
                    (status["views_served"] - before["views_served"]) / seconds,
                    status["window_bytes"] >> 20,
                    status["memory_bytes"] >> 20,
                )
                last_log, before = now, status

    async def _drain(self) -> None:
        """Answer what was requested, but not forever."""
        channels = self.dispatcher.channels
        for channel in channels.values():
            channel.pause()
        deadline = time.monotonic() + _DRAIN_SECONDS
        while time.monotonic() < deadline and any(
            client.num_unanswered or not channel.is_flushed for client, channel in channels.items()
        ):
            await asyncio.sleep(0.01)
