"""Some rows of a beton -> a new beton, byte by byte, without decoding."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fastprune.base.checks import MAX_CLASSES
from fastprune.base.checksums import is_intact
from fastprune.base.errors import BetonError, InvalidValueError
from fastprune.base.files import destination, named_os_errors, sync, temporary_path
from fastprune.base.progress import track
from fastprune.base.provenance import (
    Fingerprint,
    content_digest,
    structure_digest,
)
from fastprune.beton import layout
from fastprune.beton.beton import Beton, RowsLike, rows_of
from fastprune.beton.check import found_lines, stored_crc32c
from fastprune.beton.manifest import Manifest, manifest_path, replace_pair, write_parquet
from fastprune.beton.opening import image_and_label, open_beton, read_records
from fastprune.beton.output import PageCursor, write_frame, write_images

_ROW_FIELD = layout.Field("row", "int")
# Bounds the memory, while one call writes many images.
_WRITE_BYTES = 8 << 20


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
        out_path: an older beton there is replaced at the very end.
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
    beton, out = open_beton(beton_path), destination(out_path)
    if out.resolve() == beton.path.resolve():
        raise InvalidValueError(f"{out} cannot be compacted into itself. Name another file.")
    rows = rows_of(beton, subset)
    fields = beton.fields
    if row_field:
        if any(field.name == _ROW_FIELD.name for field in fields):
            raise InvalidValueError(f"{beton.path} has a field 'row' already. Leave row_field out.")
        fields = (*fields, _ROW_FIELD)
    lines = _lines_of(beton, rows)
    parent = beton.manifest
    manifest = Manifest(
        path=manifest_path(out),
        fingerprint=Fingerprint(
            len(rows),
            structure_digest(beton.labels[rows], beton.widths[rows], beton.heights[rows]),
            content_digest(lines["source_crc32c"].to_numpy()),
        ),
        class_names=beton.class_names,
        counts=dict(sorted(Counter(lines["action"].to_pylist()).items())),
        settings={
            **({} if parent is None else parent.settings),
            "compacted_from": beton.fingerprint.to_dict(),
        },
    )
    # Both files are whole under temporary names before either gets its own.
    with temporary_path(out) as temporary, temporary_path(manifest.path) as unnamed:
        with named_os_errors(out):
            _write(beton, rows, fields, lines, temporary)
        with named_os_errors(manifest.path):
            write_parquet(unnamed, manifest, lines.to_batches())
            sync(unnamed)
            replace_pair(temporary, unnamed, out)
    return manifest


def _lines_of(beton: Beton, rows: NDArray[np.int64]) -> pa.Table:
    """Return the new manifest's lines; new ones if the parent has no manifest."""
    if beton.manifest is None:
        table = pa.Table.from_batches(found_lines(beton, rows, stored_crc32c(beton, rows)))
    else:
        table = beton.manifest.table()
        # Skipped images have a line, but no row; the other lines are in row order.
        table = table.filter(table["row"].is_valid()).take(rows)
    # Of a beton that was compacted before, the first one's rows are kept.
    if "original_row" not in table.column_names:
        table = table.append_column("original_row", table["row"])
    return table.set_column(0, "row", pa.array(np.arange(len(rows))))


def _write(
    beton: Beton,
    rows: NDArray[np.int64],
    fields: tuple[layout.Field, ...],
    lines: pa.Table,
    path: Path,
) -> None:
    """Copy the data of every field that has some, and frame it."""
    tables = read_records(beton.path)
    placements = tables.placements
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
    # Pointers in the records are absolute, so they change with the file.
    for column, index in enumerate(placements):
        layout.pointers(metadata, fields, index)[:] = targets[:, column]
    table = np.zeros(targets.size, layout.ALLOCATION)
    table["sample_id"] = np.repeat(np.arange(len(rows)), targets.shape[1])
    table["ptr"], table["size"] = targets.reshape(-1), sizes.reshape(-1)
    image = list(placements).index(image_and_label(beton.fields, beton.path)[0])
    _copy(beton, rows, (sources, sizes, targets), lines, image, path)
    # One label block per class; none where the labels do not number classes.
    is_numbered = beton.labels.min() >= 0 and beton.num_classes <= MAX_CLASSES
    write_frame(path, fields, metadata, table, cursor, beton.num_classes if is_numbered else 0)


def _place(sizes: NDArray[np.int64], cursor: PageCursor) -> NDArray[np.int64]:
    """Return offsets for the data of every row, (K, fields with data); a row stays in one page."""
    # An empty value takes an alignment too: no two allocations may share an offset.
    padded = np.maximum(-(-sizes // layout.ALIGNMENT), 1) * layout.ALIGNMENT
    within = np.cumsum(padded, axis=1) - padded
    totals = within[:, -1] + sizes[:, -1]
    starts = np.array([cursor.place(int(total)) for total in totals], np.int64)
    targets: NDArray[np.int64] = starts[:, None] + within
    return targets


def _copy(
    beton: Beton,
    rows: NDArray[np.int64],
    spans: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]],
    lines: pa.Table,
    image: int,
    path: Path,
) -> None:
    """Write the data of all rows in file order, a few MiB at a time.

    `spans` holds sources, sizes and targets, (K, fields with data) each; `image` is the column of
    the images in them.
    """
    sources, sizes, targets = spans
    crcs = lines["stored_crc32c"].to_numpy()
    data: list[NDArray[np.uint8]] = []
    offsets: list[int] = []
    total = 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        tracked = track(rows.tolist(), description="compact", total=len(rows), unit="rows")
        for position, row in enumerate(tracked):
            ends = sources[position] + sizes[position]
            row_data = [
                beton.content[start:end] for start, end in zip(sources[position], ends, strict=True)
            ]
            # Damage must not be copied into a beton whose manifest vouches for it.
            if not is_intact(row_data[image], crcs[position]):
                raise BetonError(
                    f"{beton.path} is damaged: the image of row {row:,} "
                    f"(from {lines['source'][position]}) does not have the bytes that were written "
                    f"(CRC-32C). See all: fastprune check {beton.path} --deep; then convert again."
                )
            data += row_data
            offsets += targets[position].tolist()
            total += int(sizes[position].sum())
            if total >= _WRITE_BYTES:
                write_images(descriptor, data, offsets)
                data, offsets, total = [], [], 0
        write_images(descriptor, data, offsets)
    finally:
        os.close(descriptor)
