"""Is the structure of a beton sound? Header, fields, metadata and allocation table; no pixels."""

import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastprune.beton import layout
from fastprune.errors import BetonError

_MOST_ROWS_NAMED = 1000


@dataclass(frozen=True)
class Fault:
    """Something in a beton that is not as it must be.

    Attributes:
        kind: a short name that does not change between versions, such as "unfinished".
        message: what is wrong, with the values that show it.
        row: the row it concerns; None for the file as a whole.
        source: the source path of that row, where the manifest tells it.
    """

    kind: str
    message: str
    row: int | None = None
    source: str | None = None

    def __str__(self) -> str:
        row = "" if self.row is None else f"row {self.row:,}: "
        source = "" if self.source is None else f" (from {self.source})"
        return f"{self.kind}: {row}{self.message}{source}"


class UnreadableBetonError(BetonError):
    """The file's structure is broken so that no row of it can be located."""

    def __init__(self, path: Path, fault: Fault) -> None:
        super().__init__(
            f"{path} cannot be used: {fault}. Convert the images again, or get a whole copy "
            "of the file."
        )
        self.fault = fault


@dataclass(frozen=True)
class Tables:
    """The parts of a beton, as views into the mapped file.

    Attributes:
        fields: the columns, in order.
        page_bytes: the page size.
        metadata: (N,) records, f0, f1, ... for the fields.
        allocations: (A,) the allocation table.
        table_offset: where the allocation table starts, in bytes.
        content: (file size,) uint8, the whole file.
    """

    fields: tuple[layout.Field, ...]
    page_bytes: int
    metadata: NDArray[np.void]
    allocations: NDArray[np.void]
    table_offset: int
    content: NDArray[np.uint8]

    @property
    def data_offset(self) -> int:
        """Where the metadata ends; no allocation may start before."""
        return layout.metadata_start(len(self.fields)) + self.metadata.nbytes


def map_file(path: Path) -> NDArray[np.uint8]:
    """Map a file into memory for reading; (file size,) uint8, not writable.

    Raises:
        BetonError: the file cannot be opened.
    """
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                return np.empty(0, np.uint8)
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except FileNotFoundError as error:
        raise BetonError(
            f"{path} does not exist. Make it with: fastprune convert IMAGES {path}"
        ) from error
    except (OSError, ValueError) as error:
        raise BetonError(f"cannot read {path}: {error}. Name a beton file.") from error


def read_tables(path: Path) -> Tables:
    """Locate the parts of a beton.

    Raises:
        BetonError: the file cannot be opened.
        UnreadableBetonError: a part lies outside the file or makes no sense.
    """
    content = map_file(path)
    try:
        return _Locator(content).tables()
    except _BrokenError as error:
        raise UnreadableBetonError(path, error.fault) from None


class _BrokenError(Exception):
    """Carries a fault out of the locator."""

    def __init__(self, kind: str, message: str, row: int | None = None) -> None:
        super().__init__(message)
        self.fault = Fault(kind, message, row)


@dataclass(frozen=True)
class _Locator:
    """Finds the parts in the order in which each tells where the next one is."""

    content: NDArray[np.uint8]

    def tables(self) -> Tables:
        """Every part, each checked against the file's size before it is touched."""
        header = self._header()
        fields = self._fields(int(header["num_fields"]))
        table_offset = self._table_offset(int(header["alloc_table_ptr"]))
        start, record = layout.metadata_start(len(fields)), layout.metadata_dtype(fields)
        num_rows = int(header["num_samples"])
        if num_rows == 0:
            raise _BrokenError("rows", "it has no rows")
        if num_rows * record.itemsize > table_offset - start:
            raise _BrokenError(
                "metadata",
                f"the header claims {num_rows:,} rows, whose metadata takes "
                f"{num_rows * record.itemsize:,} bytes, but only {table_offset - start:,} bytes "
                "lie before the allocation table",
            )
        return Tables(
            fields=fields,
            page_bytes=int(header["page_size"]),
            metadata=np.frombuffer(self.content, record, num_rows, start),
            allocations=self._allocations(table_offset, fields, num_rows),
            table_offset=table_offset,
            content=self.content,
        )

    def _header(self) -> Any:
        """The header, with a version and a page size that make sense."""
        if len(self.content) < layout.HEADER.itemsize:
            raise _BrokenError("header", f"{len(self.content)} bytes are too few for a beton")
        header = np.frombuffer(self.content, layout.HEADER, 1)[0]
        page = int(header["page_size"])
        if header["version"] != layout.VERSION:
            raise _BrokenError(
                "version", f"format version {header['version']}, but must be {layout.VERSION}"
            )
        if page.bit_count() != 1 or page < layout.MIN_PAGE_BYTES:
            raise _BrokenError(
                "page size",
                f"page size {page:,}, but must be a power of two >= {layout.MIN_PAGE_BYTES:,}",
            )
        return header

    def _fields(self, num_fields: int) -> tuple[layout.Field, ...]:
        """The descriptors, each with a known type and a readable name."""
        if num_fields == 0 or layout.metadata_start(num_fields) > len(self.content):
            raise _BrokenError(
                "fields", f"{num_fields:,} fields, but the file has {len(self.content):,} bytes"
            )
        records = np.frombuffer(self.content, layout.DESCRIPTOR, num_fields, layout.HEADER.itemsize)
        fields: dict[str, layout.Field] = {}
        for index, record in enumerate(records):
            field = _field(record, index)
            if field.name in fields:
                raise _BrokenError("fields", f"two fields have the name {field.name!r}")
            fields[field.name] = field
        return tuple(fields.values())

    def _table_offset(self, offset: int) -> int:
        """The allocation table's place, behind the descriptors and inside the file."""
        if offset == 0:
            raise _BrokenError(
                "unfinished", "the write was interrupted: the header names no allocation table"
            )
        if not layout.metadata_start(1) <= offset <= len(self.content):
            raise _BrokenError(
                "cut",
                f"the allocation table should start at byte {offset:,}, but the file has "
                f"{len(self.content):,} bytes",
            )
        return offset

    def _allocations(
        self, offset: int, fields: tuple[layout.Field, ...], num_rows: int
    ) -> NDArray[np.void]:
        """The allocation table: whole entries up to the end of the file, as many as needed."""
        table_bytes = len(self.content) - offset
        if table_bytes % layout.ALLOCATION.itemsize:
            raise _BrokenError(
                "table",
                f"the allocation table has {table_bytes:,} bytes, which is no multiple of "
                f"{layout.ALLOCATION.itemsize}: the file was cut, or something was appended",
            )
        table = np.frombuffer(self.content, layout.ALLOCATION, -1, offset)
        needed = num_rows * sum(field.has_data for field in fields)
        if len(table) != needed:
            raise _BrokenError(
                "table",
                f"the allocation table has {len(table):,} entries, but {num_rows:,} rows need "
                f"{needed:,}: "
                + ("something was appended" if len(table) > needed else "the file was cut"),
                _first_row_without_data(table, num_rows) if len(table) < needed else None,
            )
        return table


