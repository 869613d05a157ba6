"""One slot of a teacher cache: three .npy files that are written in place.

A row's logits are immutable from the moment its bit in `filled` is set. The bit is set after the
data is on the disk, so a writer that is killed at any moment leaves holes and nothing else.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from fastprune.base.errors import ArtifactError, InvalidValueError
from fastprune.base.files import atomic_path
from fastprune.base.untrusted import BAD_HEADER

DTYPES = ("float16", "float32", "uint8")
BLOCK_ROWS = 4096
# A block whose rows changed since it was summed, or that was never summed.
_OPEN = -1


def stored_dtype(dtype: str, num_classes: int) -> np.dtype[np.void]:
    """What one row of a slot file is: C numbers, or C codes with the row's offset and scale."""
    if dtype == "uint8":
        return np.dtype([("offset", "<f2"), ("scale", "<f2"), ("codes", "u1", (num_classes,))])
    return np.dtype((np.dtype(dtype).newbyteorder("<"), (num_classes,)))


def encode(logits: NDArray[np.float32], rows: NDArray[np.int64], dtype: str) -> NDArray[np.generic]:
    """Turn logits into what a slot file stores.

    Args:
        logits: (n, C) float32.
        rows: (n,) int64, their rows, for the message.
        dtype: one of `DTYPES`.

    Returns:
        (n, C) float16 or float32; or (n,) records of an offset, a scale and C uint8 codes, whose
        logits are offset + scale * code.

    Raises:
        InvalidValueError: a logit is NaN or infinite, or too large for the dtype.
    """
    _require_finite(logits, rows, "is NaN or infinite", "Check the teacher's weights and input.")
    too_large = f"is too large for {dtype} (largest {np.abs(logits).max(initial=0):g})"
    wider = 'Make the cache with dtype "float32".'
    if dtype != "uint8":
        with np.errstate(over="ignore"):
            stored = logits.astype(dtype)
        _require_finite(stored, rows, too_large, wider)
        return stored
    records: NDArray[Any] = np.empty(len(logits), stored_dtype(dtype, logits.shape[1]))
    low, high = logits.min(axis=1), logits.max(axis=1)
    # Offset rounds down and scale up, so that 0 to 255 reaches every logit of the row.
    with np.errstate(over="ignore", invalid="ignore"):
        offset = low.astype(np.float16)
        offset = np.where(offset > low, np.nextafter(offset, np.float16(-np.inf)), offset)
        span = high - offset.astype(np.float32)
        scale = (span / 255).astype(np.float16)
        scale = np.where(
            scale.astype(np.float32) * 255 < span, np.nextafter(scale, np.float16(np.inf)), scale
        )
    _require_finite(np.stack([offset, scale], axis=1), rows, too_large, wider)
    step = np.where(scale > 0, scale, 1).astype(np.float32)[:, None]
    codes = np.rint((logits - offset.astype(np.float32)[:, None]) / step)
    records["offset"], records["scale"] = offset, scale
    records["codes"] = codes.clip(0, 255).astype(np.uint8)
    return records


def decode(stored: NDArray[Any]) -> NDArray[np.float32]:
    """The inverse of `encode`, up to its rounding: (n, C) float32."""
    if stored.dtype.names is None:
        return stored.astype(np.float32)
    scale = stored["scale"].astype(np.float32)[:, None]
    offset = stored["offset"].astype(np.float32)[:, None]
    decoded: NDArray[np.float32] = stored["codes"].astype(np.float32) * scale + offset
    return decoded


