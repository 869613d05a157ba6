"""The journal of an unfinished conversion: which images are in the partial file, and its lock."""

import contextlib
import json
import mmap
import os
import threading
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from fastprune.base.checksums import is_intact
from fastprune.base.errors import ConversionError
from fastprune.base.files import try_lock
from fastprune.base.progress import track
from fastprune.beton.convert.transcode import SKIPPED

# Bounds the memory of json.loads when a journal of millions of images is read.
_RECORDS_PER_LINE = 4096

RECORD = np.dtype(
    [
        ("size", "<i8"),
        ("source_bytes", "<i8"),
        ("label", "<i8"),
        ("source_crc32c", "<u4"),
        ("stored_crc32c", "<u4"),
        ("width", "<u2"),
        ("height", "<u2"),
        ("action", "u1"),
    ]
)


class Journal:
    """The lock on a conversion and the record of its progress, one JSON line per chunk.

    The first line holds the settings and the identity of the source; each further line
    [records, reasons] of the next images. The file is locked while the conversion runs, so that two
    never write the same beton.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = self._open_locked()
        # The process that held the lock may have removed the file: lock the one on the path.
        while not self._is_on_the_path():
            self._file.close()
            self._file = self._open_locked()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # An empty journal was left by a run that failed before its first image.
        if self.path.exists() and self.path.stat().st_size == 0:
            self.remove()
        # Buffered lines that a full disk refused must not raise again here.
        with contextlib.suppress(OSError):
            self._file.close()

    def read(self) -> tuple[dict[str, Any] | None, NDArray[np.void], dict[int, str]]:
        """Read what an earlier run left.

        Returns:
            Its settings, None if there are none; the records of its images, of dtype `RECORD`; and
            the reasons by position. A last line that was cut is left out.

        Raises:
            ConversionError: the file is not a journal.
        """
        self._file.seek(0)
        settings = None
        records, reasons, count = [np.zeros(0, RECORD)], {}, 0
        try:
            for line in self._file:
                # A line is written at once, so only the last one can be cut by a crash.
                if not line.endswith(b"\n"):
                    break
                if settings is None:
                    settings = dict(json.loads(line))
                    continue
                values, texts = json.loads(line)
                # JSON's keys are text, and count from the start of their line.
                reasons.update({count + int(position): text for position, text in texts.items()})
                records.append(np.array([tuple(value) for value in values], RECORD))
                count += len(values)
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
            raise ConversionError(
                f"{self.path} is not a journal of a conversion. Remove it and start without "
                "--resume."
            ) from None
        return settings, np.concatenate(records), reasons

    def start(self, settings: dict[str, Any]) -> None:
        """Empty the journal and write its first line."""
        self._file.truncate(0)
        self._append(settings)

    def add(self, records: NDArray[np.void], reasons: dict[int, str]) -> None:
        """Record that the next images are in the file.

        Args:
            records: (n,) of dtype `RECORD`.
            reasons: by position in `records`.
        """
        for start in range(0, len(records), _RECORDS_PER_LINE):
            piece = records[start : start + _RECORDS_PER_LINE]
            texts = {
                position - start: text
                for position, text in reasons.items()
                if start <= position < start + len(piece)
            }
            self._append([piece.tolist(), texts])

    def remove(self) -> None:
        """Delete the file; the lock is kept until the journal is closed."""
        self.path.unlink(missing_ok=True)

    def _append(self, line: object) -> None:
        self._file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
        # Once the operating system has the line, it survives this process.
        self._file.flush()

    def _open_locked(self) -> BinaryIO:
        try:
            file = self.path.open("a+b")
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise ConversionError(
                f"cannot write {self.path}: {reason}. Name a folder that exists and that you may "
                "write to."
            ) from error
        if not try_lock(file):
            file.close()
            raise ConversionError(
                f"another conversion is writing {self.path.with_suffix('')}. Wait for it, or name "
                "another beton."
            )
        return file

    def _is_on_the_path(self) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self._file.fileno()), self.path.stat())
        return False


class AtWork:
    """Which image each thread is working on, in a small file that survives a crash.

    A library that crashes takes the process with it; the next run reads here which image did it.
    """

    def __init__(self, path: Path, num_threads: int) -> None:
        """Make the file.

        Raises:
            OSError: it cannot be written.
        """
        self.path = path
        # Written, not only sized: in a mapping, a full disk would be a SIGBUS.
        path.write_bytes(bytes(8 * num_threads))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self._slots = np.frombuffer(self._map, "<i8")
        self._thread = threading.local()
        self._num_taken = 0
        self._lock = threading.Lock()

    def note(self, position: int) -> None:
        """Note the image that this thread begins with."""
        try:
            slot = self._thread.slot
        except AttributeError:
            with self._lock:
                slot = self._thread.slot = self._num_taken
                self._num_taken += 1
        # A store to shared memory, because a system call for each image would cost more.
        self._slots[slot] = position + 1

    def close(self) -> None:
        """Remove the file: this run did not crash."""
        del self._slots
        self._map.close()
        self.path.unlink(missing_ok=True)


def crashed_at(path: Path) -> list[int]:
    """Read the positions that an earlier run was working on when it was killed or crashed."""
    try:
        content = path.read_bytes()
    except OSError:
        return []
    slots = np.frombuffer(content[: len(content) // 8 * 8], "<i8")
    return [position - 1 for position in slots.tolist() if position > 0]


def intact_rows(partial: Path, records: NDArray[np.void], offsets: list[int]) -> int:
    """Count how many of the journal's images are whole in the partial file, from the first on.

    A killed process leaves what it wrote; a crashed machine may not. So only images whose stored
    bytes have the CRC-32C of the journal count.

    Args:
        partial: the unfinished beton.
        records: (n,) of dtype `RECORD`, from the journal.
        offsets: n file offsets; ignored for skipped images.
    """
    with partial.open("rb") as file:
        stored_images = zip(records, offsets, strict=True)
        tracked = track(stored_images, description="resume", total=len(records), unit="images")
        for item, (record, offset) in enumerate(tracked):
            if record["action"] == SKIPPED:
                continue
            file.seek(offset)
            if not is_intact(file.read(int(record["size"])), record["stored_crc32c"]):
                return item
    return len(records)