def _first_row_without_data(table: NDArray[np.void], num_rows: int) -> int:
    """The first row that an allocation table does not mention."""
    rows = np.unique(table["sample_id"])
    gaps = np.flatnonzero(rows != np.arange(len(rows)))
    return int(gaps[0]) if len(gaps) else min(len(rows), num_rows - 1)


def _field(record: Any, index: int) -> layout.Field:
    """One descriptor as a field."""
    kind = layout.KINDS.get(int(record["type_id"]))
    name = record["name"].tobytes().split(b"\0")[0]
    if kind is None:
        raise _BrokenError(
            "fields",
            f"field {index} has type {record['type_id']}, whose layout the file does not tell",
        )
    if not name.isascii():
        raise _BrokenError("fields", f"field {index} has the name {name!r}, which is not ASCII")
    field = layout.Field(name.decode("ascii"), kind, record["arguments"].tobytes())
    if kind in ("ndarray", "tensor") and layout.array_bytes(field) is None:
        raise _BrokenError("fields", f"field {name.decode()!r} has a damaged array description")
    return field


@dataclass(frozen=True)
class Placement:
    """Where the data of one field lies.

    Attributes:
        offsets: (N,) int64, absolute file offset of every row's data.
        sizes: (N,) int64, in bytes.
    """

    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]


