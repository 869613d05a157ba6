"""A mirror: sparse local files of a beton in object storage, filled row by row."""

import errno
import fcntl
import json
import os
import struct
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from fastprune.base.errors import ArtifactError, BetonError, StorageError
from fastprune.base.files import atomic_path, lock, named_os_errors, write_text
from fastprune.base.provenance import structure_digest
from fastprune.beton import layout
from fastprune.beton.beton import Beton
from fastprune.beton.manifest import manifest_path, read_manifest
from fastprune.beton.opening import MIRROR_NAME, image_and_label, open_files, read_records
from fastprune.beton.remote.plan import Places, Request
from fastprune.beton.remote.presence import (
    MARKS_NAME,
    MirroredFile,
    MirrorRecord,
    open_marks,
)
from fastprune.beton.remote.store import RETRY_SECONDS, BadBodyError, Store
from fastprune.beton.shards import SET_NAME, read_listing

NUM_THREADS = 16

_LOCK_NAME = "mirror.lock"
# struct flock of Linux: type, whence, start, length, process.
_FLOCK = "hhqqi4x"
_HEAD_BYTES = 16 << 10  # the descriptors of 15 fields
_ATTEMPTS_AT_TABLES = 3


@dataclass(frozen=True, eq=False)
class Mirror:
    """An open mirror: any number of processes may fill it at once.

    Attributes:
        folder: of the mirror.
        record: what it is a mirror of.
        store: where the objects are.
        beton: the sparse files, opened as a beton that promises all rows; those that are not
            there hold zeros until they are fetched.
        places: where each row lies in its file.
        present: (N,) uint8, 1 for rows that are there; shared with the other processes.
    """

    folder: Path
    record: MirrorRecord
    store: Store
    beton: Beton
    places: Places
    present: NDArray[np.uint8]

    @cached_property
    def crcs(self) -> NDArray[np.uint32]:
        """CRC-32C of each row's stored bytes, (N,), by the manifests."""
        assert self.beton.manifest is not None, "its fingerprint has a content"
        lines = self.beton.manifest.table(["row", "stored_crc32c"])
        crcs: NDArray[np.uint32] = lines.filter(lines["row"].is_valid())["stored_crc32c"].to_numpy()
        return crcs

    def absent(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return those of the rows that are not there, in their order."""
        absent: NDArray[np.int64] = rows[self.present[rows] == 0]
        return absent

    def fetch(self, request: Request, stop: threading.Event) -> int | None:
        """Fetch a range, if no other process does at this moment.

        The rows' checksums are compared before they are written, and they are marked when they are.

        Args:
            request: the range.
            stop: set to repeat nothing any more.

        Returns:
            The bytes that were fetched, 0 where all rows were there; None if another process is
            fetching some of the range.

        Raises:
            StorageError: the range cannot be read, or the object changed.
            ArtifactError: the disk is full.
        """
        file = self.record.files[request.file]
        with claimed(self.folder / file.name, request.start, request.size) as descriptor:
            if descriptor is None:
                return None
            # Looked at again: another process may just have finished.
            rows = self.absent(request.rows)
            if not len(rows):
                return 0
            start = int(self.places.offsets[rows[0]])
            size = int((self.places.offsets[rows] + self.places.sizes[rows]).max()) - start
            require_version(self.store, file)

            def require_rows(content: bytes) -> None:
                view = memoryview(content)
                for row in rows.tolist():
                    at = int(self.places.offsets[row]) - start
                    stored = bytes(view[at : at + int(self.places.sizes[row])])
                    if google_crc32c.value(stored) != self.crcs[row]:
                        require_version(self.store, file)
                        raise BadBodyError(f"the bytes of row {row:,} are others (CRC-32C)")

            content = self.store.read(file.name, start, size, require=require_rows, stop=stop)
            with named_os_errors(self.folder / file.name):
                _write(descriptor, content, start)
            self.present[rows] = 1
            return size


def open_mirror(url: str, folder: str | Path, *, retry_seconds: float) -> Mirror:
    """Open a mirror; make it, with all tables and no row, if there is none in the folder.

    Where everything that is asked for is there, nothing is asked of the server.

    Args:
        url: of a beton, or of a folder of shards, with its manifests beside.
        folder: of the mirror, on a local disk.
        retry_seconds: see `Store`.

    Raises:
        StorageError: something is missing at the URL, access is denied, or the server fails.
        BetonError: what is at the URL is no whole beton.
        ArtifactError: the folder is the mirror of another URL, holds something else, or cannot be
            written.
    """
    folder = Path(folder).absolute()
    url = url.rstrip("/") if not url.endswith(".beton") else url
    parent, _, last = url.rpartition("/")
    name = last if last.endswith(".beton") else None
    store = Store(parent if name else url, retry_seconds=retry_seconds)
    with named_os_errors(folder / MIRROR_NAME):
        folder.mkdir(parents=True, exist_ok=True)
        _require_ours(folder)
        (folder / _LOCK_NAME).touch()
        with lock(folder / _LOCK_NAME):
            record = MirrorRecord.read(folder) or _start(store, name, folder, url)
            if record.url != url:
                raise ArtifactError(
                    f"{folder} is a mirror of {record.url}, not of {url}. Name another folder."
                )
            marks = open_marks(folder, record, "r+")
            _fetch_tables(store, folder, record, marks)
    beton = open_files(beton_path(folder, record))
    if beton.fingerprint != record.fingerprint:
        raise BetonError(
            f"{folder} is a mirror of {record.fingerprint}, but its files are {beton.fingerprint}. "
            f"Remove it, and fetch the rows again: fastprune stage {url} SUBSET {folder}"
        )
    beton = replace(beton, present=None)
    return Mirror(folder, record, store, beton, _places(beton), marks[len(record.files) :])


@dataclass(frozen=True, eq=False, repr=False)
class MirroredBeton(Beton):
    """A beton in object storage; its rows are fetched into a mirror as they are asked for."""

    mirror: Mirror | None = None

    def arriving(self, batches: Iterable[NDArray[np.int64]]) -> Iterator[NDArray[np.int64]]:
        """Yield each batch once its rows are fetched; if all are there, nothing is requested."""
        from fastprune.beton.remote.fetch import Fetch

        assert self.mirror is not None
        batches = list(batches)
        rows = np.concatenate(batches) if batches else np.empty(0, np.int64)
        _, first = np.unique(rows, return_index=True)
        with Fetch(self.mirror, rows[np.sort(first)]) as fetch:
            for batch in batches:
                fetch.wait(batch)
                yield batch


def open_mirrored(url: str, folder: Path) -> MirroredBeton:
    """Open a beton in object storage by its mirror; see `open_mirror`."""
    mirror = open_mirror(url, folder, retry_seconds=RETRY_SECONDS)
    known = {field.name: getattr(mirror.beton, field.name) for field in fields(mirror.beton)}
    return MirroredBeton(**known, mirror=mirror)


def beton_path(folder: Path, record: MirrorRecord) -> Path:
    """Return what to open: the folder of shards, or the one file in it."""
    return folder if (folder / SET_NAME).exists() else folder / record.files[0].name


def require_version(store: Store, file: MirroredFile) -> None:
    """Refuse an object that is not the one that the mirror was made of.

    Raises:
        StorageError: it has another version or size.
    """
    now = store.status(file.name)
    if (now.size, now.version) != (file.size, file.version):
        raise StorageError(
            f"{store.url}/{file.name} changed since the mirror was made: it was {file.version} "
            f"({file.size:,} bytes), and is {now.version} ({now.size:,} bytes). Remove the mirror "
            "and fetch the rows again."
        )


@contextmanager
def claimed(path: Path, start: int, size: int) -> Iterator[int | None]:
    """Lock a range of a file for writing; yields the descriptor, None if another has the range.

    The lock is the kernel's and ends with the process, however it ends.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        lock = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, start, size, 0)
        try:
            # Of the open file and not of the process: threads exclude each other too.
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, lock)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                yield None
                return
            # Without locks two processes may fetch the same bytes, which are equal.
        yield descriptor
    finally:
        os.close(descriptor)


