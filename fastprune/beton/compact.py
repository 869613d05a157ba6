"""Some rows of a beton -> a new beton, byte by byte, without decoding."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import google_crc32c
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fastprune.artifacts.atomic import atomic_path
from fastprune.artifacts.fingerprint import (
    Fingerprint,
    content_digest,
    structure_digest,
)
from fastprune.beton import layout
from fastprune.beton.adopt import found_lines, stored_crc32c
from fastprune.beton.manifest import Manifest, manifest_path, write_parquet
from fastprune.beton.output import write_frame, write_images
from fastprune.beton.pages import PageCursor
from fastprune.beton.reader import Beton, image_and_label, open_beton
from fastprune.beton.row_check import check_rows
from fastprune.beton.rows import RowsLike, rows_of
from fastprune.beton.structure import read_tables
from fastprune.errors import BetonError, InvalidValueError
from fastprune.progress import track

_ROW_FIELD = layout.Field("row", "int")
_WRITE_BYTES = 8 << 20
_MOST_LABEL_BLOCKS = 1_000_000


def compact(
    beton_path: str | Path,
    out_path: str | Path,
    *,
    subset: RowsLike = None,
    row_field: bool = False,
) -> Manifest:
    """Copy rows of a beton into a new one that holds nothing else.

    A random half of a beton touches nearly every page of it, so that pruning alone saves no
    reading; the compacted beton does. No image is decoded; all fields are kept. A beton of stock
    FFCV comes out aligned for DALI. The manifest is carried over, with the column `original_row`.

    Args:
        beton_path: the beton to copy from.
        out_path: the beton to write; an older one is replaced at the very end.
        subset: the rows to keep, as a file, a `Subset` or an array; None for all of them.
        row_field: also store every sample's original row as an int field "row".

    Returns:
        The manifest of the new beton.

    Raises:
        InvalidValueError: the rows do not index the beton, both paths are the same, or the beton
            has a field "row" already.
        ArtifactMismatch: the subset was made from other images.
        BetonError: the beton is damaged; an image's bytes are compared with the manifest's CRC-32C.
        ArtifactError: the new beton cannot be written.
    """
    beton, out = open_beton(beton_path), Path(out_path)
    if out.resolve() == beton.path.resolve():
        raise InvalidValueError(f"{out} cannot be compacted into itself. Name another file.")
    rows = rows_of(beton, subset)
    fields = beton.fields
    if row_field:
        if any(field.name == _ROW_FIELD.name for field in fields):
            raise InvalidValueError(f"{beton.path} has a field 'row' already. Leave row_field out.")
        fields = (*fields, _ROW_FIELD)
    lines = _parent_lines(beton, rows)
    lines = lines.set_column(0, "row", pa.array(np.arange(len(rows))))
    manifest = _manifest(beton, rows, lines, out)
    with atomic_path(out) as temporary:
        _write(beton, rows, fields, lines, temporary)
        with atomic_path(manifest.path) as unnamed:
            write_parquet(unnamed, manifest, lines.to_batches())
            # An older beton must not stand beside the new manifest for a moment.
            out.unlink(missing_ok=True)
    return manifest


def _parent_lines(beton: Beton, rows: NDArray[np.int64]) -> pa.Table:
    """The parent's lines of some rows; made up where it has no manifest."""
    if beton.manifest is None:
        table = pa.Table.from_batches(found_lines(beton, rows, stored_crc32c(beton, rows)))
    else:
        table = beton.manifest.table()
        table = table.filter(table["row"].is_valid()).take(rows)
    if "original_row" not in table.column_names:
        table = table.append_column("original_row", table["row"])
    return table


