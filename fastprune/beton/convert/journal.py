"""The journal of an unfinished conversion: what is in the partial file so far."""

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any, BinaryIO, Self

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from fastprune.base.errors import ConversionError
from fastprune.base.files import try_lock
from fastprune.base.progress import track
from fastprune.beton.convert.transcode import SKIPPED
from fastprune.beton.convert.workers import RECORD

# A killed run's workers hold its lock until they see their pipes closed.
_SECONDS_TO_LOCK = 5.0
_SECONDS_BETWEEN_TRIES = 0.05
# Bounds the memory of json.loads when a journal of millions of images is read.
_RECORDS_PER_LINE = 4096


class Journal:
    """The lock on a conversion and the record of its progress, one JSON line per chunk.

    The first line has the settings and the identity of the source; each further line
    [records, reasons] of the next images. The file is locked as long as the conversion or one of
    its workers lives (they inherit the descriptor), so that no two write the same file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = self._open()
        # Whoever held the lock may have removed the file meanwhile: lock the one that is there.
        while not self._lock_is_on_the_path():
            self._file.close()
            self._file = self._open()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # An empty journal is that of a run that failed before its first image.
        if self.path.exists() and self.path.stat().st_size == 0:
            self.remove()
        # Buffered lines that a full disk refused must not raise again here.
        with contextlib.suppress(OSError):
            self._file.close()

    def read(self) -> tuple[dict[str, Any] | None, NDArray[np.void], dict[int, str]]:
        """Read what an earlier run left.

        Returns:
            Its settings, None where there are none; the records of its images, of dtype `RECORD`;
            and the reasons by position. A last line that was cut is left out.

        Raises:
            ConversionError: the file is no journal.
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
                f"{self.path} is no journal of a conversion. Remove it and start without --resume."
            ) from None
        return settings, np.concatenate(records), reasons

    def start(self, settings: dict[str, Any]) -> None:
        """Empty the journal and write its first line."""
        self._file.truncate(0)
        self._append(settings)

    def add(self, records: NDArray[np.void], reasons: dict[int, str]) -> None:
        """Note that the data of the next images is in the file.

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
        # In the operating system's hands, the line survives this process.
        self._file.flush()

    def _open(self) -> BinaryIO:
        try:
            return self.path.open("a+b")
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise ConversionError(
                f"cannot write {self.path}: {reason}. Name a folder that exists and that you may "
                "write to."
            ) from error

    def _lock_is_on_the_path(self) -> bool:
        """Wait for the lock, and say whether the locked file still has its name."""
        deadline = time.monotonic() + _SECONDS_TO_LOCK
        while not try_lock(self._file):
            if time.monotonic() > deadline:
                self._file.close()
                raise ConversionError(
                    f"another conversion is writing {self.path.with_suffix('')}. Wait for it, "
                    "or name another beton."
                )
            time.sleep(_SECONDS_BETWEEN_TRIES)
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self._file.fileno()), self.path.stat())
        return False


def intact_rows(partial: Path, records: NDArray[np.void], offsets: list[int]) -> int:
    """Count how many of the journal's images are whole in the partial file, from the first on.

    A killed process leaves what it wrote, a crashed machine perhaps not: so nothing is believed
    that the stored bytes' CRC-32C does not confirm.

    Args:
        partial: the unfinished beton.
        records: (n,) of dtype `RECORD`, from the journal.
        offsets: n file offsets; of skipped images they do not count.
    """
    with partial.open("rb") as file:
        stored_images = zip(records, offsets, strict=True)
        tracked = track(stored_images, description="resume", total=len(records), unit="images")
        for item, (record, offset) in enumerate(tracked):
            if record["action"] == SKIPPED:
                continue
            file.seek(offset)
            stored = file.read(int(record["size"]))
            if google_crc32c.value(stored) != record["stored_crc32c"]:
                return item
    return len(records)
