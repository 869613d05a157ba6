"""Is a beton whole? The structure always, every image and checksum on request."""

import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from fastprune.base.cpus import usable_cpus
from fastprune.base.errors import (
    ArtifactError,
    BetonError,
    ContentNotComparedWarning,
    FastpruneError,
    JpegError,
)
from fastprune.base.progress import track
from fastprune.base.provenance import (
    Fingerprint,
    require_same_images,
    structure_digest,
)
from fastprune.beton import layout
from fastprune.beton.manifest import Manifest, manifest_of
from fastprune.beton.opening import image_and_label, open_beton, rows_present
from fastprune.beton.row_check import Placement, check_rows, label_faults
from fastprune.beton.shards import read_set
from fastprune.beton.structure import Fault, Tables, UnreadableBetonError, read_tables
from fastprune.jpeg.headers import read_header
from fastprune.rows.subset import Subset, checked_rows

# A task's start costs a few microseconds, an image's check a millisecond.
_ROWS_PER_TASK = 64


def check_beton(
    path: str | Path, *, deep: bool = False, subset: str | Path | None = None
) -> list[Fault]:
    """Find everything that is wrong with a beton.

    The structure is checked always: header, fields, metadata, allocation table, and whether the
    manifest beside the file belongs to it.

    Of a mirror, `deep` looks at the rows that were fetched.

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
    """Say why a subset cannot index this beton."""
    try:
        subset = Subset.load(subset_path)
        checked_rows(subset.rows, name=str(subset_path), num_rows=beton.num_rows)
        if subset.fingerprint is not None:
            # That contents were not compared is no fault of the subset.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ContentNotComparedWarning)
                require_same_images(
                    subset.fingerprint,
                    str(subset_path),
                    beton,
                    str(path),
                    cure="Make a subset for this beton: "
                    f"fastprune score {path} ... && fastprune select ...",
                )
    except FastpruneError as error:
        return [Fault("subset", str(error).replace("\n", " "))]
    return []


def _image_faults(
    tables: Tables,
    image: int,
    placement: Placement,
    crcs: dict[int, int] | None,
    present: NDArray[np.bool_],
) -> list[Fault]:
    """Decode every image that lies inside the file, on every core.

    Args:
        tables: the parts of the beton; other rows may be damaged.
        image: the index of the image field.
        placement: where the images lie.
        crcs: row -> CRC-32C of its stored bytes; None where nobody knows them.
        present: (N,) whether a row is there: a mirror lacks some.

    Returns:
        At most one fault per row, in row order.
    """
    # Rows whose data lies inside the file, even where other rows' does not. The offsets are what
    # the file says: the sums that are compared must not overflow.
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

    # Images are decoded without the interpreter's lock. PIL's warnings of metadata are no faults;
    # they are silenced here, once, because doing so is not safe in the threads.
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
    if crcs is not None and google_crc32c.value(stored) != crcs.get(row):
        return Fault("crc", "its bytes are not those that were written (CRC-32C)", row)
    if record["mode"] == layout.RAW:
        return None
    # Numba is loaded for a deep check alone.
    from fastprune.jpeg.decode import require_whole

    width, height = int(record["width"]), int(record["height"])
    try:
        header = read_header(stored)
        if (header.width, header.height) != (width, height):
            actual = f"its JPEG has {header.width} x {header.height} pixels"
            return Fault("extent", f"{actual}, but the metadata says {width} x {height}", row)
        # Stricter than libjpeg, which makes up what is damaged: as the loader is.
        require_whole(stored, height=height, width=width)
    except JpegError as error:
        return Fault("image", f"its image is damaged: {error}", row)
    return None