def _write(
    beton: Beton,
    rows: NDArray[np.int64],
    fields: tuple[layout.Field, ...],
    lines: pa.Table,
    path: Path,
) -> None:
    """Copy the data of every field that has some, and frame it."""
    tables = read_tables(beton.path)
    placements, _ = check_rows(tables)
    metadata = np.zeros(len(rows), layout.metadata_dtype(fields))
    for index in range(len(beton.fields)):
        metadata[f"f{index}"] = tables.metadata[f"f{index}"][rows]
    if len(fields) > len(beton.fields):
        metadata[f"f{len(beton.fields)}"] = lines["original_row"].to_numpy()
    first_page = layout.align_up(
        layout.metadata_start(len(fields)) + metadata.nbytes, layout.DEFAULT_PAGE_BYTES
    )
    cursor = PageCursor(first_page, layout.DEFAULT_PAGE_BYTES)
    sizes = np.stack([placement.sizes[rows] for placement in placements.values()], axis=1)
    sources = np.stack([placement.offsets[rows] for placement in placements.values()], axis=1)
    targets = _place(sizes, cursor)
    for column, index in enumerate(placements):
        layout.pointers(metadata, fields, index)[:] = targets[:, column]
    table = np.zeros(targets.size, layout.ALLOCATION)
    table["sample_id"] = np.repeat(np.arange(len(rows)), targets.shape[1])
    table["ptr"], table["size"] = targets.reshape(-1), sizes.reshape(-1)
    image = list(placements).index(image_and_label(beton.fields, beton.path)[0])
    pieces = _pieces(beton, rows, sources, sizes, lines, image)
    _copy(pieces, targets, path)
    write_frame(path, fields, metadata, table, cursor, _num_label_blocks(beton))


def _place(sizes: NDArray[np.int64], cursor: PageCursor) -> NDArray[np.int64]:
    """File offsets for the data of every row, (K, fields with data); a row stays in one page."""
    padded = np.maximum(-(-sizes // layout.ALIGNMENT), 1) * layout.ALIGNMENT
    within = np.cumsum(padded, axis=1) - padded
    totals = within[:, -1] + sizes[:, -1]
    starts = np.array([cursor.place(int(total)) for total in totals], np.int64)
    targets: NDArray[np.int64] = starts[:, None] + within
    return targets


def _pieces(
    beton: Beton,
    rows: NDArray[np.int64],
    sources: NDArray[np.int64],
    sizes: NDArray[np.int64],
    lines: pa.Table,
    image: int,
) -> Iterator[list[NDArray[np.uint8]]]:
    """The data of row after row; an image must have the bytes that were written once."""
    crcs = lines["stored_crc32c"].to_numpy()
    for position, row in enumerate(rows):
        ends = sources[position] + sizes[position]
        spans = zip(sources[position], ends, strict=True)
        data = [beton.content[start:end] for start, end in spans]
        if google_crc32c.value(data[image].tobytes()) != crcs[position]:
            raise BetonError(
                f"{beton.path} is damaged: the image of row {row:,} "
                f"(from {lines['source'][position]}) has not the bytes that were written "
                f"(CRC-32C). See all: fastprune check {beton.path} --deep; then convert again."
            )
        yield data


def _copy(
    pieces: Iterator[list[NDArray[np.uint8]]], targets: NDArray[np.int64], path: Path
) -> None:
    """Write the data of all rows in file order, a few MiB at a time."""
    data: list[NDArray[np.uint8]] = []
    offsets: list[int] = []
    total = 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        tracked = track(pieces, description="compact", total=len(targets), unit="rows")
        for row_data, row_targets in zip(tracked, targets, strict=True):
            data += row_data
            offsets += row_targets.tolist()
            total += sum(map(len, row_data))
            if total >= _WRITE_BYTES:
                write_images(descriptor, data, offsets)
                data, offsets, total = [], [], 0
        write_images(descriptor, data, offsets)
    finally:
        os.close(descriptor)


def _manifest(beton: Beton, rows: NDArray[np.int64], lines: pa.Table, out: Path) -> Manifest:
    """What the new manifest says of the new beton."""
    structure = structure_digest(beton.labels[rows], beton.widths[rows], beton.heights[rows])
    content = content_digest(lines["source_crc32c"].to_numpy())
    actions = Counter(lines["action"].to_pylist())
    parent = beton.manifest
    settings = {} if parent is None else parent.settings
    return Manifest(
        path=manifest_path(out),
        fingerprint=Fingerprint(len(rows), structure, content),
        class_names=beton.class_names,
        counts=dict(sorted(actions.items())),
        settings={**settings, "compacted_from": beton.fingerprint.to_dict()},
    )


def _num_label_blocks(beton: Beton) -> int:
    """One label block per class; none where the labels do not number classes."""
    numbered = beton.labels.min() >= 0 and beton.num_classes <= _MOST_LABEL_BLOCKS
    return beton.num_classes if numbered else 0
