"""Listens at a Unix socket, for this user alone, and hands clients the slab's descriptor.

Each connection is one coroutine of the event loop: it reads a frame and hands it to the dispatcher.
Pixels never pass through the socket: an answer names slots, which the client copies from its map of
the slab and then releases.
"""

import asyncio
import contextlib
import json
import logging
import os
import socket
import stat
import struct
from pathlib import Path
from typing import cast

import numpy as np

from fastprune.base.errors import InvalidValueError
from fastprune.service import wire
from fastprune.service.dispatcher import Dispatcher
from fastprune.service.slab import Slab
from fastprune.service.streams import Request
from fastprune.service.wire import FrameKind, ServiceError, ServiceRefusedError

_LOG = logging.getLogger(__name__)

_PEER = struct.Struct("3i")  # pid, uid, gid; see unix(7)
_HELLO_SECONDS = 10.0
_MAX_CONNECTIONS = 1024
# Unread answers of a client that requests and never reads, beyond which it is cut off.
_MAX_UNREAD_BYTES = 4 << 20


class UnixListener:
    """Accepts clients of this machine; see `server.Listener`."""

    def __init__(self, path: Path, dispatcher: Dispatcher):
        """Prepare to listen at a path."""
        self.address = f"unix:{path}"
        self._path = path
        self._dispatcher = dispatcher
        self._connections: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        """Listen.

        Raises:
            InvalidValueError: another service listens there.
        """
        listening = listening_socket(self._path)
        self._server = await asyncio.start_unix_server(self._accept, sock=listening)

    def stop_listening(self) -> None:
        """Accept no more clients, and free the path for the next server."""
        if self._server is not None:
            self._server.close()
            self._server = None
            self._path.unlink(missing_ok=True)

    async def close(self) -> None:
        """End all connections."""
        self.stop_listening()
        connections = list(self._connections)
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve a connection until either side ends it."""
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            await self._serve(reader, writer)
        except ServiceError as error:
            _LOG.info("a client was refused: %s", error)
            writer.write(wire.refused_frame(str(error)))
        except (OSError, EOFError, TimeoutError, asyncio.CancelledError):
            pass  # it left, or the server ends
        finally:
            self._connections.discard(task)
            writer.close()
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await writer.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Admit a client, then handle its messages.

        Raises:
            ServiceError: a message cannot be handled; this connection is to end.
        """
        connection, dispatcher = writer.get_extra_info("socket"), self._dispatcher
        pid, uid, _ = _PEER.unpack(
            connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
        )
        # The socket's mode already excludes other users, but anyone may change a mode.
        if uid not in (0, os.geteuid()):
            raise ServiceRefusedError(f"it serves user {os.geteuid()} alone, not user {uid}")
        if len(self._connections) > _MAX_CONNECTIONS:
            raise ServiceRefusedError(f"{_MAX_CONNECTIONS} clients are connected already")
        async with asyncio.timeout(_HELLO_SECONDS):
            kind, payload = await read_frame(reader, (FrameKind.HELLO, FrameKind.STATUS))
        if kind == FrameKind.STATUS:
            status = json.dumps(dispatcher.status()).encode()
            writer.write(wire.frame(FrameKind.STATUS, status))
            await writer.drain()
            return
        client = dispatcher.admit(payload, f"pid {pid}, uid {uid}", UnixChannel(writer))
        try:
            send_accepted(writer, dispatcher.window_of(client).slab)
            kinds = (FrameKind.EPOCH, FrameKind.REQUEST, FrameKind.RELEASE)
            while True:
                kind, payload = await read_frame(reader, kinds, client.images.num_rows)
                dispatcher.handle(client, kind, payload)
        finally:
            # Also of a killed client: its socket ends, and all that it held is released.
            dispatcher.leave(client)


class UnixChannel:
    """Sends to a client over its socket; see `dispatcher.Channel`."""

    def __init__(self, writer: asyncio.StreamWriter):
        self._writer = writer
        self._transport = cast("asyncio.Transport", writer.transport)

    @property
    def is_flushed(self) -> bool:
        """Whether the kernel has everything."""
        return self._transport.get_write_buffer_size() == 0

    def send_views(self, request: Request) -> None:
        """Send the slots of the views."""
        slots = np.zeros(request.num_views, wire.SLOT)
        slots["offset"] = [wire.NO_SLOT if v is None else v.offset for v in request.views]
        slots["generation"] = [0 if v is None else v.generation for v in request.views]
        number, reasons = wire.NUMBER.pack(request.number), wire.pack_reasons(request.reasons)
        self._writer.write(wire.frame(FrameKind.VIEWS, number, slots.tobytes(), reasons))
        if self._transport.get_write_buffer_size() > _MAX_UNREAD_BYTES:
            self._transport.abort()  # its coroutine ends, and releases what it held

    def send_heartbeat(self) -> None:
        """Send an empty frame."""
        self._writer.write(wire.frame(FrameKind.HEARTBEAT))

    def refuse(self, reason: str) -> None:
        """Send the reason, and close."""
        self._writer.write(wire.refused_frame(reason))
        self._writer.close()

    def pause(self) -> None:
        """Read nothing more."""
        self._transport.pause_reading()


def listening_socket(path: Path) -> socket.socket:
    """Make a socket for this user alone; one left behind by a killed server is replaced.

    Raises:
        InvalidValueError: another server listens there, or a file of another kind is there.
    """
    if path.exists() or path.is_symlink():
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise InvalidValueError(f"{path} exists and is not a socket. Name another path.")
        with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(ConnectionRefusedError):
            probe.connect(str(path))
            raise InvalidValueError(
                f"another service listens at unix:{path}. Name another path, or stop it."
            )
    listening = socket.socket(socket.AF_UNIX)
    # Renamed once it listens, so that whoever finds the name can connect. The umask gives the file
    # its mode from the start; a chmod after `bind` would leave a moment open to others.
    hidden = path.with_name(f".{os.getpid()}")
    before = os.umask(0o177)
    try:
        listening.bind(str(hidden))
        listening.listen()
        hidden.rename(path)
    except OSError as error:
        listening.close()
        hidden.unlink(missing_ok=True)
        raise InvalidValueError(f"unix:{path} cannot be used: {error}.") from error
    finally:
        os.umask(before)
    return listening


def send_accepted(writer: asyncio.StreamWriter, slab: Slab) -> None:
    """Send the first frame, and the slab's descriptor with it."""
    # asyncio cannot send descriptors. Nothing was written to the transport yet, so that this
    # overtakes nothing.
    data = wire.message_frame(FrameKind.ACCEPTED, wire.Accepted(slab_bytes=slab.num_bytes))
    with socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno())) as connection:
        if socket.send_fds(connection, [data], [slab.descriptor]) != len(data):
            raise ServiceError("the first frame could not be sent")


async def read_frame(
    reader: asyncio.StreamReader, kinds: tuple[FrameKind, ...], num_rows: int = 0
) -> tuple[FrameKind, bytes]:
    """Read the next frame.

    Raises:
        ServiceError: it is not of these kinds, or too long.
    """
    kind, length = wire.HEADER.unpack(await reader.readexactly(wire.HEADER.size))
    wire.require_frame(kind, length, kinds, num_rows)
    return FrameKind(kind), await reader.readexactly(length)
