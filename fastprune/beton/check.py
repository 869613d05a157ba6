"""Is a beton whole? The structure always, every image and checksum on request."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from fastprune.artifacts.fingerprint import Fingerprint, structure_digest
from fastprune.artifacts.subset import Subset, checked_rows
from fastprune.beton import layout
from fastprune.beton.manifest import Manifest, manifest_path, read_manifest
from fastprune.beton.reader import image_and_label
from fastprune.beton.structure import Fault, Tables, UnreadableBetonError, check_rows, read_tables
from fastprune.beton.transcode import decode
from fastprune.errors import ArtifactError, BetonError, ConversionError, FastpruneError, JpegError
from fastprune.jpeg.headers import read_header
from fastprune.progress import track

_ROWS_PER_TASK = 64


def check_beton(
    path: str | Path, *, deep: bool = False, subset: str | Path | None = None
) -> list[Fault]:
    """Find everything that is wrong with a beton.

    The structure is checked always: header, fields, metadata, allocation table, and whether the
    manifest beside the file belongs to it.

    Args:
        path: the beton, ours or stock FFCV's.
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
    manifest = own_manifest(path, structure)
    if isinstance(manifest, Fault):
        faults.append(manifest)
        manifest = None
    if deep:
        rows = _readable_rows(tables, placements[image].offsets, placements[image].sizes)
        images = _Images(
            tables.content, columns, placements[image].offsets, placements[image].sizes
        )
        faults += images.faults(rows, manifest)
    if subset is not None:
        faults += _subset_faults(Path(subset), path, len(labels), structure, manifest)
    return _with_sources(faults, manifest)


def own_manifest(path: Path, structure: str) -> Manifest | Fault | None:
    """The manifest beside a beton, a fault if it is not its own, None where there is none."""
    beside = manifest_path(path)
    if not beside.exists():
        return None
    try:
        manifest = read_manifest(beside)
    except ArtifactError as error:
        return Fault("manifest", str(error))
    if manifest.fingerprint.structure != structure:
        return Fault(
            "manifest",
            f"{beside} was made for another beton: its structure is "
            f"{manifest.fingerprint.structure}, this one's is {structure}. Remove it, or make it "
            f"again: fastprune check {path} --deep --write-manifest",
        )
    return manifest


class _Images:
    """The image field of a beton whose structure may be damaged in part."""

    def __init__(
        self,
        content: NDArray[np.uint8],
        columns: NDArray[np.void],
        offsets: NDArray[np.int64],
        sizes: NDArray[np.int64],
    ) -> None:
        self.content, self.columns = content, columns
        self.offsets, self.sizes = offsets, sizes

    def faults(self, rows: NDArray[np.int64], manifest: Manifest | None) -> Iterator[Fault]:
        """Decode the images on every core; PIL's decoders run in parallel threads."""
        crcs = None if manifest is None else _stored_crcs(manifest)
        pieces = [rows[at : at + _ROWS_PER_TASK] for at in range(0, len(rows), _ROWS_PER_TASK)]

        def check(piece: NDArray[np.int64]) -> list[Fault]:
            found = (self._fault(int(row), crcs) for row in piece)
            return [fault for fault in found if fault is not None]

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            yield from (
                fault
                for piece in track(
                    pool.map(check, pieces),
                    description="check",
                    total=len(rows),
                    unit="images",
                    step=_ROWS_PER_TASK,
                )
                for fault in piece
            )

    def _fault(self, row: int, crcs: dict[int, int] | None) -> Fault | None:
        """The first thing that is wrong with one image."""
        start = self.offsets[row]
        stored = self.content[start : start + self.sizes[row]].tobytes()
        if crcs is not None and google_crc32c.value(stored) != crcs.get(row):
            return Fault("crc", "its bytes are not those that were written (CRC-32C)", row)
        record = self.columns[row]
        if record["mode"] == layout.RAW:
            return None
        expected = (int(record["width"]), int(record["height"]))
        try:
            header = read_header(stored)
            if (header.width, header.height) != expected:
                actual = f"{header.width} x {header.height}"
                return Fault(
                    "extent",
                    f"its JPEG has {actual} pixels, but the metadata says "
                    f"{expected[0]} x {expected[1]}",
                    row,
                )
            decode(stored)
        except (JpegError, ConversionError) as error:
            return Fault("image", f"its image is damaged: {error}", row)
        return None


def _readable_rows(
    tables: Tables, offsets: NDArray[np.int64], sizes: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Rows whose data lies inside the file, even when other rows' does not."""
    end = tables.table_offset
    inside = (sizes > 0) & (offsets >= tables.data_offset) & (sizes <= end)
    return np.flatnonzero(inside & (offsets <= end - np.minimum(sizes, end)))


def _stored_crcs(manifest: Manifest) -> dict[int, int]:
    """Row -> CRC-32C of its stored bytes."""
    table = manifest.table(["row", "stored_crc32c"])
    pairs = zip(table["row"].to_pylist(), table["stored_crc32c"].to_pylist(), strict=True)
    return {row: crc for row, crc in pairs if row is not None}


def _subset_faults(
    subset_path: Path, path: Path, num_rows: int, structure: str, manifest: Manifest | None
) -> list[Fault]:
    """What keeps a subset from indexing this beton."""
    try:
        subset = Subset.load(subset_path)
        checked_rows(subset.rows, name=str(subset_path), num_rows=num_rows)
    except FastpruneError as error:
        return [Fault("subset", str(error))]
    made_for = subset.fingerprint
    if made_for is None:
        return []
    content = None if manifest is None else manifest.fingerprint.content
    both_known = content is not None and made_for.content is not None
    if made_for.content == content if both_known else made_for.structure == structure:
        return []
    beton = Fingerprint(num_rows, structure, content)
    return [
        Fault(
            "subset",
            f"{subset_path} was made from beton {made_for}, but {path} is {beton}. Make a subset "
            f"for this beton: fastprune score {path} ... && fastprune select ...",
        )
    ]


def _with_sources(faults: list[Fault], manifest: Manifest | None) -> list[Fault]:
    """Add where the image of a faulty row came from."""
    if manifest is None or all(fault.row is None for fault in faults):
        return faults
    table = manifest.table(["row", "source"])
    sources = dict(zip(table["row"].to_pylist(), table["source"].to_pylist(), strict=True))
    return [
        replace(fault, source=sources.get(fault.row)) if fault.row is not None else fault
        for fault in faults
    ]
