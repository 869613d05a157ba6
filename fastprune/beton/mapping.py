"""Files mapped into memory: one, or several contiguously in one address range."""

import contextlib
import ctypes
import mmap
import os
import weakref
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from fastprune.base.errors import BetonError
from fastprune.beton import layout

# Linux's, which the mmap module does not name: map at this very address, over what is there.
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MOST_AHEAD_BYTES = 64 << 20  # more than the tables of any shard seen so far
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


def map_file(path: Path) -> tuple[NDArray[np.uint8], os.stat_result]:
    """Map a file into memory for reading; (file size,) uint8, not writable, and its status.

    Raises:
        BetonError: the file cannot be opened.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            # mmap refuses an empty file with an error that names no file.
            if status.st_size == 0:
                return np.empty(0, np.uint8), status
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            return np.frombuffer(content, np.uint8), status
    except FileNotFoundError as error:
        raise BetonError(
            f"{path} does not exist. Make it with: fastprune convert IMAGES {path}"
        ) from error
    except (OSError, ValueError) as error:
        raise BetonError(f"cannot read {path}: {error}. Name a beton file.") from error


def map_contiguously(
    paths: list[Path],
) -> tuple[NDArray[np.uint8], list[int], list[os.stat_result]]:
    """Map files into one range of addresses, so that one array and one offset reach any byte.

    An address range without backing memory is reserved, and each file is mapped at its place in it,
    so consumers of a beton's content handle several files like one, at the same speed.

    Returns:
        content: (range,) uint8, not writable. Bytes between the files must not be touched.
        starts: where each file starts in it: multiples of all page sizes, so that pages of two
            files never share a page number.
        statuses: of the files, from the descriptors that were mapped.

    Raises:
        BetonError: a file cannot be opened or mapped.
    """
    sizes, alignment = [], layout.DEFAULT_PAGE_BYTES
    for path in paths:
        with _opened(path) as file:
            _read_ahead(file, 0, layout.HEADER.itemsize)
    for path in paths:
        with _opened(path) as file:
            sizes.append(os.fstat(file.fileno()).st_size)
            header = file.read(layout.HEADER.itemsize).ljust(layout.HEADER.itemsize, b"\0")
            # A bad page size is refused later, by the checks of `structure`.
            [(_, num_fields, page_bytes, num_rows, table_offset)] = np.frombuffer(
                header, layout.HEADER
            ).tolist()
            _read_ahead(file, 0, layout.metadata_start(num_fields) + 24 * num_rows)
            _read_ahead(file, table_offset, sizes[-1] - table_offset)
        if page_bytes.bit_count() == 1:
            alignment = max(alignment, page_bytes)
    starts, end = [], 0
    for size in sizes:
        starts.append(end)
        end += layout.align_up(max(size, 1), alignment)
    mapping = _Range(end)
    statuses = []
    # Opened again one by one: there may be more shards than a process may have files open.
    for path, start, size in zip(paths, starts, sizes, strict=True):
        with _opened(path) as file:
            statuses.append(os.fstat(file.fileno()))
            if statuses[-1].st_size != size:
                raise BetonError(f"{path} changed while it was opened. Open the beton again.")
            if size:
                mapping.map(path, file, start, size)
    return np.asarray(mapping), starts, statuses


def _read_ahead(file: BinaryIO, start: int, size: int) -> None:
    """Start reading a range in the background: one disk access after another is slow."""
    # Ignore numbers of a damaged header, and file systems without this call.
    with contextlib.suppress(OSError, OverflowError):
        os.posix_fadvise(
            file.fileno(), start, min(max(size, 1), _MOST_AHEAD_BYTES), os.POSIX_FADV_WILLNEED
        )


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise BetonError(f"cannot read {path}: {error}. Get the shard again.") from error


class _Range:
    """An address range, unmapped when the last array that views it is gone."""

    def __init__(self, num_bytes: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        address = _libc.mmap(None, num_bytes, 0, flags, -1, 0)  # 0: no access at all
        if address == _FAILED:
            raise BetonError(
                f"cannot reserve {num_bytes:,} bytes of addresses: "
                f"{os.strerror(ctypes.get_errno())}. Raise the limit with `ulimit -v`."
            )
        self._address = address
        # NumPy keeps this object as the base of its array, and so as long as any view of it.
        self.__array_interface__ = {
            "data": (address, True),  # read-only
            "shape": (num_bytes,),
            "typestr": "|u1",
            "version": 3,
        }
        # Not at exit, where threads may still be reading: the system takes the range back then.
        weakref.finalize(self, _libc.munmap, address, num_bytes).atexit = False

    def map(self, path: Path, file: BinaryIO, start: int, size: int) -> None:
        """Map a whole file at an offset of the range."""
        flags = mmap.MAP_SHARED | _MAP_FIXED
        where = _libc.mmap(self._address + start, size, mmap.PROT_READ, flags, file.fileno(), 0)
        if where == _FAILED:
            reason = os.strerror(ctypes.get_errno())
            raise BetonError(f"cannot map {path}: {reason}. Get the shard again.")