def _write(descriptor: int, content: bytes, start: int) -> None:
    view = memoryview(content)
    while view:
        written = os.pwrite(descriptor, view, start)
        view, start = view[written:], start + written


def _require_ours(folder: Path) -> None:
    """Refuse a folder with something else in it: its files could have the names of ours."""
    # In one look: another process may begin the mirror at this moment, by its lock.
    names = [path.name for path in folder.iterdir()]
    if names and _LOCK_NAME not in names:
        raise ArtifactError(
            f"{folder} holds files, but no mirror. Name an empty folder, or a new one, as the "
            "mirror."
        )


def _start(store: Store, name: str | None, folder: Path, url: str) -> MirrorRecord:
    """Find out what is at the URL, and write the mirror's record."""
    if name is None:
        _copy_whole(store, SET_NAME, folder)
        manifest, shards = read_listing(folder)
        names = [shard.path.name for shard in shards]
        num_rows = [shard.fingerprint.num_rows for shard in shards]
        fingerprint = manifest.fingerprint
    else:
        own_manifest = manifest_path(folder / name)
        _copy_whole(store, own_manifest.name, folder)
        fingerprint = read_manifest(own_manifest).fingerprint
        names, num_rows = [name], [fingerprint.num_rows]
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        statuses = list(pool.map(store.status, names))
    files = tuple(
        MirroredFile(name, rows, status.size, status.version)
        for name, rows, status in zip(names, num_rows, statuses, strict=True)
    )
    record = MirrorRecord(url, fingerprint, files)
    with (folder / MARKS_NAME).open("wb") as marks:
        marks.truncate(len(files) + fingerprint.num_rows)
    # Last: a folder without it is started again.
    write_text(folder / MIRROR_NAME, json.dumps(record.to_dict(), indent=1) + "\n")
    return record


