"""The Unix socket of a service: for its owner alone, and with a descriptor in its first frame."""

import asyncio
import contextlib
import os
import socket
import stat
import struct
from pathlib import Path
from typing import Any

from fastprune.errors import InvalidValueError
from fastprune.loading import service_wire as wire
from fastprune.loading.service_wire import Kind, ServiceError, ServiceRefusedError
from fastprune.service.slab import Slab

_PEER = struct.Struct("3i")  # pid, uid, gid; see unix(7)


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
