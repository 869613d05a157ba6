"""Check a beton: the structure always, every image and checksum on request.

A beton of another writer can also get a manifest here, which gives its content a fingerprint.
"""

import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fastprune.base.checksums import crc32c
from fastprune.base.cpus import usable_cpus
from fastprune.base.errors import (
    ArtifactError,
    BetonError,
    ContentNotComparedWarning,
    FastpruneError,
    ForeignManifestWarning,
    JpegError,
)
from fastprune.base.progress import track
from fastprune.base.provenance import (
    Fingerprint,
    content_digest,
    require_same_images,
    structure_digest,
)
from fastprune.beton import layout
from fastprune.beton.beton import Beton
from fastprune.beton.convert.transcode import ACTIONS, FOUND
from fastprune.beton.manifest import (
    SCHEMA,
    Manifest,
    manifest_of,
    manifest_path,
    write_manifest,
)
from fastprune.beton.opening import (
    image_and_label,
    open_beton,
    rows_present,
)
from fastprune.beton.row_check import Placement, check_rows, label_faults
from fastprune.beton.shards import read_set
from fastprune.beton.structure import Fault, Tables, UnreadableBetonError, read_tables
from fastprune.jpeg.headers import read_header
from fastprune.rows.subset import Subset, checked_rows

# A task's start costs a few microseconds, an image's check a millisecond.
_ROWS_PER_TASK = 64
_MANIFEST_LINES = 1 << 16


def check_beton(
    path: str | Path, *, deep: bool = False, subset: str | Path | None = None
) -> list[Fault]:
    """Find everything that is wrong with a beton.

    The structure is always checked: header, fields, metadata, allocation table, and whether the
    manifest beside the file belongs to it. Of a mirror, `deep` reads the rows that were fetched.

    Args:
        path: the beton, ours or stock FFCV's, or the folder of a sharded one.
        deep: also decode every image and compare it with its metadata and, where there is a
            manifest, with its CRC-32C. A flipped bit in a JPEG often decodes without complaint, so
            only the CRC finds it.
        subset: a subset's file, to be checked against the beton.

    Returns:
        The faults, named by row and source file; empty when the beton is whole.

    Raises:
        BetonError: the file cannot be opened. Damaged content is never raised but returned.
    """
    path = Path(path)
    if path.is_dir():
        return _shard_faults(path, deep, subset)
    try:
        tables = read_tables(path)
    except UnreadableBetonError as error:
        return [error.fault]
    placements, faults = check_rows(tables)
    try:
        image, label = image_and_label(tables.fields, path)
    except BetonError as error:
        return [*faults, Fault("fields", str(error))]
    columns, labels = tables.metadata[f"f{image}"], tables.metadata[f"f{label}"]
    structure = structure_digest(labels, columns["width"], columns["height"])
    faults += label_faults(labels)
    known = {"label": labels, "width": columns["width"], "height": columns["height"]}
    known["bytes"] = placements[image].sizes
    manifest, differences = manifest_of(path, known, structure)
    faults += differences
    # The manifest's lines cost a read of it; they name the rows at fault and have the checksums.
    lines = None
    if manifest is not None and (deep or any(fault.row is not None for fault in faults)):
        lines = _lines(manifest)
        faults += [lines] if isinstance(lines, Fault) else []
    if deep:
        crcs = lines.crcs if isinstance(lines, _Lines) else None
        mirrored = rows_present(path)
        present = np.ones(len(labels), bool) if mirrored is None else mirrored
        faults += _image_faults(tables, image, placements[image], crcs, present)
    if subset is not None:
        content = None if manifest is None else manifest.fingerprint.content
        beton = Fingerprint(len(labels), structure, content)
        faults += _subset_faults(Path(subset), path, beton)
    if isinstance(lines, _Lines):
        return [
            fault if fault.row is None else replace(fault, source=lines.sources.get(fault.row))
            for fault in faults
        ]
    return faults


def _shard_faults(folder: Path, deep: bool, subset: str | Path | None) -> list[Fault]:
    """Check each shard by itself, and then whether they belong together."""
    try:
        manifest, shards = read_set(folder)
    except BetonError as error:
        # A folder of something else is not damaged: there is nothing to check.
        if not list(folder.glob("shard-*.beton")):
            raise
        return [Fault("shards", str(error))]
    faults: list[Fault] = []
    for shard in shards:
        for fault in check_beton(shard.path, deep=deep):
            row = None if fault.row is None else shard.first_row + fault.row
            message = f"{shard.path.name}: {fault.message}"
            faults.append(replace(fault, row=row, message=message))
    # Opening compares the shards with the whole; it would only repeat a shard's own faults.
    if not faults:
        try:
            open_beton(folder)
        except BetonError as error:
            faults.append(Fault("shards", str(error)))
    if subset is not None:
        faults += _subset_faults(Path(subset), folder, manifest.fingerprint)
    return faults


@dataclass(frozen=True)
class _Lines:
    """The manifest's lines, by row."""

    sources: dict[int, str]
    crcs: dict[int, int]


def _lines(manifest: Manifest) -> _Lines | Fault:
    """Read the manifest's lines; return a fault if they cannot be read."""
    try:
        table = manifest.table(["row", "source", "stored_crc32c"])
    except ArtifactError as error:
        return Fault("manifest", str(error))
    rows, sources, crcs = (column.to_pylist() for column in table.columns)
    return _Lines(dict(zip(rows, sources, strict=True)), dict(zip(rows, crcs, strict=True)))


