"""The teacher's logits on recurring views, kept on disk by (row, slot); see docs/formats.md."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastprune.base.checks import require_at_least, require_one_of
from fastprune.base.errors import ArtifactError, ArtifactMismatch, InvalidValueError
from fastprune.base.files import lock
from fastprune.rows.cache_header import (
    CacheExistsError,
    read_header,
    read_rows,
    require_identity,
    write_header,
)
from fastprune.rows.cache_slot import (
    DTYPES,
    PendingEntries,
    Slot,
    decode,
    disk_bytes,
    encode,
    stored_dtype,
)
from fastprune.rows.cache_verify import VERIFY_TOLERANCE, verify_cache
from fastprune.rows.subset import checked_rows

_LOCK = "lock"
# What a killed process loses at most, and what a put may take of memory.
_COMMIT_SECONDS = 10.0
_COMMIT_BYTES = 32 * 2**20
_MOST_OPEN_SLOTS = 8  # of three maps each


class TeacherCache:
    """Logits of one teacher on the K recurring views of some rows.

    Several processes may fill it at once. Data is on the disk before the bitmap says so: a process
    that is killed loses the last seconds of its work, no more. `close` it, or use `with`.

    Attributes:
        path: the folder.
        rows: (R,) int64, the rows of the beton that it has room for, sorted and unique.
        num_classes: C.
        num_views: K, slots are 0 … K - 1.
        dtype: "float16", "float32" or "uint8" (affine by row).
        identity: what the logits are of: images, view, decoder, teacher; JSON values.
    """

    def __init__(self, path: Path, rows: NDArray[np.int64], header: dict[str, Any]):
        """For `create` and `open`."""
        self.path = path.absolute()  # slots are opened later, from another working folder perhaps
        self.rows = rows
        self.num_classes: int = header["num_classes"]
        self.num_views: int = header["num_views"]
        self.dtype: str = header["dtype"]
        self.identity: dict[str, Any] = header["identity"]
        self._stored_dtype = stored_dtype(self.dtype, self.num_classes)
        self._slots: OrderedDict[int, Slot] = OrderedDict()
        self._pending = PendingEntries(len(rows))
        # Writers may be threads of one process, such as the one that fills while a student trains.
        self._threads = threading.RLock()

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        rows: ArrayLike,
        num_classes: int,
        num_views: int,
        identity: Mapping[str, Any] | None = None,
        dtype: str = "float16",
    ) -> Self:
        """Make an empty cache.

        Args:
            path: the folder, which is made; its parent must exist.
            rows: (R,) rows of the beton, sorted and unique.
            num_classes: C.
            num_views: K, how many views of each row recur.
            identity: what the logits will be of, as JSON values by section: `images` (the fields
                of a fingerprint), `view`, `decoder`, `teacher`.
            dtype: "float16" (2 C bytes a view; exact for bfloat16 logits between 2^-14 and 65,504),
                "float32" (exact) or "uint8" (C + 4 bytes a view, affine by row).

        Raises:
            InvalidValueError: an argument is outside its domain.
            ArtifactError: a cache is there already, or the folder cannot be written.
        """
        path = Path(path)
        require_one_of("dtype", dtype, DTYPES)
        require_at_least("num_classes", num_classes, 1)
        require_at_least("num_views", num_views, 1)
        rows = checked_rows(rows, name="rows")
        try:
            path.mkdir(exist_ok=True)
            (path / _LOCK).touch()
        except OSError as error:
            raise ArtifactError(
                f"cannot make the teacher cache {path}: {error.strerror}. Name a folder whose "
                "parent exists and may be written."
            ) from error
        with lock(path / _LOCK):
            if (path / "cache.json").exists():
                raise CacheExistsError(
                    f"{path} holds a teacher cache already. Open it, or name another folder."
                )
            settings = {"num_classes": num_classes, "num_views": num_views, "dtype": dtype}
            settings["identity"] = dict(identity or {})
            return cls(path, rows, write_header(path, rows, settings))

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        identity: Mapping[str, Any] | None = None,
        dtype: str | None = None,
    ) -> Self:
        """Open a cache, and refuse one that is of something else than what is wanted.

        Args:
            path: the folder.
            identity: as for `require`; None to take any.
            dtype: that is wanted, or None.

        Raises:
            ArtifactError: there is no cache, or cache.json or rows.npy is damaged.
            ArtifactMismatch: it is of other images, views, or another teacher.
        """
        path = Path(path)
        header = read_header(path)
        cache = cls(path, read_rows(path, header), header)
        cache.require(identity or {})
        if dtype is not None and dtype != cache.dtype:
            raise ArtifactMismatch(
                f"{path} stores {cache.dtype}, but {dtype} is asked for. Leave the dtype out to "
                "take what it stores, or name another folder, which is filled anew."
            )
        return cache

    @classmethod
    def open_or_create(
        cls,
        path: str | Path,
        *,
        rows: ArrayLike,
        num_classes: int,
        num_views: int,
        identity: Mapping[str, Any],
        dtype: str | None = None,
    ) -> Self:
        """Open a cache of this, or make one where there is none; any number of processes may.

        Args and errors are those of `open`, and of `create` where there is no cache.
        """
        if not (Path(path) / "cache.json").exists():
            # Another process may make it at this moment; it is opened then.
            with suppress(CacheExistsError):
                cls.create(
                    path,
                    rows=rows,
                    num_classes=num_classes,
                    num_views=num_views,
                    identity=identity,
                    dtype=dtype or "float16",
                )
        sizes = {"num_classes": num_classes, "num_views": num_views}
        return cls.open(path, identity=sizes | dict(identity), dtype=dtype)

    def require(self, identity: Mapping[str, Any]) -> None:
        """Refuse to be used for something else.

        Args:
            identity: sections to compare, in the form of `create`; num_views and num_classes may
                be among them.

        Raises:
            ArtifactMismatch: an entry differs; it is named, with both values and the cure.
        """
        sizes = {"num_views": self.num_views, "num_classes": self.num_classes}
        require_identity(self.path, sizes | self.identity, identity)

    def holds(self, rows: ArrayLike) -> NDArray[np.bool_]:
        """Whether there is room for each of these rows: (n,) bool."""
        wanted = np.asarray(rows, np.int64)
        at = np.searchsorted(self.rows, wanted).clip(max=len(self.rows) - 1)
        return np.asarray(self.rows[at] == wanted)

    def has(self, rows: ArrayLike, slot: int) -> NDArray[np.bool_]:
        """Whether each row's logits are there, by any process or put by this one: (n,) bool."""
        rows = np.asarray(rows, np.int64)
        found = self.holds(rows)
        with self._threads:
            found[found] = self._filled(slot, np.searchsorted(self.rows, rows[found]))
        return found

    def missing(self, slot: int) -> NDArray[np.int64]:
        """The rows without logits in a slot, (m,) int64, sorted."""
        with self._threads:
            return self.rows[~self._filled(slot, np.arange(len(self.rows)))]

    def logits(self, rows: ArrayLike, slot: int) -> NDArray[np.float32]:
        """The teacher's logits.

        Args:
            rows: (n,) rows of the beton, in any order.
            slot: which of their views, in [0, K).

        Returns:
            (n, C) float32, as `put` returned them, to the bit.

        Raises:
            InvalidValueError: the slot is out of range, or there is no room for a row.
            ArtifactError: a row has no logits yet, or its block is damaged.
        """
        rows = np.asarray(rows, np.int64)
        self._positions(rows)  # refuses what there is no room for
        logits, found = self.lookup(rows, slot)
        if not found.all():
            raise ArtifactError(
                f"{self.path} has no logits yet of row {rows[np.argmin(found)]:,} in slot {slot} "
                f"({(~found).sum():,} of {len(rows):,} rows are missing). Fill it: fastprune cache "
                "fill, or train with it."
            )
        return logits

    def lookup(self, rows: ArrayLike, slot: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """The teacher's logits as far as they are there.

        Returns:
            (n, C) float32, zeros where there are none; and (n,) bool, where there are some.

        Raises as `logits`, but for what is missing.
        """
        rows = np.asarray(rows, np.int64)
        with self._threads:
            found = self.has(rows, slot)
            positions = np.searchsorted(self.rows, rows[found])
            if self._pending.has(slot, positions).any():
                self.commit()
            files = self._slot(slot)
            if files is None or not found.any():
                return np.zeros((len(rows), self.num_classes), np.float32), found
            blocks = files.unverified_blocks(positions)
            if len(blocks):
                with lock(self.path / _LOCK, shared=True):
                    if faults := files.damaged(blocks):
                        raise ArtifactError(faults[0])
            there = decode(files.read(positions))
        if found.all():
            return there, found
        logits = np.zeros((len(rows), self.num_classes), np.float32)
        logits[found] = there
        return logits, found

    def put(self, rows: ArrayLike, slot: int, logits: ArrayLike) -> NDArray[np.float32]:
        """Keep the teacher's logits; rows that are there already stay as they are.

        They are on the disk after the next `commit`, which happens by itself every ten seconds.

        Args:
            rows: (n,) rows of the beton, in any order.
            slot: which of their views, in [0, K).
            logits: (n, C) floating, finite.

        Returns:
            (n, C) float32, what `logits` will return: the logits as rounded by the dtype. Train
            on these, so that a later run on the cache sees the same.

        Raises:
            InvalidValueError: a logit is not finite or beyond the dtype's range, the shape is
                another, or there is no room for a row.
            ArtifactError: the disk is full, or the cache cannot be written.
        """
        rows = np.asarray(rows, np.int64)
        values = np.asarray(logits, np.float32)
        self._require_slot(slot)
        if values.shape != (len(rows), self.num_classes):
            raise InvalidValueError(
                f"logits must be of shape ({len(rows)}, {self.num_classes}), not {values.shape}."
            )
        positions = self._positions(rows)
        stored = encode(values, rows, self.dtype)
        with self._threads:
            self._pending.add(slot, positions, stored)
            if self._pending.seconds > _COMMIT_SECONDS or self._pending.num_bytes > _COMMIT_BYTES:
                self.commit()
        return decode(stored)

    def round_trip(self, logits: ArrayLike, rows: ArrayLike) -> NDArray[np.float32]:
        """What `put` would return, without putting anything."""
        return decode(encode(np.asarray(logits, np.float32), np.asarray(rows), self.dtype))

    def commit(self, *, seal: bool = False) -> None:
        """Write what was put, data before the bitmap.

        Args:
            seal: also sum the blocks that changed, by whomever: reads them once.

        Raises:
            ArtifactError: the disk is full, or the cache cannot be written. What was put since the
                last commit is dropped; what was committed stays.
        """
        with self._threads:
            # A whole cache may be read from where nobody may write.
            if not self._pending.num_bytes and not (seal and self._changed_slots()):
                return
            try:
                with lock(self.path / _LOCK):
                    for slot, positions, stored in self._pending.pop():
                        self._made_slot(slot).write(positions, stored)
                    for slot in self._changed_slots() if seal else ():
                        self._made_slot(slot).seal()
            except OSError as error:
                raise ArtifactError(
                    f"cannot write the teacher cache {self.path}: {error.strerror}. What it holds "
                    "stays whole; free some space and run the command again."
                ) from error

    def verify(
        self,
        teacher: Callable[[NDArray[np.int64], int], ArrayLike],
        n: int = 64,
        *,
        tolerance: float = VERIFY_TOLERANCE,
    ) -> float:
        """Ask the teacher again for entries drawn at random, and compare.

        Args:
            teacher: maps (rows (m,) int64, slot) to their logits (m, C).
            n: entries to draw, at most.
            tolerance: largest difference of a row that is accepted: root mean square over the
                classes, as a share of the standard deviation of the row's logits.

        Returns:
            The largest difference that was found; 0.0 for an empty cache.

        Raises:
            ArtifactMismatch: the teacher says something else now.
        """
        return verify_cache(self, teacher, n, tolerance=tolerance)

    def check(self) -> Iterator[str]:
        """Read every slot and compare it with its checksums.

        Yields:
            A sentence for each fault; nothing for a whole cache. A slot's holes are no faults.
        """
        for slot in range(self.num_views):
            try:
                if (files := self._slot(slot)) is None:
                    continue
                for block in files.all_blocks():
                    with lock(self.path / _LOCK, shared=True):
                        faults = files.damaged(block[None])
                    yield from faults
            except ArtifactError as error:
                yield str(error)

    def summary(self) -> dict[str, Any]:
        """What is in the cache, as JSON values; see `fastprune cache info`."""
        filled = [len(self.rows) - len(self.missing(slot)) for slot in range(self.num_views)]
        return {
            "path": str(self.path),
            "num_rows": len(self.rows),
            "num_classes": self.num_classes,
            "num_views": self.num_views,
            "dtype": self.dtype,
            "bytes_per_view": self._stored_dtype.itemsize,
            "disk_bytes": self.disk_bytes,
            "filled": filled,
            "whole_slots": sum(count == len(self.rows) for count in filled),
            "identity": self.identity,
        }

    @property
    def disk_bytes(self) -> int:
        """Bytes that the folder takes on the disk; holes take none."""
        return disk_bytes(self.path)

    def close(self) -> None:
        """Write what was put, and let go of the files; raises as `commit`."""
        try:
            self.commit()
        finally:
            self._slots.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _require_slot(self, slot: int) -> None:
        if not 0 <= slot < self.num_views:
            raise InvalidValueError(
                f"slot ({slot}) must be in [0, {self.num_views}), the cache's number of views."
            )

    def _positions(self, rows: NDArray[np.int64]) -> NDArray[np.intp]:
        """Where rows are in the slots' files."""
        held = self.holds(rows)
        if not held.all():
            raise InvalidValueError(
                f"{self.path} has no room for row {rows[np.argmin(held)]:,}: it was made for "
                f"{len(self.rows):,} rows. Make one for all the rows that are trained on."
            )
        return np.searchsorted(self.rows, rows)

    def _filled(self, slot: int, positions: NDArray[np.intp]) -> NDArray[np.bool_]:
        """Whether each position was committed by any process, or put by this one: (n,) bool."""
        files = self._slot(slot)
        pending = self._pending.has(slot, positions)
        return pending if files is None else pending | files.filled[positions]

    def _changed_slots(self) -> list[int]:
        """The slots that got rows since they were summed last, from any writer."""
        slots = ((slot, self._slot(slot)) for slot in range(self.num_views))
        return [slot for slot, files in slots if files is not None and files.changed_blocks()]

    def _made_slot(self, slot: int) -> Slot:
        """The files of a slot, made where they are missing; under the lock, alone."""
        if self._slot(slot) is None:
            Slot.create(self.path, slot, num_rows=len(self.rows), dtype=self._stored_dtype)
        files = self._slot(slot)
        assert files is not None
        return files

    def _slot(self, slot: int) -> Slot | None:
        """The files of a slot; None where nothing was written into it yet."""
        self._require_slot(slot)
        if slot not in self._slots:
            if not Slot.exists(self.path, slot):
                return None
            if len(self._slots) == _MOST_OPEN_SLOTS:
                self._slots.popitem(last=False)
            self._slots[slot] = Slot(
                self.path, slot, num_rows=len(self.rows), dtype=self._stored_dtype
            )
        self._slots.move_to_end(slot)
        return self._slots[slot]
