"""Files: written whole or not at all, locked, and read within bounds."""

import contextlib
import errno
import fcntl
import logging
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

from fastprune.base.errors import ArtifactError

logger = logging.getLogger(__name__)

# A sidecar of 1,000,000 classes takes 40 MB; nothing else that is read whole comes close.
MAX_BYTES = 128 << 20

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary path in the same folder; rename it to `path` when the block succeeds.

    The data is fsynced before the rename and the folder after it. When the block fails, the
    temporary file is removed and an earlier file at `path` is untouched. The block must create the
    temporary file.

    Raises:
        ArtifactError: the folder does not exist, the disk is full, writing is not allowed, or
            `path` is a device, a FIFO or a socket.
    """
    final = destination(path)
    with temporary_path(final) as temporary, named_os_errors(Path(path)):
        yield temporary
        sync(temporary)
        temporary.replace(final)
        # The rename itself is on the disk only when the folder is.
        sync(final.parent)


@contextmanager
def temporary_path(final: Path) -> Iterator[Path]:
    """Give a hidden name beside a file; a file that still has it at the end is removed."""
    # In the same folder, because a rename is atomic within one file system alone.
    temporary = final.parent / f".{final.name}.{secrets.token_hex(4)}.tmp"
    try:
        yield temporary
    finally:
        # On a read-only disk even removing nothing is refused, and would hide the named error.
        with contextlib.suppress(OSError):
            temporary.unlink()


def destination(path: str | Path) -> Path:
    """Return where a file is written: links are followed, so that the data lands on their disk.

    Raises:
        ArtifactError: a device, a FIFO or a socket has this name: a rename would silently replace
            it. (A rename onto a folder fails by itself.)
    """
    final = Path(path)
    if final.is_symlink():
        final = Path(os.path.realpath(final))
    try:
        mode = final.stat().st_mode
    except OSError:
        return final  # missing, or opening it will raise
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ArtifactError(
            f"cannot write {path}: it is {kind_of_file(mode)}, which a file would replace. Name a "
            "new file."
        )
    return final


@contextmanager
def lock(path: str | Path, *, shared: bool = False, wait: bool = True) -> Iterator[None]:
    """Hold a lock file's lock, which excludes other processes and other threads of this one.

    The kernel frees the lock when the process ends, however it ends; the file stays. Where the
    file system has no locks, nothing is held.

    Args:
        path: the lock file; made where it is missing, as in a copy of the other files.
        shared: hold it together with others who share it. Where the file is missing and cannot be
            made, writers cannot lock it either, and nothing is held.
        wait: False to raise where somebody else holds it.

    Raises:
        ArtifactError: the file cannot be made, or somebody else holds the lock.
    """
    path = Path(path)
    try:
        with named_os_errors(path):
            descriptor = _open_lock(path)
    except ArtifactError:
        if not shared:
            raise
        yield
        return
    try:
        operation = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        if not _flock(descriptor, operation | (0 if wait else fcntl.LOCK_NB)):
            raise ArtifactError(
                f"another process is writing into {path.parent}. Wait for it, or name another "
                "folder."
            )
        yield
    finally:
        os.close(descriptor)


def _open_lock(path: Path) -> int:
    """Open a lock file, and create it if it is missing."""
    # First without O_CREAT, which is refused for other people's files in folders like /tmp. And
    # first for writing: NFS gives exclusive locks on no other descriptor.
    for flags in (os.O_RDWR, os.O_RDONLY):
        with contextlib.suppress(PermissionError, FileNotFoundError):
            return os.open(path, flags | os.O_CLOEXEC)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)


def try_lock(file: int | IO[bytes] | IO[str]) -> bool:
    """Lock an open file for this process and those it forks, without waiting.

    Args:
        file: the file or its descriptor; the lock ends when the last copy of it is closed.

    Returns:
        False if another process holds the lock. True also where the file system has no locks:
        then nothing is held, and two writers are the user's responsibility.
    """
    return _flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _flock(file: int | IO[bytes] | IO[str], operation: int) -> bool:
    """Return False if another process holds the lock; True also if locks are unsupported."""
    try:
        fcntl.flock(file, operation)
    except OSError as error:
        # EACCES is what flock gives where it is made of fcntl's locks, as on NFS.
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        logger.debug("the file system has no locks (%s)", error)
    return True


def write_all(descriptor: int, data: Any, offset: int) -> None:
    """Write all bytes of a buffer, or of a list of at most IOV_MAX (1,024) buffers, at an offset.

    Raises:
        OSError: not all of it can be written.
    """
    buffers: list[Any] = data if isinstance(data, list) else [data]
    written = os.pwritev(descriptor, buffers, offset)
    if written == sum(memoryview(buffer).nbytes for buffer in buffers):
        return
    # The kernel writes only a part when the disk fills up; the next call then raises ENOSPC.
    rest = memoryview(b"".join(bytes(buffer) for buffer in buffers))[written:]
    offset += written
    while rest:
        written = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[written:], offset + written


def write_text(path: str | Path, text: str) -> None:
    """Write a whole UTF-8 text file, or nothing; raises as `atomic_path` does."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def named_os_errors(path: Path) -> Iterator[None]:
    """Turn an OSError into an ArtifactError that names the artifact and the cure."""
    try:
        yield
    except FileNotFoundError as error:
        # With the folder in place, the block itself misses a file, which the disk cannot help.
        if path.parent.is_dir():
            raise
        raise ArtifactError(
            f"cannot write {path}: the folder {path.parent} does not exist. Create it first."
        ) from error
    except OSError as error:
        # numpy reports a full disk without a number: "100000 requested and 12484 written".
        reason = str(error) if error.errno is None else os.strerror(error.errno)
        raise ArtifactError(
            f"cannot write {path}: {reason}. Nothing was left behind; free some space or name "
            "another folder and run the command again."
        ) from error


def sync(path: Path) -> None:
    """Flush a file, or the renames in a folder, to the disk; raises OSError for files alone."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # Not every file system can flush a folder.
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def kind_of_file(mode: int) -> str:
    """Name the kind of a file by its mode: "a regular file", "a FIFO", ..."""
    return next((name for is_kind, name in _KINDS if is_kind(mode)), "a regular file")


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading; a device or a pipe is refused instead of waited for.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is not a regular file.
    """
    # Opening a FIFO without O_NONBLOCK waits for a writer, perhaps forever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise ValueError(f"it is {kind_of_file(mode)}, but must be a regular file")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: str | Path, *, max_bytes: int = MAX_BYTES) -> bytes:
    """Read a whole regular file of bounded size.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a regular file, or larger than `max_bytes`.
    """
    with open_regular(path) as file:
        # One byte more than allowed: files in /proc have a size of 0, others may grow.
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"it has more than {max_bytes:,} bytes")
    return content


def read_text(path: str | Path, *, max_bytes: int = MAX_BYTES) -> str:
    """Read a whole UTF-8 text file of bounded size, with or without a byte order mark.

    Raises:
        OSError: it cannot be read.
        ValueError: as `read_bytes`, or it is not UTF-8.
    """
    return read_bytes(path, max_bytes=max_bytes).decode("utf-8-sig")
