"""Find and name what goes wrong with a file while it is read."""

import os
from functools import cached_property
from pathlib import Path

import google_crc32c
import numpy as np
import torch
from numpy.typing import NDArray

from fastprune.base.errors import InvalidValueError, LoadingError
from fastprune.beton.beton import Beton

#: Why a row cannot be used whose checksum is not the manifest's.
ALTERED = "its bytes are not those that were written (CRC-32C)"


# A change of these moves the change time of a file, but not its content.
_MODES = ("st_mode", "st_nlink", "st_uid", "st_gid")


class ChangeDetector:
    """Detects files of an open beton that were truncated, replaced, rewritten or removed.

    A file that is cut between this check and the reading of a page still ends the process with
    SIGBUS; no check from outside the kernel can close that gap.
    """

    def __init__(self, beton: Beton):
        # Not the paths' status now: a file may have been replaced since it was mapped.
        self._opened = {file.path: file.mapped for file in beton.files}
        self._filled = {file.path for file in beton.files if file.is_filled}

    def check(self) -> None:
        """Compare the files with their state when they were opened.

        Raises:
            LoadingError: one of them changed.
        """
        for path, before in self._opened.items():
            self._opened[path] = _require_unchanged(path, before, path in self._filled)


def _require_unchanged(path: Path, before: os.stat_result, is_filled: bool) -> os.stat_result:
    """Compare a file with its earlier status; return its status now."""
    try:
        now = path.stat()
    except OSError as error:
        raise LoadingError(
            f"{path} cannot be found any more ({error.strerror}). Put it back and start the loader "
            "again."
        ) from error
    if (now.st_dev, now.st_ino) != (before.st_dev, before.st_ino):
        raise LoadingError(f"{path} was replaced while it was read. Start the loader again.")
    if now.st_size < before.st_size:
        raise LoadingError(
            f"{path} was cut from {before.st_size:,} to {now.st_size:,} bytes while it was read. "
            "Get a whole copy of it, or convert the images again."
        )
    if is_filled:
        return now
    # `cp new.beton train.beton` writes into the same inode. A change time cannot be set back as a
    # modification time can, but it also moves with a chmod or a link, which explain it here.
    is_explained = any(getattr(now, name) != getattr(before, name) for name in _MODES)
    if (now.st_mtime_ns, now.st_size) != (before.st_mtime_ns, before.st_size) or (
        now.st_ctime_ns != before.st_ctime_ns and not is_explained
    ):
        raise LoadingError(
            f"{path} was written to while it was read. Start the loader again, and replace betons "
            "by renaming a finished file."
        )
    return now


class RowFaults:
    """Handles rows that cannot be used: raises an error that names them, or counts them.

    Attributes:
        num_skipped: rows left out so far.
        num_decoded_whole: views so far of JPEGs that the view decoder does not know.
        verifies_always: whether checksums are compared whenever a row is read.
    """

    def __init__(self, beton: Beton, *, skip: bool, verify_crc: bool | None):
        """Prepare to judge rows.

        Args:
            beton: the open beton.
            skip: count unusable rows instead of raising.
            verify_crc: compare a row's bytes with the manifest's CRC-32C whenever it is read
                (True), never (False), or the first time, where there is a manifest (None).

        Raises:
            InvalidValueError: checksums are asked for, but the beton has no manifest.
        """
        self.num_skipped = 0
        self.num_decoded_whole = 0
        self._beton = beton
        self._skip = skip
        if verify_crc and beton.manifest is None:
            raise InvalidValueError(
                f"verify_crc=True needs the checksums of a manifest, but {beton.path} has none. "
                f"Make one with: fastprune check {beton.path} --deep --write-manifest"
            )
        has_checksums = beton.manifest is not None and verify_crc is not False
        self._to_verify = np.full(beton.num_rows, has_checksums)
        # What was found stays: a row must not be left out of one epoch and be there in the next.
        self._altered = np.zeros(beton.num_rows, np.bool_)
        self.verifies_always = verify_crc is True

    def altered(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which rows (n,) hold other bytes than were written, where that is verified."""
        for row in rows[self._to_verify[rows]].tolist():
            found = google_crc32c.value(self._beton.image_bytes(row).tobytes())
            self._altered[row] |= found != self._stored_crcs[row]
            self._to_verify[row] = self.verifies_always
        return self._altered[rows]

    def without_failed(
        self, pixels: torch.Tensor, rows: NDArray[np.int64], faults: dict[int, str]
    ) -> tuple[torch.Tensor, NDArray[np.int64]]:
        """Report the failed rows of a batch, and leave them out.

        Args:
            pixels: (n, S, S, 3) uint8.
            rows: (n,) int64.
            faults: why a row cannot be used, by its position in the batch.

        Returns:
            Pixels and rows of the others.

        Raises:
            LoadingError: rows are not to be skipped.
        """
        # A row that comes twice may be damaged in one view alone; it is left out of both.
        failed = {int(rows[at]): reason for at, reason in sorted(faults.items())}
        for row, reason in failed.items():
            self.report(row, reason)
        if not failed:
            return pixels, rows
        kept = np.flatnonzero(~np.isin(rows, list(failed)))
        return pixels[torch.from_numpy(kept)], rows[kept]

    def require_no_peers(self, world: int) -> None:
        """Refuse to leave out a batch where other ranks would wait for this one in a collective.

        Raises:
            LoadingError: there is more than one rank.
        """
        if world > 1:
            raise LoadingError(
                f"no row of a batch of {self._beton.path} can be used, and the other ranks would "
                "wait for this one. Find the rows with `fastprune check "
                f"{self._beton.path} --deep`, and leave them out of the subset."
            )

    def report(self, row: int, reason: str) -> None:
        """Count a row that cannot be used, or raise.

        Raises:
            LoadingError: rows are not to be skipped.
        """
        if not self._skip:
            raise LoadingError(
                f"row {row:,} of {self._beton.path}{self._source(row)} cannot be used: {reason}. "
                'Leave such rows out with on_error="skip", or find all of them with `fastprune '
                f"check {self._beton.path} --deep` and convert the images again."
            )
        self.num_skipped += 1

    def _source(self, row: int) -> str:
        """Return the file that a row was made from, if there is a manifest."""
        sources = self._sources
        return "" if sources is None else f" (from {sources[row]})"

    @cached_property
    def _stored_crcs(self) -> NDArray[np.uint32]:
        """The manifest's CRC-32C of every row's stored bytes, (N,)."""
        assert self._beton.manifest is not None
        return np.asarray(self._beton.manifest.column("stored_crc32c"), np.uint32)

    @cached_property
    def _sources(self) -> list[str] | None:
        """The file of every row, read only when a fault is to be named."""
        if self._beton.manifest is None:
            return None
        sources: list[str] = self._beton.manifest.column("source").to_pylist()
        return sources