class Allocations:
    """The allocation table in the order of the file, to look offsets up in."""

    def __init__(self, tables: Tables) -> None:
        entries = tables.allocations
        ptr = entries["ptr"]
        if len(ptr) > 1 and not (ptr[1:] > ptr[:-1]).all():
            # Of two entries at one offset the empty one comes first, so that a look-up from the
            # right finds the data.
            entries = entries[np.lexsort((entries["size"], ptr))]
        self.tables = tables
        self.ptr = np.ascontiguousarray(entries["ptr"])
        self.size = np.ascontiguousarray(entries["size"])
        self.row = np.ascontiguousarray(entries["sample_id"])
        self._used = np.zeros(len(entries), bool)

    def faults(self) -> Iterator[Fault]:
        """Entries that lie outside the pages, cross a page, or overlap the next one."""
        begin, end = np.uint64(self.tables.data_offset), np.uint64(self.tables.table_offset)
        page = np.uint64(self.tables.page_bytes)
        inside = (self.ptr >= begin) & (self.ptr <= end)
        inside &= self.size <= end - np.minimum(self.ptr, end)
        yield from self._named(
            ~inside, "outside", f"lies outside the data, bytes {begin:,} to {end:,}"
        )
        last = self.ptr + np.maximum(self.size, np.uint64(1)) - np.uint64(1)
        crossing = inside & (self.ptr // page != last // page)
        yield from self._named(crossing, "page", f"crosses a boundary of the {page:,}-byte pages")
        overlap = np.zeros(len(self.ptr), bool)
        overlap[:-1] = inside[:-1] & (self.ptr[:-1] + self.size[:-1] > self.ptr[1:])
        yield from self._named(overlap, "overlap", "overlaps the allocation behind it")

    def orphans(self) -> Iterator[Fault]:
        """Entries that no row refers to: something was appended to the file, or rows were lost."""
        orphan = ~self._used & (self.size > 0)
        yield from self._named(orphan, "orphan", "belongs to no row's data")

    def place(self, offsets: NDArray[np.uint64], name: str) -> tuple[Placement, list[Fault]]:
        """Look every row's data of one field up; also tell which rows' data is not there."""
        faults: list[Fault] = []
        if np.array_equal(self.ptr, offsets):
            index = np.arange(len(offsets))
            found = np.ones(len(offsets), bool)
        else:
            index = np.maximum(np.searchsorted(self.ptr, offsets, side="right") - 1, 0)
            found = self.ptr[index] == offsets
        missing = np.flatnonzero(~found)
        faults += _per_row(
            "pointer",
            missing,
            lambda row: (
                f"its {name} points to byte {offsets[row]:,}, which the allocation "
                "table does not list"
            ),
        )
        sizes = np.zeros(len(offsets), np.int64)
        rows = np.flatnonzero(found)
        sizes[rows] = self.size[index[rows]].astype(np.int64)
        self._used[index[rows]] = True
        foreign = rows[(self.row[index[rows]] != rows) & (sizes[rows] > 0)]
        faults += _per_row(
            "owner",
            foreign,
            lambda row: (
                f"its {name} points to byte {offsets[row]:,}, which the allocation table "
                f"gives to row {self.row[index[row]]:,}"
            ),
        )
        return Placement(offsets.astype(np.int64), sizes), faults

    def _named(self, wrong: NDArray[np.bool_], kind: str, what: str) -> Iterator[Fault]:
        """One fault per entry, named by the row that the entry tells."""
        entries = np.flatnonzero(wrong)
        for entry in entries[:_MOST_ROWS_NAMED]:
            yield Fault(
                kind,
                f"the allocation of {self.size[entry]:,} bytes at byte {self.ptr[entry]:,} {what}",
                int(self.row[entry]),
            )
        yield from _rest(kind, len(entries))


def check_rows(tables: Tables) -> tuple[dict[int, Placement], list[Fault]]:
    """Check every row's metadata against the allocation table.

    Args:
        tables: the parts of the beton.

    Returns:
        The placement of each field that has data, by the field's index, and the faults. Where
        there are faults, the placements must not be used to read.
    """
    allocations = Allocations(tables)
    faults = list(allocations.faults())
    placements: dict[int, Placement] = {}
    for index, field in enumerate(tables.fields):
        if not field.has_data:
            continue
        offsets = np.ascontiguousarray(layout.pointers(tables.metadata, tables.fields, index))
        placements[index], missing = allocations.place(offsets, field.name)
        faults += missing
        faults += _value_faults(tables, index, placements[index].sizes)
    faults += allocations.orphans()
    return placements, faults


def _value_faults(tables: Tables, index: int, sizes: NDArray[np.int64]) -> list[Fault]:
    """Values of one field that do not fit the size of its data."""
    field, column = tables.fields[index], tables.metadata[f"f{index}"]
    if field.kind == "image":
        return _image_faults(column, sizes)
    expected: Any = layout.array_bytes(field)
    if expected is None:
        expected = column["size"].astype(np.int64)
    expected = np.broadcast_to(expected, sizes.shape)
    return _per_row(
        "size",
        np.flatnonzero(sizes != expected),
        lambda row: (
            f"its {field.name} should take {expected[row]:,} bytes, but the allocation "
            f"table gives {sizes[row]:,}"
        ),
    )


def _image_faults(image: NDArray[np.void], sizes: NDArray[np.int64]) -> list[Fault]:
    """Image records with an unknown mode, no extent, or data of the wrong size."""
    mode, width, height = image["mode"], image["width"], image["height"]
    faults = _per_row(
        "mode",
        np.flatnonzero(mode > layout.RAW),
        lambda row: f"its image has mode {mode[row]}, but must be 0 (jpg) or 1 (raw)",
    )
    faults += _per_row(
        "extent",
        np.flatnonzero((width == 0) | (height == 0)),
        lambda row: f"its image is {width[row]} x {height[row]} pixels",
    )
    pixels = width.astype(np.int64) * height
    wrong = np.where(mode == layout.RAW, sizes != 3 * pixels, sizes == 0)
    faults += _per_row(
        "size",
        np.flatnonzero(wrong),
        lambda row: f"its image of {width[row]} x {height[row]} pixels takes {sizes[row]:,} bytes",
    )
    return faults


def _per_row(kind: str, rows: NDArray[np.int64], describe: Any) -> list[Fault]:
    """One fault per row, up to a number that can be read."""
    faults = [Fault(kind, describe(row), int(row)) for row in rows[:_MOST_ROWS_NAMED]]
    return [*faults, *_rest(kind, len(rows))]


def _rest(kind: str, count: int) -> Iterator[Fault]:
    """Say how many more there are than were named."""
    if count > _MOST_ROWS_NAMED:
        yield Fault(kind, f"and {count - _MOST_ROWS_NAMED:,} more rows with this fault")
