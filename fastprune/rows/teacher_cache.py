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
from fastprune.rows.cache_format import (
    DTYPES,
    HEADER_NAME,
    CacheHeader,
    decode,
    encode,
    read_cache_header,
    read_cache_rows,
    require_identity,
    slot_field,
    slot_store,
    stored_dtype,
    write_cache_header,
)
from fastprune.rows.store import LOCK_NAME, RowStore, disk_bytes
from fastprune.rows.subset import checked_rows

_MOST_OPEN_SLOTS = 8  # of three memory maps each

# Rounding, other batch sizes and other devices stay well below; another teacher or view is near 1.
_VERIFY_TOLERANCE = 0.05


class CacheExistsError(ArtifactError):
    """A cache exists where one was to be made."""


class TeacherCache:
    """Logits of one teacher on the K recurring views of some rows.

    Several processes may fill it at once. A process that is killed loses its last ten seconds of
    work and nothing else. `close` it, or use `with`.

    Attributes:
        path: the folder.
        rows: (R,) int64, the rows of the beton that it has room for, sorted and unique.
        num_classes: C.
        num_views: K, slots are 0 … K - 1.
        dtype: "float16", "float32" or "uint8" (affine by row).
        identity: what the logits were computed from: images, view, decoder, teacher; JSON values.
    """

    def __init__(self, path: Path, rows: NDArray[np.int64], header: CacheHeader):
        """For `create` and `open`."""
        self.path = path.absolute()  # slots are opened later, when the working folder may differ
        self.rows = rows
        self.num_classes = header.num_classes
        self.num_views = header.num_views
        self.dtype = header.dtype
        self.identity = header.identity
        self._header = header
        self._slots: OrderedDict[int, RowStore] = OrderedDict()
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
            identity: what the logits will be computed from, as JSON values by section: `images`
                (the fields of a fingerprint), `view`, `decoder`, `teacher`.
            dtype: "float16" (2 C bytes a view; exact for bfloat16 logits between 2^-14 and 65,504),
                "float32" (exact) or "uint8" (C + 4 bytes a view, affine by row).

        Raises:
            InvalidValueError: an argument is outside its domain.
            ArtifactError: a cache exists already, or the folder cannot be written.
        """
        path = Path(path)
        require_one_of("dtype", dtype, DTYPES)
        require_at_least("num_classes", num_classes, 1)
        require_at_least("num_views", num_views, 1)
        rows = checked_rows(rows, name="rows")
        try:
            path.mkdir(exist_ok=True)
            (path / LOCK_NAME).touch()
        except OSError as error:
            raise ArtifactError(
                f"cannot make the teacher cache {path}: {error.strerror}. Name a folder whose "
                "parent exists and may be written."
            ) from error
        with lock(path / LOCK_NAME):
            if (path / HEADER_NAME).exists():
                raise CacheExistsError(
                    f"{path} holds a teacher cache already. Open it, or name another folder."
                )
            header = write_cache_header(
                path,
                rows,
                num_classes=num_classes,
                num_views=num_views,
                dtype=dtype,
                identity=dict(identity or {}),
            )
            return cls(path, rows, header)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        identity: Mapping[str, Any] | None = None,
        dtype: str | None = None,
    ) -> Self:
        """Open a cache, and refuse one of something else than what is wanted.

        Args:
            path: the folder.
            identity: as for `require`; None to take any.
            dtype: that is wanted, or None.

        Raises:
            ArtifactError: there is no cache, or cache.json or rows.npy is damaged.
            ArtifactMismatch: it is of other images, views, or another teacher.
        """
        path = Path(path)
        header = read_cache_header(path)
        cache = cls(path, read_cache_rows(path, header), header)
        cache.require(identity or {})
        if dtype is not None and dtype != cache.dtype:
            raise ArtifactMismatch(
                f"{path} stores {cache.dtype}, but {dtype} is asked for. Leave the dtype out to "
                "take what it stores, or name another folder, which will be filled from the start."
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
        """Open a cache of this, or make one; any number of processes may, at once.

        Arguments and errors as for `create` and `open`.
        """
        if not (Path(path) / HEADER_NAME).exists():
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
            found[found] = self._slot(slot).has(np.searchsorted(self.rows, rows[found]))
        return found

    def missing(self, slot: int) -> NDArray[np.int64]:
        """The rows without logits in a slot, (m,) int64, sorted."""
        with self._threads:
            return self.rows[self._slot(slot).missing()]

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
        self._positions(rows)  # refuses rows without room
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
            (n, C) float32, zeros for missing rows; and (n,) bool, which rows are there.

        Raises as `logits`, but for missing rows.
        """
        rows = np.asarray(rows, np.int64)
        with self._threads:
            found = self.has(rows, slot)
            if not found.any():
                return np.zeros((len(rows), self.num_classes), np.float32), found
            positions = np.searchsorted(self.rows, rows[found])
            there = decode(self._slot(slot).read(slot_field(slot), positions))
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
            self._slot(slot).put(positions, stored)
            # Several slots may be filled in turns, and the last rows of one must not wait for more.
            for store in self._slots.values():
                store.commit_if_due()
        return decode(stored)

    def round_trip(self, logits: ArrayLike, rows: ArrayLike) -> NDArray[np.float32]:
        """Return what `put` would return, without putting anything."""
        return decode(encode(np.asarray(logits, np.float32), np.asarray(rows), self.dtype))

    def commit(self, *, seal: bool = False) -> None:
        """Write what was put.

        Args:
            seal: also checksum the blocks that any process changed, which reads them once.

        Raises:
            ArtifactError: the disk is full, or the cache cannot be written. What was put since the
                last commit is dropped; what was committed stays.
        """
        with self._threads:
            for slot in range(self.num_views) if seal else list(self._slots):
                self._slot(slot).commit(seal=seal)

    def verify(
        self,
        teacher: Callable[[NDArray[np.int64], int], ArrayLike],
        n: int = 64,
        *,
        tolerance: float = _VERIFY_TOLERANCE,
    ) -> float:
        """Ask the teacher again for entries drawn at random, and compare.

        Args:
            teacher: maps (rows (m,) int64, slot) to their logits (m, C).
            n: entries to draw, at most.
            tolerance: largest difference of a row that is accepted: root mean square over the
                classes, as a share of the standard deviation of the row's logits.

        Returns:
            The largest difference found; 0.0 for an empty cache.

        Raises:
            ArtifactMismatch: the teacher returns something else now.
        """
        worst = 0.0
        for slot, rows in self._draw_entries(n):
            kept = self.logits(rows, slot)
            now = self.round_trip(teacher(rows, slot), rows)
            spread = np.maximum(kept.std(axis=1), np.finfo(np.float16).eps)
            differences = np.sqrt(((now - kept) ** 2).mean(axis=1)) / spread
            worst = max(worst, float(differences.max()))
            if worst > tolerance:
                row = rows[np.argmax(differences)]
                raise ArtifactMismatch(
                    f"{self.path} is not of this teacher on these views: row {row:,} in slot "
                    f"{slot} differs by {worst:.2f} of its logits' standard deviation (allowed: "
                    f"{tolerance}). Name another folder, or the teacher and the settings that "
                    "filled it."
                )
        return worst

    def check(self) -> Iterator[str]:
        """Read every slot and compare it with its checksums.

        Yields:
            A sentence for each fault; nothing for a whole cache. Missing rows are not faults.
        """
        for slot in range(self.num_views):
            yield from self._slot(slot).check()

    def summary(self) -> dict[str, Any]:
        """Describe the cache in JSON values; see `fastprune cache info`."""
        filled = [len(self.rows) - len(self.missing(slot)) for slot in range(self.num_views)]
        return {
            "path": str(self.path),
            "num_rows": len(self.rows),
            "num_classes": self.num_classes,
            "num_views": self.num_views,
            "dtype": self.dtype,
            "bytes_per_view": stored_dtype(self.dtype, self.num_classes).itemsize,
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
        """Write what was put, and close the files; raises as `commit`."""
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

    def _slot(self, slot: int) -> RowStore:
        """The store of a slot; its files are made by the first commit."""
        self._require_slot(slot)
        if slot not in self._slots:
            if len(self._slots) == _MOST_OPEN_SLOTS:
                self._slots.popitem(last=False)[1].close()
            self._slots[slot] = slot_store(self.path, slot, self._header)
        self._slots.move_to_end(slot)
        return self._slots[slot]

    def _draw_entries(self, n: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Draw up to n filled entries at random: (slot, sorted rows) for each slot with some."""
        filled = [self.rows[self.has(self.rows, slot)] for slot in range(self.num_views)]
        ends = np.cumsum([len(rows) for rows in filled])
        drawn = np.random.default_rng().choice(ends[-1], min(n, int(ends[-1])), replace=False)
        slots = np.searchsorted(ends, drawn, side="right")
        for slot in np.unique(slots).tolist():
            within = drawn[slots == slot] - (ends[slot - 1] if slot else 0)
            yield slot, np.sort(filled[slot][within])
