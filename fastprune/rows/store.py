"""Arrays by row on disk: filled by several processes at once, resumed after a kill.

A store holds rows x fields. Each field is a memory-mapped .npy file; beside them are a file of
marks, one byte per row, and a file of checksums, one CRC-32C per block of rows:

    store = RowStore(folder, num_rows, {"features": np.dtype((np.float16, (512,)))})
    rows = store.missing()
    store.put(rows, features)
    store.commit(seal=True)  # on disk, with checksums
    store.read("features", rows)

The order of writing is what makes it safe: data, fdatasync, then marks. A process that is killed
at any moment leaves unmarked rows and nothing else. A row never changes once it is marked, so
writing it twice changes nothing, and processes may overlap.

The scoring pass is one store; a teacher cache has one per slot. Where the data lives in files of
other formats, such as the sparse files of a mirror, `Marks` serves by itself.
"""

import fcntl
import os
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from fastprune.base.checksums import crc32c
from fastprune.base.errors import ArtifactError
from fastprune.base.files import atomic_path, lock, write_all
from fastprune.base.headers import BAD_HEADER, Header

BLOCK_ROWS = 4096
LOCK_NAME = "lock"

# Checksum of a block that got rows since it was last summed.
_UNSEALED = -1
# What a killed process loses at most, and what rows that wait may take of memory.
_COMMIT_SECONDS = 10.0
_COMMIT_BYTES = 32 << 20
# struct flock of Linux: type, whence, start, length, process.
_FLOCK = "hhqqi4x"


class StoreHeader(Header):
    """Keys that the JSON header of every store has; its user adds more.

    Attributes:
        num_rows: of the store.
        identity: what the values were computed from, for `base.provenance.differences`.
    """

    num_rows: Annotated[int, Field(ge=1)]
    identity: dict[str, Any]


class Marks:
    """A byte per row in a .npy file: 1 once the row's data is there. Rows never lose their mark.

    Works without a store, for data in files of its own: claim rows, write and sync their data, call
    `done`. Processes and threads may do so at once; neighbors do not undo each other's marks.

        with marks.claim(rows) as absent:
            if absent is not None:  # None: another process or thread is at some of them
                ...                 # write the rows `absent`
                marks.done(absent)

    Attributes:
        path: of the file.
        array: (N,) bool, a live map: it shows the marks of other processes as they are set.
    """

    def __init__(self, path: Path, num_rows: int, *, cure: str):
        """Map the file.

        Args:
            path: of the file, which `create` made.
            num_rows: N.
            cure: a sentence for the error.

        Raises:
            ArtifactError: it is missing, damaged, or of another number of rows.
        """
        mapped = _open_map(path, np.dtype(bool), (num_rows,), cure)
        self.path = path
        # A plain view: memmap's own methods are slow on small pieces.
        self.array: NDArray[np.bool_] = mapped.view(np.ndarray)
        self._offset = int(mapped.offset)

    @staticmethod
    def create(path: Path, num_rows: int) -> None:
        """Make the file, with no row marked; raises an ArtifactError if it cannot be written."""
        _write_npy(path, np.zeros(num_rows, bool))

    @contextmanager
    def claim(self, rows: NDArray[np.int64]) -> Iterator[NDArray[np.int64] | None]:
        """Keep other processes and threads from claiming these rows, for as long as the block runs.

        The lock is the kernel's and ends with the process, however it ends. File systems without
        locks grant every claim: rows are then written twice, which changes nothing.

        Args:
            rows: (n,) in any order.

        Yields:
            The rows without a mark, in their order; None if another one has claimed some of them.
        """
        descriptor = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            runs = _runs(np.unique(rows))
            if all(_try_lock_range(descriptor, self._offset + a, b - a) for a, b in runs):
                # Looked at under the lock: another process may just have finished.
                yield rows[~self.array[rows]]
            else:
                yield None
        finally:
            os.close(descriptor)

    def done(self, rows: NDArray[np.int64]) -> None:
        """Mark rows (n,) whose data is on disk; raises an OSError if that cannot be written."""
        with _writable(self.path) as file:
            for start, stop in _runs(np.unique(rows)):
                write_all(file, b"\1" * (stop - start), self._offset + start)

    def sync(self) -> None:
        """Wait until the marks are on disk."""
        with _writable(self.path) as file:
            os.fdatasync(file)