def _subset_faults(subset_path: Path, path: Path, beton: Fingerprint) -> list[Fault]:
    """Find why a subset cannot index this beton."""
    try:
        subset = Subset.load(subset_path)
        checked_rows(subset.rows, name=str(subset_path), num_rows=beton.num_rows)
        if subset.fingerprint is not None:
            with warnings.catch_warnings():
                # A beton without a manifest can be compared by its structure alone.
                warnings.simplefilter("ignore", ContentNotComparedWarning)
                require_same_images(
                    subset.fingerprint,
                    str(subset_path),
                    beton,
                    str(path),
                    cure=f"Make a subset for this beton: fastprune score {path} ... && "
                    "fastprune select ...",
                )
    except FastpruneError as error:
        return [Fault("subset", str(error))]
    return []


def _image_faults(
    tables: Tables,
    image: int,
    placement: Placement,
    crcs: dict[int, int] | None,
    present: NDArray[np.bool_],
) -> list[Fault]:
    """Decode every present image that lies inside the file; at most one fault per row, in order."""
    # Rows whose data lies inside the file, even if other rows' does not. Offsets come from the file
    # and may be anything, so no sum may overflow.
    offsets, sizes, end = placement.offsets, placement.sizes, tables.table_offset
    inside = present & (sizes > 0) & (offsets >= tables.data_offset) & (sizes <= end)
    rows = np.flatnonzero(inside & (offsets <= end - np.minimum(sizes, end)))
    pieces = [rows[at : at + _ROWS_PER_TASK] for at in range(0, len(rows), _ROWS_PER_TASK)]
    columns = tables.metadata[f"f{image}"]

    def check(piece: NDArray[np.int64]) -> list[Fault]:
        found = []
        for row in piece.tolist():
            start = placement.offsets[row]
            stored = tables.content[start : start + placement.sizes[row]].tobytes()
            fault = _fault(row, stored, columns[row], crcs)
            if fault is not None:
                found.append(fault)
        return found

    # Decoding releases the GIL. Pillow's warnings about metadata are not faults; they are silenced
    # here, once, because threads cannot do that safely.
    with warnings.catch_warnings(), ThreadPoolExecutor(usable_cpus()) as pool:
        warnings.simplefilter("ignore")
        done = track(
            pool.map(check, pieces),
            description="check",
            total=len(rows),
            unit="images",
            step=_ROWS_PER_TASK,
        )
        return [fault for piece in done for fault in piece]


def _fault(row: int, stored: bytes, record: np.void, crcs: dict[int, int] | None) -> Fault | None:
    """Return the first thing that is wrong with one image."""
    # The CRC first: it is cheaper than decoding, and finds bits that still decode.
    if crcs is not None and crc32c(stored) != crcs.get(row):
        return Fault("crc", "its bytes are not the ones that were written (CRC-32C)", row)
    if record["mode"] == layout.RAW:
        return None
    # Numba is loaded for a deep check alone.
    from fastprune.jpeg.decode import require_whole

    width, height = int(record["width"]), int(record["height"])
    try:
        header = read_header(stored)
        if (header.width, header.height) != (width, height):
            actual = f"its JPEG has {header.width} x {header.height} pixels"
            return Fault("extent", f"{actual}, but in the metadata {width} x {height}", row)
        # Stricter than libjpeg, which fills in what is damaged; as strict as the loader.
        require_whole(stored, height=height, width=width)
    except JpegError as error:
        return Fault("image", f"its image is damaged: {error}", row)
    return None


def write_missing_manifest(path: str | Path) -> Manifest:
    """Write a manifest for a beton of another writer, so that its contents have a fingerprint.

    The CRC-32C of the stored bytes stands for the source's: the source checksums are unknown.
    A manifest of another beton is replaced.

    Raises:
        BetonError: the beton is damaged.
        ArtifactError: it has its manifest already, or the manifest cannot be written.
    """
    with warnings.catch_warnings():
        # A manifest of another beton is what this one replaces.
        warnings.simplefilter("ignore", ForeignManifestWarning)
        beton = open_beton(path)
    if beton.manifest is not None:
        raise ArtifactError(
            f"{manifest_path(path)} belongs to {path} already, and has more in it than a new one "
            "could. Remove it first if you want it made again."
        )
    rows = np.arange(beton.num_rows)
    crcs = stored_crc32c(beton, rows)
    manifest = Manifest(
        path=manifest_path(path),
        fingerprint=Fingerprint(beton.num_rows, beton.structure, content_digest(crcs)),
        class_names=None,
        counts={ACTIONS[FOUND]: beton.num_rows},
    )
    write_manifest(manifest, found_lines(beton, rows, crcs))
    return manifest


def stored_crc32c(beton: Beton, rows: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Compute the CRC-32C of each row's stored bytes; (K,) uint32."""
    tracked = track(rows.tolist(), description="crc", total=len(rows), unit="rows")
    return np.array([crc32c(beton.image_bytes(row)) for row in tracked], np.uint32)


def found_lines(
    beton: Beton, rows: NDArray[np.int64], crcs: NDArray[np.uint32]
) -> Iterator[pa.RecordBatch]:
    """Yield the manifest's lines of rows of unknown origin; `crcs` (K,) is of the stored bytes."""
    for start in range(0, len(rows), _MANIFEST_LINES):
        piece = rows[start : start + _MANIFEST_LINES]
        columns = {
            "row": piece,
            "label": beton.labels[piece],
            "bytes": beton.sizes[piece],
            "width": beton.widths[piece].astype(np.int32),
            "height": beton.heights[piece].astype(np.int32),
            "action": [ACTIONS[FOUND]] * len(piece),
            "source_crc32c": crcs[start : start + len(piece)],
            "stored_crc32c": crcs[start : start + len(piece)],
        }
        unknown = [None] * len(piece)
        yield pa.RecordBatch.from_arrays(
            [pa.array(columns.get(entry.name, unknown), entry.type) for entry in SCHEMA],
            schema=SCHEMA,
        )
