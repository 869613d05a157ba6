"""The Unix socket of a service: for its owner alone, and with a descriptor in its first frame.

Every conversation is one coroutine: it reads a frame and hands it to the desk.
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
from typing import Any, cast

import numpy as np

from fastprune.base.errors import InvalidValueError
from fastprune.service import wire
from fastprune.service.demand import Ask
from fastprune.service.desk import Desk
from fastprune.service.slab import Slab
from fastprune.service.wire import Kind, ServiceError, ServiceRefusedError

_LOG = logging.getLogger(__name__)

_PEER = struct.Struct("3i")  # pid, uid, gid; see unix(7)
_HELLO_SECONDS = 10.0
_MOST_CONNECTIONS = 1024
# A client that asks and never reads: its answers are small, but not for nothing.
_MOST_UNREAD_BYTES = 4 << 20


class UnixDoor:
    """Lets clients of this machine in; see `server.Door`."""

    def __init__(self, path: Path, desk: Desk):
        """Prepare to listen at a path."""
        self.address = f"unix:{path}"
        self._path = path
        self._desk = desk
        self._talks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        """Listen.

        Raises:
            InvalidValueError: another service listens there.
        """
        listening = listening_socket(self._path)
        self._server = await asyncio.start_unix_server(self._accept, sock=listening)

    def stop_listening(self) -> None:
        """Let nobody in any more, so that whoever comes finds the next server."""
        if self._server is not None:
            self._server.close()
            self._server = None
            self._path.unlink(missing_ok=True)

    async def close(self) -> None:
        """End all conversations."""
        self.stop_listening()
        talks = list(self._talks)
        for task in talks:
            task.cancel()
        await asyncio.gather(*talks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Talk with whoever connected, until one of both ends it."""
        task = asyncio.current_task()
        assert task is not None
        self._talks.add(task)
        try:
            await self._talk(reader, writer)
        except ServiceError as error:
            _LOG.info("a client was refused: %s", error)
            writer.write(wire.json_frame(Kind.REFUSED, {"reason": str(error)}))
        except (OSError, EOFError, TimeoutError, asyncio.CancelledError):
            pass  # it left, or the server ends
        finally:
            self._talks.discard(task)
            writer.close()
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await writer.wait_closed()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Greet a client, then have done what it says.

        Raises:
            ServiceError: it says what cannot be done; it alone is to end.
        """
        connection, desk = writer.get_extra_info("socket"), self._desk
        require_own_user(connection)
        if len(self._talks) > _MOST_CONNECTIONS:
            raise ServiceRefusedError(f"{_MOST_CONNECTIONS} clients are connected already")
        async with asyncio.timeout(_HELLO_SECONDS):
            kind, payload = await read_frame(reader, (Kind.HELLO, Kind.STATUS))
        if kind == Kind.STATUS:
            writer.write(wire.json_frame(Kind.STATUS, desk.status()))
            await writer.drain()
            return
        pid, uid, _ = peer(connection)
        whence = f"pid {pid}, uid {uid}"
        client = desk.admit(wire.read_json(payload), whence, UnixPeer(writer))
        try:
            send_welcome(writer, desk.slab)
            while True:
                kinds = (Kind.EPOCH, Kind.ASK, Kind.TAKEN)
                kind, payload = await read_frame(reader, kinds, client.images.num_rows)
                desk.obey(client, kind, payload)
        finally:
            desk.leave(client)


class UnixPeer:
    """The other end of a conversation; see `desk.Peer`."""

    def __init__(self, writer: asyncio.StreamWriter):
        self._writer = writer
        self._transport = cast("asyncio.Transport", writer.transport)

    @property
    def is_flushed(self) -> bool:
        """Whether the kernel has everything."""
        return self._transport.get_write_buffer_size() == 0

    def send_views(self, ask: Ask) -> None:
        """Send where the views lie."""
        self._writer.write(_views(ask))
        if self._transport.get_write_buffer_size() > _MOST_UNREAD_BYTES:
            self._transport.abort()  # its conversation ends, and frees what it held

    def send_alive(self) -> None:
        """Send a frame that says nothing else."""
        self._writer.write(wire.frame(Kind.ALIVE))

    def refuse(self, reason: str) -> None:
        """Send why, and close."""
        self._writer.write(wire.json_frame(Kind.REFUSED, {"reason": reason}))
        self._writer.close()

    def pause(self) -> None:
        """Read no more."""
        self._transport.pause_reading()


def _views(ask: Ask) -> bytes:
    """The frame that answers an ask."""
    places = np.full(ask.num_views, 0, wire.PLACE)
    places["offset"] = [wire.NOWHERE if e is None else e.offset for e in ask.entries]
    places["generation"] = [0 if e is None else e.generation for e in ask.entries]
    reasons = json.dumps(ask.reasons).encode() if ask.reasons else b""
    return wire.frame(Kind.VIEWS, wire.NUMBER.pack(ask.number), places.tobytes(), reasons)


def listening_socket(path: Path) -> socket.socket:
    """A socket for this user alone; what a killed server left there is removed.

    Raises:
        InvalidValueError: another server listens there, or something else is there.
    """
    if path.exists() or path.is_symlink():
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise InvalidValueError(f"{path} exists and is no socket. Name another path.")
        with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(ConnectionRefusedError):
            probe.connect(str(path))
            raise InvalidValueError(
                f"another service listens at unix:{path}. Name another path, or stop it."
            )
    listening = socket.socket(socket.AF_UNIX)
    # Renamed once it listens: who finds the name can connect. The mode comes into being with the
    # file, so that there is no moment of another one.
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


def require_own_user(connection: Any) -> None:
    """Refuse other users, whatever the mode of the socket.

    Raises:
        ServiceRefusedError: it is another one, and not root.
    """
    _, uid, _ = peer(connection)
    if uid not in (0, os.geteuid()):
        raise ServiceRefusedError(f"it serves user {os.geteuid()} alone, not user {uid}")


def peer(connection: Any) -> tuple[int, int, int]:
    """Process, user and group at the other end, as the kernel says."""
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    pid, uid, gid = _PEER.unpack(found)
    return pid, uid, gid


def send_welcome(writer: asyncio.StreamWriter, slab: Slab) -> None:
    """Send the first frame, and the slab's descriptor with it."""
    # asyncio has no way to send descriptors; nothing else was written yet, so that nothing of the
    # transport's is overtaken.
    data = wire.json_frame(Kind.WELCOME, {"slab_bytes": slab.num_bytes})
    with socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno())) as connection:
        if socket.send_fds(connection, [data], [slab.descriptor]) != len(data):
            raise ServiceError("the first frame could not be sent")


async def read_frame(
    reader: asyncio.StreamReader, kinds: tuple[Kind, ...], num_rows: int = 0
) -> tuple[Kind, bytes]:
    """The next frame, if it is of these kinds.

    Raises:
        ServiceError: it is not, or too long.
    """
    kind, length = wire.HEADER.unpack(await reader.readexactly(wire.HEADER.size))
    if kind not in kinds or length > wire.most_bytes(kind, num_rows):
        raise ServiceError(f"a frame of kind {kind} and {length:,} bytes is not understood")
    return Kind(kind), await reader.readexactly(length)
