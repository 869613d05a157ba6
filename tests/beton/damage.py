"""Betons to damage, and where their parts are."""

import io
from pathlib import Path

import numpy as np

from fastprune.beton import layout
from fastprune.beton.output import PageCursor, write_frame
from tests.images import jpeg_bytes


def write_plain_beton(path: Path, *, rows: int = 6) -> Path:
    """A small beton with the smallest page, raw and JPEG images, and a field of each kind."""
    fields = (
        layout.Field("image", "image"),
        layout.Field("label", "int"),
        layout.Field("note", "bytes"),
        layout.Field("vector", "ndarray", array_arguments("<f4", (3,))),
        layout.Field("weight", "float"),
    )
    cursor = PageCursor(layout.MIN_PAGE_BYTES, layout.MIN_PAGE_BYTES)
    metadata = np.zeros(rows, layout.metadata_dtype(fields))
    table, pages = [], []
    for row in range(rows):
        raw = row % 3 == 2
        image = bytes(range(48)) if raw else jpeg_bytes(row, width=16, height=12)
        pieces = (image, b"note" * (row + 1), bytes(12))
        places = [cursor.place(len(piece)) for piece in pieces]
        width, height = (4, 4) if raw else (16, 12)
        metadata[row] = (
            (layout.RAW if raw else layout.JPG, width, height, places[0]),
            row % 4,
            (places[1], len(pieces[1])),
            places[2],
            0.5,
        )
        table += [(row, place, len(piece)) for place, piece in zip(places, pieces, strict=True)]
        pages += zip(places, pieces, strict=True)
    buffer = io.BytesIO()
    for place, piece in pages:
        buffer.seek(place)
        buffer.write(piece)
    path.write_bytes(buffer.getvalue())
    write_frame(path, fields, metadata, np.array(table, layout.ALLOCATION), cursor, 4)
    return path


def array_arguments(type_name: str, shape: tuple[int, ...]) -> bytes:
    """The descriptor's arguments of an ndarray field, as stock FFCV writes them."""
    description = f'[["", "{type_name}"]]'.encode()
    header = np.zeros(33, "<u8")
    header[: len(shape)] = shape
    header[32] = len(description)
    return (header.tobytes() + description).ljust(1024, b"\0")


def patch(path: Path, offset: int, content: bytes) -> None:
    """Overwrite a few bytes."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def column_offset(path: Path, row: int, field: int, name: str | None = None) -> int:
    """Where a value of a row's metadata stands."""
    header = np.fromfile(path, layout.HEADER, 1)[0]
    descriptors = np.fromfile(
        path, layout.DESCRIPTOR, header["num_fields"], offset=layout.HEADER.itemsize
    )
    fields = tuple(
        layout.Field(str(index), layout.KINDS[int(one["type_id"])])
        for index, one in enumerate(descriptors)
    )
    record = layout.metadata_dtype(fields)
    column, offset = record.fields[f"f{field}"][:2]
    if name is not None:
        offset += column.fields[name][1]
    return layout.metadata_start(len(fields)) + row * record.itemsize + offset


def entry_offset(path: Path, entry: int, name: str) -> int:
    """Where a value of the allocation table stands."""
    table = int(np.fromfile(path, layout.HEADER, 1)[0]["alloc_table_ptr"])
    return table + entry * layout.ALLOCATION.itemsize + layout.ALLOCATION.fields[name][1]