class Slot:
    """The files of one slot, open to read; its caller holds the cache's lock for what it says.

    Attributes:
        filled: (R,) bool, which rows have logits; a live map that shows other writers' rows too.
    """

    def __init__(self, folder: Path, slot: int, *, num_rows: int, dtype: np.dtype[np.void]):
        """Map the files.

        Raises:
            ArtifactError: one is missing, truncated, pickled, or of another shape or dtype.
        """
        names = slot_names(slot)
        self._data_path, self._filled_path, self._crc_path = (folder / name for name in names)
        self._cure = f"Remove {', '.join(names)} from {folder}: the slot will be filled again."
        self._dtype = dtype
        self._data = _open_map(self._data_path, dtype.base, (num_rows, *dtype.shape), self._cure)
        self.filled = _open_map(self._filled_path, np.dtype(bool), (num_rows,), self._cure)
        blocks = (_num_blocks(num_rows),)
        self._crc = _open_map(self._crc_path, np.dtype("<i8"), blocks, self._cure)
        self._data_bytes = self._data_path.stat().st_size
        self._is_verified = np.zeros(blocks, bool)

    @staticmethod
    def exists(folder: Path, slot: int) -> bool:
        """Whether the slot's files were made; the bitmap is made last."""
        return (folder / slot_names(slot)[1]).exists()

    @staticmethod
    def create(folder: Path, slot: int, *, num_rows: int, dtype: np.dtype[np.void]) -> None:
        """Make the files of an empty slot; the data is a hole in the file until it is written."""
        data, filled, crc = (folder / name for name in slot_names(slot))
        _write_sparse(data, dtype.base, (num_rows, *dtype.shape))
        _write_whole(crc, np.full(_num_blocks(num_rows), _OPEN, "<i8"))
        # Last: see `exists`.
        _write_whole(filled, np.zeros(num_rows, bool))

    def read(self, positions: NDArray[np.intp]) -> NDArray[np.generic]:
        """What is stored at filled positions.

        Raises:
            ArtifactError: the file shrank, or is gone.
        """
        # Beyond the end of a file, a map raises SIGBUS and not an exception.
        try:
            num_bytes = self._data_path.stat().st_size
        except OSError as error:
            raise ArtifactError(
                f"{self._data_path} is gone while it was open ({error.strerror}). Put it back, or "
                f"leave the cache alone while it is used. {self._cure}"
            ) from error
        if num_bytes < self._data_bytes:
            raise ArtifactError(f"{self._data_path} shrank while it was open. {self._cure}")
        return np.asarray(self._data[positions])

    def unverified_blocks(self, positions: NDArray[np.intp]) -> NDArray[np.intp]:
        """Blocks of these positions that were not compared with their CRC since it was opened."""
        touched = np.zeros(len(self._is_verified), bool)
        touched[positions // BLOCK_ROWS] = True
        return np.flatnonzero(touched & ~self._is_verified & (self._crc != _OPEN))

    def damaged(self, blocks: NDArray[np.intp]) -> list[str]:
        """Compare blocks with their CRCs; under the lock, shared.

        Returns:
            A sentence for each block that was damaged; blocks without a CRC are passed over.
        """
        faults = []
        for block in blocks[self._crc[blocks] != _OPEN]:
            if self._sum(int(block)) == self._crc[block]:
                self._is_verified[block] = True
                continue
            first = int(block) * BLOCK_ROWS
            last = min(first + BLOCK_ROWS, len(self.filled)) - 1
            faults.append(
                f"{self._data_path} is damaged: entries {first:,} to {last:,} do not have the "
                f"CRC-32C in {self._crc_path.name}. {self._cure}"
            )
        return faults

    def all_blocks(self) -> NDArray[np.intp]:
        """Every block of the slot."""
        return np.arange(len(self._crc))

    def write(self, positions: NDArray[np.intp], stored: NDArray[np.generic]) -> None:
        """Write entries that are not filled yet; under the lock, alone.

        Args:
            positions: (n,) sorted, unique.
            stored: (n, ...) as `encode` returned it; entries that are filled are passed over.

        Raises:
            OSError: the disk is full, or writing is not allowed; what was filled before stays.
        """
        is_new = ~self.filled[positions]
        positions, stored = positions[is_new], np.ascontiguousarray(stored[is_new])
        if len(positions) == 0:
            return
        row_bytes = self._dtype.itemsize
        lines = stored.view(np.uint8).reshape(len(positions), row_bytes)
        starts = np.flatnonzero(np.diff(positions, prepend=-2) != 1)
        with _writable(self._data_path) as file:
            for start, stop in zip(starts, [*starts[1:], len(positions)], strict=True):
                offset = self._data.offset + int(positions[start]) * row_bytes
                _write_at(file, lines[start:stop].tobytes(), offset)
            os.fdatasync(file)
        self._open_blocks(positions)
        filled = np.array(self.filled)
        filled[positions] = True
        with _writable(self._filled_path) as file:
            _write_at(file, filled.tobytes(), self.filled.offset)

    def changed_blocks(self) -> list[int]:
        """Blocks that got rows since they were summed last, from any writer."""
        return [
            block
            for block in np.flatnonzero(self._crc == _OPEN).tolist()
            if self.filled[block * BLOCK_ROWS : (block + 1) * BLOCK_ROWS].any()
        ]

    def seal(self) -> None:
        """Sum the blocks that changed, and put bits and CRCs on the disk; under the lock, alone."""
        crc = np.array(self._crc)
        for block in self.changed_blocks():
            crc[block] = self._sum(block)
            self._is_verified[block] = True
        self._write_crc(crc)
        for path in (self._filled_path, self._crc_path):
            with _writable(path) as file:
                os.fdatasync(file)

    def _open_blocks(self, positions: NDArray[np.intp]) -> None:
        """Withdraw the CRCs of blocks that get new rows, before any bit tells of those rows."""
        blocks = np.unique(positions // BLOCK_ROWS)
        if (self._crc[blocks] == _OPEN).all():
            return
        crc = np.array(self._crc)
        crc[blocks] = _OPEN
        self._is_verified[blocks] = False
        self._write_crc(crc)
        # A power cut that kept the bits and lost this would make whole blocks look damaged.
        with _writable(self._crc_path) as file:
            os.fdatasync(file)

    def _write_crc(self, crc: NDArray[np.int64]) -> None:
        with _writable(self._crc_path) as file:
            _write_at(file, crc.tobytes(), self._crc.offset)

    def _sum(self, block: int) -> int:
        """CRC-32C over the filled rows of a block, in order."""
        span = slice(block * BLOCK_ROWS, (block + 1) * BLOCK_ROWS)
        filled = self.filled[span]
        data = self._data[span] if filled.all() else self._data[span][filled]
        return int(google_crc32c.value(data.view(np.uint8)))


class PendingEntries:
    """Entries that were put and not written yet, in memory.

    Attributes:
        num_bytes: that they take.
    """

    def __init__(self, num_rows: int):
        self._num_rows = num_rows
        self._since = 0.0
        self.num_bytes = 0
        self._parts: dict[int, list[tuple[NDArray[np.intp], NDArray[np.generic]]]] = {}
        self._is_there: dict[int, NDArray[np.bool_]] = {}

    @property
    def seconds(self) -> float:
        """Age of the oldest entry; 0 without any."""
        return time.monotonic() - self._since if self._parts else 0.0

    def add(self, slot: int, positions: NDArray[np.intp], stored: NDArray[np.generic]) -> None:
        """Take in what `encode` returned for these positions of a slot."""
        if not self._parts:
            self._since = time.monotonic()
        self._parts.setdefault(slot, []).append((positions, stored))
        self._is_there.setdefault(slot, np.zeros(self._num_rows, bool))[positions] = True
        self.num_bytes += stored.nbytes

    def has(self, slot: int, positions: NDArray[np.intp]) -> NDArray[np.bool_]:
        """Whether each position of a slot is among them: (n,) bool."""
        if slot not in self._is_there:
            return np.zeros(len(positions), bool)
        return self._is_there[slot][positions]

    def pop(self) -> Iterator[tuple[int, NDArray[np.intp], NDArray[np.generic]]]:
        """Give away all of them: per slot the sorted positions, each once, and what to store."""
        parts, self._parts, self._is_there, self.num_bytes = self._parts, {}, {}, 0
        for slot, pairs in parts.items():
            positions, stored = map(np.concatenate, zip(*pairs, strict=True))
            # A row that was put twice is written once, as it was put first.
            unique, first = np.unique(positions, return_index=True)
            yield slot, unique, stored[first]


def slot_names(slot: int) -> tuple[str, str, str]:
    """The files of a slot: logits, bitmap, checksums."""
    return f"slot-{slot:03d}.npy", f"filled-{slot:03d}.npy", f"crc32c-{slot:03d}.npy"


def disk_bytes(folder: Path) -> int:
    """Bytes that the files of a folder take on the disk; 0 where it is gone."""
    total = 0
    with suppress(FileNotFoundError):
        for file in folder.iterdir():
            # Another writer's temporary file may be gone already.
            with suppress(FileNotFoundError):
                total += file.stat().st_blocks * 512
    return total


def _num_blocks(num_rows: int) -> int:
    return -(-num_rows // BLOCK_ROWS)


def _require_finite(
    values: NDArray[np.floating], rows: NDArray[np.int64], fault: str, cure: str
) -> None:
    """Name the first row with a value that is not finite."""
    is_bad = ~np.isfinite(values).all(axis=1)
    if is_bad.any():
        row = int(rows[np.argmax(is_bad)])
        raise InvalidValueError(f"a logit of the teacher for row {row:,} {fault}. {cure}")


def _open_map(
    path: Path, dtype: np.dtype[np.generic], shape: tuple[int, ...], cure: str
) -> np.memmap[Any, Any]:
    """A read-only map of a .npy file that must be of this dtype and shape."""
    try:
        mapped = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} is missing. {cure}") from error
    except (OSError, ValueError, *BAD_HEADER) as error:  # truncated, pickled, or no .npy file
        raise ArtifactError(
            f"{path} is no whole .npy file of plain numbers: {error}. {cure}"
        ) from error
    if mapped.dtype != dtype or mapped.shape != shape or not mapped.flags.c_contiguous:
        raise ArtifactError(
            f"{path} holds {mapped.dtype} of shape {mapped.shape}, but the cache's are {dtype} of "
            f"shape {shape}. {cure}"
        )
    return mapped


def _write_sparse(path: Path, dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> None:
    """A .npy file of zeros that takes no room yet."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + int(np.prod(shape)) * dtype.itemsize)


def _write_whole(path: Path, array: NDArray[np.generic]) -> None:
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, array, allow_pickle=False)


@contextmanager
def _writable(path: Path) -> Iterator[int]:
    """A file descriptor to write in place with."""
    file = os.open(path, os.O_WRONLY)
    try:
        yield file
    finally:
        os.close(file)


def _write_at(file: int, data: bytes, offset: int) -> None:
    """All of the bytes: pwrite may write a part of them when the disk fills up."""
    rest = memoryview(data)
    while rest:
        written = os.pwrite(file, rest, offset)
        rest, offset = rest[written:], offset + written