def _copy_whole(store: Store, name: str, folder: Path) -> None:
    def require(content: bytes) -> None:
        # The two kinds of file that are copied: enough to ask again for bytes of another place.
        if name == SET_NAME:
            try:
                json.loads(content)
            except ValueError:
                raise BadBodyError("it is no JSON") from None
        elif content[:4] != b"PAR1" or content[-4:] != b"PAR1":
            raise BadBodyError("it is no Parquet file")

    content = store.read_whole(name, require=require)
    with atomic_path(folder / name) as temporary:
        temporary.write_bytes(content)


def _fetch_tables(
    store: Store, folder: Path, record: MirrorRecord, marks: NDArray[np.uint8]
) -> None:
    """Fetch the header, metadata, allocation table and manifest of each file that lacks them."""

    def fetch(index: int) -> None:
        name = record.files[index].name
        require_version(store, record.files[index])
        own_manifest = manifest_path(folder / name)
        if not own_manifest.exists():
            _copy_whole(store, own_manifest.name, folder)
        for attempt in range(1, _ATTEMPTS_AT_TABLES + 1):
            try:
                _fetch_tables_once(store, folder / name, record.files[index])
                _require_sound(folder / name)
                break
            except BetonError:
                # No checksum vouches for tables; what they hold does.
                if attempt == _ATTEMPTS_AT_TABLES:
                    raise
        marks[index] = 1

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        list(pool.map(fetch, np.flatnonzero(marks[: len(record.files)] == 0).tolist()))


def _fetch_tables_once(store: Store, path: Path, file: MirroredFile) -> None:
    """Write a sparse file with everything but the pages."""
    size = file.size
    # One request where the fields are an image and a label, and a second one for more fields.
    usual = layout.metadata_start(2) + 24 * file.num_rows
    head_bytes = min(max(_HEAD_BYTES, usual), size)
    head = store.read(path.name, 0, head_bytes, require=lambda content: _extent(content, size))
    metadata_end, table_offset = _extent(head, size)
    parts = {0: head, table_offset: store.read(path.name, table_offset, size - table_offset)}
    if metadata_end > head_bytes:
        parts[head_bytes] = store.read(path.name, head_bytes, metadata_end - head_bytes)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        os.ftruncate(descriptor, size)
        for start, content in parts.items():
            _write(descriptor, content, start)
    finally:
        os.close(descriptor)


def _extent(head: bytes, size: int) -> tuple[int, int]:
    """Return where the metadata ends and the allocation table begins, by the first bytes of a file.

    Raises:
        BadBodyError: they are not those of a beton of this size.
    """
    if len(head) < layout.metadata_start(1):
        raise BadBodyError(f"{size:,} bytes are too few for a beton")
    header = np.frombuffer(head, layout.HEADER, 1)[0]
    start, table_offset = (
        layout.metadata_start(int(header["num_fields"])),
        header["alloc_table_ptr"],
    )
    if header["version"] == layout.VERSION and start <= len(head):
        descriptors = np.frombuffer(
            head, layout.DESCRIPTOR, int(header["num_fields"]), layout.HEADER.itemsize
        )
        kinds = [layout.KINDS.get(int(descriptor["type_id"])) for descriptor in descriptors]
        if None not in kinds:
            columns = tuple(layout.Field(str(at), kind) for at, kind in enumerate(kinds) if kind)
            # Python's integers do not wrap around, however absurd the numbers are.
            end = start + int(header["num_samples"]) * layout.metadata_dtype(columns).itemsize
            if start < end <= int(table_offset) <= size:
                return end, int(table_offset)
    raise BadBodyError("it does not start as a beton does")


def _require_sound(path: Path) -> None:
    """Compare a file's tables with themselves and with its manifest.

    Raises:
        BetonError: they contradict each other.
    """
    records = read_records(path)
    image, label = image_and_label(records.fields, path)
    columns = records.metadata[f"f{image}"]
    found = structure_digest(records.metadata[f"f{label}"], columns["width"], columns["height"])
    listed = read_manifest(manifest_path(path)).fingerprint
    if found != listed.structure:
        raise BetonError(
            f"{path} and its manifest are of different images ({listed}). Upload both again."
        )


def _places(beton: Beton) -> Places:
    first_rows = [file.first_row for file in beton.files]
    files = np.searchsorted(first_rows, np.arange(beton.num_rows), side="right") - 1
    starts = np.array([file.start for file in beton.files])
    return Places(files, beton.offsets - starts[files], beton.sizes)