class RowStore:
    """Fields by row on disk, with marks and checksums; see the module.

    One thread at a time may use an object; several objects, in any processes, may be of the same
    files. The files are made by the first commit, or by `create`.

    Attributes:
        folder: of the files.
        num_rows: N.
        fields: dtype of a row of each field, by the name of its file; a vector per row is a
            subarray, such as np.dtype((np.float16, (512,))).
    """

    def __init__(
        self,
        folder: Path,
        num_rows: int,
        fields: Mapping[str, np.dtype[Any]],
        *,
        marks: str = "marks",
        checksums: str = "crc32c",
    ):
        """Name the files; nothing is opened yet.

        Args:
            folder: which exists.
            num_rows: N.
            fields: file name without .npy, and dtype of a row.
            marks: file name of the marks, without .npy.
            checksums: file name of the checksums, without .npy.
        """
        self.folder = folder
        self.num_rows = num_rows
        self.fields = dict(fields)
        self._marks_path, self._checksums_path = self.path(marks), self.path(checksums)
        names = ", ".join(f"{name}.npy" for name in (*self.fields, marks, checksums))
        self._cure = f"Remove {names} from {folder}: the rows will be computed again."
        self._maps: dict[str, np.memmap[Any, Any]] = {}
        self._marks: Marks | None = None
        self._pending = _Pending(num_rows)

    def path(self, field: str) -> Path:
        """The file of a field."""
        return self.folder / f"{field}.npy"

    @property
    def pending_seconds(self) -> float:
        """Age of the oldest row that was put and is not on disk; 0 without any."""
        return self._pending.seconds

    @property
    def is_made(self) -> bool:
        """Whether the files exist; the marks are made last."""
        return self._marks_path.exists()

    def create(self, *, reserve: bool = False) -> None:
        """Make the files, if they do not exist, under the lock.

        Args:
            reserve: True to take their room on the disk now, so that a disk that is too small is
                noticed before the work; False to leave holes until rows are written.

        Raises:
            ArtifactError: the folder cannot be written, or the disk is too small.
        """
        with lock(self.folder / LOCK_NAME):
            self._create(reserve=reserve)

    def has(self, rows: NDArray[np.integer[Any]] | slice) -> NDArray[np.bool_]:
        """Whether each row was committed by any process, or put by this one: (n,) bool."""
        pending: NDArray[np.bool_] = self._pending.is_there[rows].copy()
        if self._open() and self._marks is not None:
            pending |= self._marks.array[rows]
        return pending

    def missing(self) -> NDArray[np.int64]:
        """The rows without values, sorted."""
        return np.flatnonzero(~self.has(slice(None)))

    def done_rows(self) -> NDArray[np.int64]:
        """The rows with values, sorted."""
        return np.flatnonzero(self.has(slice(None)))

    def put(self, rows: ArrayLike, *values: NDArray[Any]) -> None:
        """Keep values; rows that have some stay as they are.

        They are on disk after the next `commit`, which happens by itself every ten seconds.

        Args:
            rows: (n,) in any order; of a row that occurs twice the first counts.
            values: per field an array (n, ...) of its dtype, which must not change afterwards.

        Raises:
            ArtifactError: the disk is full, or the files cannot be written.
        """
        self._pending.add(np.asarray(rows, np.int64), values)
        self.commit_if_due()

    def commit_if_due(self) -> None:
        """Commit once the rows that wait are ten seconds old, or take much memory."""
        if self._pending.seconds > _COMMIT_SECONDS or self._pending.num_bytes > _COMMIT_BYTES:
            self.commit()

    def commit(self, *, seal: bool = False) -> None:
        """Write what was put: data first, then marks.

        Args:
            seal: also sum the blocks that any process changed, which reads them once.

        Raises:
            ArtifactError: the disk is full, or the files cannot be written. What was put since the
                last commit is dropped; what was committed stays.
        """
        # A whole store may lie where this process must not write.
        if not self._pending.num_bytes and not (seal and self._changed_blocks()):
            return
        try:
            with lock(self.folder / LOCK_NAME):
                if self._pending.num_bytes:
                    rows, values = self._pending.pop()
                    self._create()
                    self._write(rows, values)
                if seal:
                    self._seal()
        except OSError as error:
            raise ArtifactError(
                f"cannot write {self.folder}: {error.strerror}. What it holds stays whole; free "
                "some space and run the command again."
            ) from error

    def read(self, field: str, rows: NDArray[np.integer[Any]]) -> NDArray[Any]:
        """Values of rows that `has` names, (n, ...), compared with their checksums once.

        Raises:
            ArtifactError: a block is damaged, or a file was cut short or removed.
        """
        if self._pending.is_there[rows].any():
            self.commit()
        opened = self._open()
        assert opened, "only rows that are there are read"
        self._require_length(field)
        touched = np.zeros(len(self._is_verified), bool)
        touched[rows // BLOCK_ROWS] = True
        blocks = np.flatnonzero(touched & ~self._is_verified & (self._checksums != _UNSEALED))
        if len(blocks):
            with lock(self.folder / LOCK_NAME, shared=True):
                for fault in self._damaged(blocks):
                    raise ArtifactError(fault)
        return np.asarray(self._maps[field][rows])

    def map(self, field: str) -> np.memmap[Any, Any]:
        """A read-only memory map (N, ...) of a field; zeros where rows are missing."""
        opened = self._open()
        assert opened, "made or committed before"
        return self._maps[field]

    def check(self) -> Iterator[str]:
        """Read everything and compare it with the checksums.

        Yields:
            A sentence for each damaged block or file. Missing rows are not damage.
        """
        try:
            if not self._open():
                return
            for block in range(len(self._is_verified)):
                with lock(self.folder / LOCK_NAME, shared=True):
                    faults = list(self._damaged([block]))
                yield from faults
        except ArtifactError as error:
            yield str(error)

    def close(self) -> None:
        """Write what was put, and close the files; raises as `commit`."""
        try:
            self.commit()
        finally:
            self._maps, self._marks = {}, None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _create(self, *, reserve: bool = False) -> None:
        """Make missing files; under the lock, exclusively."""
        if self.is_made:
            return
        for name, dtype in self.fields.items():
            _write_sparse(self.path(name), dtype, self.num_rows, reserve=reserve)
        num_blocks = -(-self.num_rows // BLOCK_ROWS)
        _write_npy(self._checksums_path, np.full(num_blocks, _UNSEALED, "<i8"))
        # Last, see `is_made`.
        Marks.create(self._marks_path, self.num_rows)

    def _open(self) -> bool:
        """Map the files, once they exist.

        Raises:
            ArtifactError: one is missing, truncated, pickled, or of another shape or dtype.
        """
        if self._marks is not None or not self.is_made:
            return self._marks is not None
        for name, dtype in self.fields.items():
            shape = (self.num_rows, *dtype.shape)
            self._maps[name] = _open_map(self.path(name), dtype.base, shape, self._cure)
        blocks = (-(-self.num_rows // BLOCK_ROWS),)
        checksums = _open_map(self._checksums_path, np.dtype("<i8"), blocks, self._cure)
        self._checksums: NDArray[np.int64] = checksums.view(np.ndarray)
        self._checksums_offset = int(checksums.offset)
        self._is_verified = np.zeros(blocks, bool)
        self._marks = Marks(self._marks_path, self.num_rows, cure=self._cure)
        return True

    def _require_length(self, field: str) -> None:
        # Beyond the end of a file, a map ends the process by SIGBUS.
        path, mapped = self.path(field), self._maps[field]
        try:
            num_bytes = path.stat().st_size
        except OSError as error:
            raise ArtifactError(
                f"{path} was removed while it was open ({error.strerror}). Put it back, or leave "
                "the folder alone while it is used."
            ) from error
        if num_bytes < mapped.offset + mapped.nbytes:
            raise ArtifactError(f"{path} shrank while it was open. {self._cure}")

    def _write(self, rows: NDArray[np.int64], values: list[NDArray[Any]]) -> None:
        """Write rows, sorted and unique, that have no mark yet; under the lock, exclusively."""
        opened = self._open()
        assert opened
        assert self._marks is not None
        is_new = ~self._marks.array[rows]
        rows = rows[is_new]
        if len(rows) == 0:
            return
        runs = list(_runs(rows))
        for (name, dtype), whole in zip(self.fields.items(), values, strict=True):
            new = np.ascontiguousarray(whole[is_new])
            lines, at = new.view(np.uint8).reshape(len(rows), dtype.itemsize), 0
            with _writable(self.path(name)) as file:
                for start, stop in runs:
                    part = lines[at : at + stop - start]
                    write_all(file, part, int(self._maps[name].offset) + start * dtype.itemsize)
                    at += stop - start
                os.fdatasync(file)
        self._unseal(np.unique(rows // BLOCK_ROWS))
        self._marks.done(rows)

    def _unseal(self, blocks: NDArray[np.int64]) -> None:
        """Withdraw the checksums of blocks before new rows in them get their marks."""
        if (self._checksums[blocks] == _UNSEALED).all():
            return
        checksums = self._checksums.copy()
        checksums[blocks] = _UNSEALED
        self._is_verified[blocks] = False
        # Synced: after a power cut that kept the marks but not this, blocks would look damaged.
        self._write_checksums(checksums)

    def _changed_blocks(self) -> list[int]:
        """Blocks that got rows since they were last summed, from any process."""
        if not self._open() or self._marks is None:
            return []
        starts = range(0, self.num_rows, BLOCK_ROWS)
        has_rows = np.logical_or.reduceat(self._marks.array, starts)
        blocks: list[int] = np.flatnonzero(has_rows & (self._checksums == _UNSEALED)).tolist()
        return blocks

    def _seal(self) -> None:
        """Sum the blocks that changed, and sync marks and checksums; under the lock."""
        checksums = self._checksums.copy() if self._open() else np.empty(0, np.int64)
        for block in self._changed_blocks():
            checksums[block] = self._sum(block)
            self._is_verified[block] = True
        if self._marks is not None:
            self._marks.sync()
            self._write_checksums(checksums)

    def _write_checksums(self, checksums: NDArray[np.int64]) -> None:
        with _writable(self._checksums_path) as file:
            write_all(file, checksums, self._checksums_offset)
            os.fdatasync(file)

    def _damaged(self, blocks: NDArray[np.intp] | list[int]) -> Iterator[str]:
        """Compare blocks with their checksums; under the lock, shared."""
        for block in blocks:
            if self._checksums[block] == _UNSEALED:
                continue
            if self._sum(block) == self._checksums[block]:
                self._is_verified[block] = True
                continue
            first = int(block) * BLOCK_ROWS
            last = min(first + BLOCK_ROWS, self.num_rows) - 1
            paths = " or ".join(str(self.path(name)) for name in self.fields)
            yield (
                f"{paths} is damaged: entries {first:,} to {last:,} do not have the CRC-32C in "
                f"{self._checksums_path.name}. {self._cure}"
            )

    def _sum(self, block: int | np.intp) -> int:
        """CRC-32C over the marked rows of a block: in order, field by field."""
        assert self._marks is not None
        span = slice(int(block) * BLOCK_ROWS, (int(block) + 1) * BLOCK_ROWS)
        marked, crc = self._marks.array[span], 0
        for mapped in self._maps.values():
            data = mapped[span] if marked.all() else mapped[span][marked]
            crc = crc32c(np.asarray(data).view(np.uint8), crc)
        return crc


class _Pending:
    """Rows that were put and not written yet, in memory.

    Attributes:
        is_there: (N,) bool, which rows.
        num_bytes: that they take.
    """

    def __init__(self, num_rows: int):
        self.is_there = np.zeros(num_rows, bool)
        self.num_bytes = 0
        self._since = 0.0
        self._parts: list[tuple[NDArray[np.int64], tuple[NDArray[Any], ...]]] = []

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._since if self._parts else 0.0

    def add(self, rows: NDArray[np.int64], values: tuple[NDArray[Any], ...]) -> None:
        if len(rows) == 0:
            return
        if not self._parts:
            self._since = time.monotonic()
        self._parts.append((rows, values))
        self.is_there[rows] = True
        self.num_bytes += sum(value.nbytes for value in values)

    def pop(self) -> tuple[NDArray[np.int64], list[NDArray[Any]]]:
        """Give all away: sorted rows, each once as it was put first, and their fields."""
        parts, self._parts, self.num_bytes = self._parts, [], 0
        self.is_there[:] = False
        rows, first = np.unique(np.concatenate([rows for rows, _ in parts]), return_index=True)
        columns = zip(*(values for _, values in parts), strict=True)
        return rows, [np.concatenate(column)[first] for column in columns]


def disk_bytes(folder: Path) -> int:
    """Bytes that the files of a folder take on the disk; 0 if it does not exist."""
    total = 0
    with suppress(FileNotFoundError):
        for file in folder.iterdir():
            # Another writer's temporary file may be gone already.
            with suppress(FileNotFoundError):
                total += file.stat().st_blocks * 512
    return total


def _runs(rows: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Cut sorted, unique rows where they are not consecutive: (first, last + 1) of each run."""
    if len(rows) == 0:
        return
    starts = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
    for start, stop in zip(starts, [*starts[1:], len(rows)], strict=True):
        yield int(rows[start]), int(rows[stop - 1]) + 1


def _try_lock_range(descriptor: int, start: int, size: int) -> bool:
    """Lock a range of bytes for this open file; False if another one has some of it locked."""
    request = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, start, size, 0)
    try:
        # Of the open file and not of the process, so that threads exclude each other too.
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, request)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return True  # a file system without locks
    return True


def _open_map(
    path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], cure: str
) -> np.memmap[Any, Any]:
    """Map a .npy file, read-only, that must be of this dtype and shape."""
    try:
        mapped = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} is missing. {cure}") from error
    except (OSError, ValueError, *BAD_HEADER) as error:  # truncated, pickled, or another format
        raise ArtifactError(
            f"{path} is not a whole .npy file of numbers: {error}. {cure}"
        ) from error
    if mapped.dtype != dtype or mapped.shape != shape or not mapped.flags.c_contiguous:
        raise ArtifactError(
            f"{path} holds {mapped.dtype} of shape {mapped.shape}, but {dtype} of shape {shape} is "
            f"expected. {cure}"
        )
    return mapped


def _write_sparse(path: Path, dtype: np.dtype[Any], num_rows: int, *, reserve: bool) -> None:
    """Make a .npy file of zeros that takes no room yet, or all of it."""
    header = {
        "descr": np.lib.format.dtype_to_descr(dtype.base),
        "fortran_order": False,
        "shape": (num_rows, *dtype.shape),
    }
    num_bytes = num_rows * dtype.itemsize
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + num_bytes)
        try:
            if reserve:
                os.posix_fallocate(file.fileno(), 0, file.tell() + num_bytes)
        except OSError as error:
            raise ArtifactError(
                f"cannot reserve {num_bytes / 1e9:.1f} GB for {path}: {error.strerror}. Free some "
                "space or name another output."
            ) from error


def _write_npy(path: Path, array: NDArray[Any]) -> None:
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, array, allow_pickle=False)


@contextmanager
def _writable(path: Path) -> Iterator[int]:
    """A descriptor to write into an existing file with."""
    file = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        yield file
    finally:
        os.close(file)
