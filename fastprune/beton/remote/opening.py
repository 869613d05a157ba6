"""Open a beton in object storage by its mirror; make the mirror, with all tables and no row."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path

import numpy as np

from fastprune.base.errors import ArtifactError, BetonError
from fastprune.base.files import atomic_path, lock, named_os_errors, write_text
from fastprune.base.provenance import structure_digest
from fastprune.beton import layout
from fastprune.beton.manifest import manifest_path, read_manifest
from fastprune.beton.opening import MIRROR_NAME, image_and_label, open_files, read_records
from fastprune.beton.remote.mirror import (
    MARKS_NAME,
    NUM_THREADS,
    MirroredBeton,
    MirroredFile,
    MirrorHeader,
    require_version,
)
from fastprune.beton.remote.store import RETRY_SECONDS, BadBodyError, Store
from fastprune.beton.shards import SET_NAME, read_listing
from fastprune.rows.store import Marks

_LOCK_NAME = "mirror.lock"
_HEAD_BYTES = 16 << 10  # the descriptors of 15 fields
# Tables have no checksum, so wrong bytes are noticed late, and several may come in a row.
_ATTEMPTS = 8


def open_mirrored(
    url: str, folder: str | Path, *, retry_seconds: float = RETRY_SECONDS
) -> MirroredBeton:
    """Open a beton in object storage by its mirror; make the mirror in an empty folder.

    A new mirror has all tables and no row. A whole mirror asks nothing of the server.

    Args:
        url: of a beton, or of a folder of shards, with its manifests beside it.
        folder: of the mirror, on a local disk; made where it is missing.
        retry_seconds: see `Store`.

    Raises:
        StorageError: something is missing at the URL, access is denied, or the server fails.
        BetonError: no whole beton is at the URL.
        ArtifactError: the folder is the mirror of another URL, holds something else, or cannot be
            written.
    """
    folder = Path(folder).absolute()
    url = url.rstrip("/")
    parent = url.rpartition("/")[0] if url.endswith(".beton") else url
    store = Store(parent, retry_seconds=retry_seconds)
    with named_os_errors(folder / MIRROR_NAME):
        folder.mkdir(parents=True, exist_ok=True)
        _require_ours(folder)
        with lock(folder / _LOCK_NAME):
            if not (folder / MIRROR_NAME).exists():
                _start(store, url, folder)
            header = MirrorHeader.read(folder)
            if header.url != url:
                raise ArtifactError(
                    f"{folder} is a mirror of {header.url}, not of {url}. Name another folder."
                )
            _fetch_tables(store, header.files, folder)
    is_sharded = (folder / SET_NAME).exists()
    beton = open_files(folder if is_sharded else folder / header.files[0].name)
    if beton.fingerprint != header.fingerprint:
        raise BetonError(
            f"{folder} is a mirror of {header.fingerprint}, but its files are {beton.fingerprint}. "
            f"Remove it, and fetch the rows again: fastprune stage {url} SUBSET {folder}"
        )
    # `present` is None because every row comes when it is asked for.
    known = {field.name: getattr(beton, field.name) for field in fields(beton)}
    mirror = MirroredBeton(**known, folder=folder, mirrored=header.files, store=store)
    return replace(mirror, present=None, marks=header.marks(folder))


def _require_ours(folder: Path) -> None:
    """Refuse a folder with something else in it: its files could have the names of ours."""
    # In one look: another process may start the mirror at this moment, with its lock.
    names = [path.name for path in folder.iterdir()]
    if names and _LOCK_NAME not in names:
        raise ArtifactError(
            f"{folder} holds files, but not a mirror. Name an empty folder, or a new one, as the "
            "mirror."
        )


def _start(store: Store, url: str, folder: Path) -> None:
    """Look at what is at the URL, and write the mirror's header."""
    if url.endswith(".beton"):
        name = url.rpartition("/")[2]
        own_manifest = manifest_path(folder / name)
        _copy_whole(store, own_manifest.name, folder)
        fingerprint = read_manifest(own_manifest).fingerprint
        num_rows = {name: fingerprint.num_rows}
    else:
        _copy_whole(store, SET_NAME, folder)
        manifest, shards = read_listing(folder)
        fingerprint = manifest.fingerprint
        num_rows = {shard.path.name: shard.fingerprint.num_rows for shard in shards}
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        statuses = list(pool.map(store.status, num_rows))
    files = tuple(
        MirroredFile(name=name, num_rows=rows, size=status.size, version=status.version)
        for (name, rows), status in zip(num_rows.items(), statuses, strict=True)
    )
    Marks.create(folder / MARKS_NAME, fingerprint.num_rows)
    # Last: a folder without it is started again.
    header = MirrorHeader(url=url, fingerprint=fingerprint, files=files)
    write_text(folder / MIRROR_NAME, header.model_dump_json(indent=1) + "\n")


def _fetch_tables(store: Store, files: tuple[MirroredFile, ...], folder: Path) -> None:
    """Fetch the header, metadata, allocation table and manifest of each file that is missing."""

    def fetch(file: MirroredFile) -> None:
        path = folder / file.name
        require_version(store, file)
        if not manifest_path(path).exists():
            _copy_whole(store, manifest_path(path).name, folder)
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                # The file gets its name when its tables are sound, so a file that exists is done.
                with atomic_path(path) as temporary:
                    _write_tables(store, temporary, file)
                    _require_sound(temporary, path)
                break
            except BetonError as error:
                # Tables have no checksum, but must agree with each other and with the manifest.
                if attempt == _ATTEMPTS:
                    where = f"{store.url}/{file.name}"
                    raise BetonError(str(error).replace(str(temporary), where)) from None

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        list(pool.map(fetch, [file for file in files if not (folder / file.name).exists()]))


def _copy_whole(store: Store, name: str, folder: Path) -> None:
    def require(content: bytes) -> None:
        # Enough to ask again for bytes of another place.
        if name == SET_NAME:
            try:
                json.loads(content)
            except ValueError:
                raise BadBodyError("it is not JSON") from None
        elif content[:4] != b"PAR1" or content[-4:] != b"PAR1":
            raise BadBodyError("it is not a Parquet file")

    content = store.read_whole(name, require=require)
    with atomic_path(folder / name) as temporary:
        temporary.write_bytes(content)


def _write_tables(store: Store, path: Path, file: MirroredFile) -> None:
    """Write a sparse file with everything but the pages."""
    size = file.size
    # One request where the fields are an image and a label, and a second one for more fields.
    usual = layout.metadata_start(2) + 24 * file.num_rows
    head_bytes = min(max(_HEAD_BYTES, usual), size)
    head = store.read(file.name, 0, head_bytes, require=lambda content: _extent(content, size))
    metadata_end, table_offset = _extent(head, size)
    parts = {0: head, table_offset: store.read(file.name, table_offset, size - table_offset)}
    if metadata_end > head_bytes:
        parts[head_bytes] = store.read(file.name, head_bytes, metadata_end - head_bytes)
    with path.open("wb") as sparse:
        sparse.truncate(size)  # no blocks for the pages until rows are written
        for start, content in parts.items():
            sparse.seek(start)
            sparse.write(content)


def _extent(head: bytes, size: int) -> tuple[int, int]:
    """Return where the metadata ends and the allocation table begins, by the first bytes of a file.

    A `BadBodyError` for bytes that no beton of this size starts with.
    """
    if len(head) < layout.metadata_start(1):
        raise BadBodyError(f"{size:,} bytes are too few for a beton")
    header = np.frombuffer(head, layout.HEADER, 1)[0]
    num_fields, table_offset = int(header["num_fields"]), int(header["alloc_table_ptr"])
    start = layout.metadata_start(num_fields)
    if header["version"] == layout.VERSION and start <= len(head):
        records = np.frombuffer(head, layout.DESCRIPTOR, num_fields, layout.HEADER.itemsize)
        kinds = [layout.KINDS.get(int(record["type_id"])) for record in records]
        columns = tuple(layout.Field(str(at), kind) for at, kind in enumerate(kinds) if kind)
        if len(columns) == num_fields:
            # Python's integers do not wrap around, however absurd the numbers are.
            end = start + int(header["num_samples"]) * layout.metadata_dtype(columns).itemsize
            if start < end <= table_offset <= size:
                return end, table_offset
    raise BadBodyError("it does not start as a beton does")


def _require_sound(fetched: Path, path: Path) -> None:
    """Compare the tables of a fetched file with each other and with the manifest of `path`."""
    records = read_records(fetched)
    image, label = image_and_label(records.fields, path)
    columns = records.metadata[f"f{image}"]
    found = structure_digest(records.metadata[f"f{label}"], columns["width"], columns["height"])
    listed = read_manifest(manifest_path(path)).fingerprint
    if found != listed.structure:
        raise BetonError(
            f"{path} and its manifest are of different images ({listed}). Upload both again."
        )
