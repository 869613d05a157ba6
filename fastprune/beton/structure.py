"""The parts of a beton, each located only after what it takes was checked against the file."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastprune.base.errors import BetonError
from fastprune.beton import layout
from fastprune.beton.mapping import map_file


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with a beton.

    Attributes:
        kind: a short name that does not change between versions, such as "unfinished".
        message: what is wrong, with the values that show it.
        row: None for the file as a whole.
        source: the source path of that row, where the manifest has it.
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
        metadata: (N,) records, f0, f1, ... for the fields.
        allocations: (A,) the allocation table.
        table_offset: where the allocation table starts, in bytes.
        content: (file size,) uint8, the whole file.
        mapped: the file's status, from the descriptor that was mapped.
    """

    fields: tuple[layout.Field, ...]
    page_bytes: int
    metadata: NDArray[np.void]
    allocations: NDArray[np.void]
    table_offset: int
    content: NDArray[np.uint8]
    mapped: os.stat_result

    @property
    def data_offset(self) -> int:
        """Where the metadata ends; no allocation may start before."""
        return layout.metadata_start(len(self.fields)) + self.metadata.nbytes


def read_tables(
    path: Path, mapping: tuple[NDArray[np.uint8], os.stat_result] | None = None
) -> Tables:
    """Locate the parts of a beton; `mapping` is its bytes and status if it is mapped already.

    Raises:
        BetonError: the file cannot be opened.
        UnreadableBetonError: a part lies outside the file or makes no sense.
    """
    content, mapped = map_file(path) if mapping is None else mapping
    try:
        return _Locator(content, mapped).tables()
    except _BrokenError as error:
        raise UnreadableBetonError(path, error.fault) from None


class _BrokenError(Exception):
    """Carries a fault out of the locator."""

    def __init__(self, kind: str, message: str, row: int | None = None) -> None:
        super().__init__(message)
        self.fault = Fault(kind, message, row)


@dataclass(frozen=True)
class _Locator:
    """Finds the parts in the order in which each one leads to the next."""

    content: NDArray[np.uint8]
    mapped: os.stat_result

    def tables(self) -> Tables:
        """Return every part, each checked against the file's size before it is touched."""
        header = self._header()
        fields = self._fields(int(header["num_fields"]))
        table_offset = int(header["alloc_table_ptr"])
        # The header is written last; stock FFCV opens such a file silently.
        if table_offset == 0:
            raise _BrokenError(
                "unfinished", "the write was interrupted: the header names no allocation table"
            )
        if not layout.metadata_start(1) <= table_offset <= len(self.content):
            raise _BrokenError(
                "cut",
                f"the allocation table should start at byte {table_offset:,}, but the file has "
                f"{len(self.content):,} bytes",
            )
        start, record = layout.metadata_start(len(fields)), layout.metadata_dtype(fields)
        # Python's integers: 2**64 rows of 24 bytes must not wrap around to a size that fits.
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
            mapped=self.mapped,
        )

    def _header(self) -> Any:
        """Read the header; version and page size must make sense."""
        if len(self.content) < layout.HEADER.itemsize:
            raise _BrokenError("header", f"{len(self.content)} bytes are too few for a beton")
        header = np.frombuffer(self.content, layout.HEADER, 1)[0]
        page = int(header["page_size"])
        if header["version"] != layout.VERSION:
            raise _BrokenError(
                "version", f"format version {header['version']}, but must be {layout.VERSION}"
            )
        # FFCV allocates a page at once, so an absurd page size must not get that far.
        if page.bit_count() != 1 or page < layout.MIN_PAGE_BYTES:
            raise _BrokenError(
                "page size",
                f"page size {page:,}, but must be a power of two >= {layout.MIN_PAGE_BYTES:,}",
            )
        return header

    def _fields(self, num_fields: int) -> tuple[layout.Field, ...]:
        """Read the descriptors, each with a known type and a readable name."""
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

    def _allocations(
        self, offset: int, fields: tuple[layout.Field, ...], num_rows: int
    ) -> NDArray[np.void]:
        """Read the allocation table: whole entries up to the end of the file, as many as needed."""
        # The table has no count: it reaches to the end of the file, with what was appended.
        table_bytes = len(self.content) - offset
        if table_bytes % layout.ALLOCATION.itemsize:
            raise _BrokenError(
                "table",
                f"the allocation table has {table_bytes:,} bytes, which is not a multiple of "
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
    """Return the first row that an allocation table does not mention."""
    # Sample ids come from the file: only their order is used, never as an index.
    rows = np.unique(table["sample_id"])
    gaps = np.flatnonzero(rows != np.arange(len(rows)))
    return int(gaps[0]) if len(gaps) else min(len(rows), num_rows - 1)


def _field(record: Any, index: int) -> layout.Field:
    """Read one descriptor."""
    kind = layout.KINDS.get(int(record["type_id"]))
    # Names are padded with zeros to 16 bytes.
    name = record["name"].tobytes().split(b"\0")[0]
    if kind is None:
        raise _BrokenError(
            "fields",
            f"field {index} has type {record['type_id']}, whose layout the file does not describe",
        )
    if not name.isascii():
        raise _BrokenError("fields", f"field {index} has the name {name!r}, which is not ASCII")
    field = layout.Field(name.decode("ascii"), kind, record["arguments"].tobytes())
    if kind in ("ndarray", "tensor") and layout.array_bytes(field) is None:
        raise _BrokenError("fields", f"field {name.decode()!r} has a damaged array description")
    return field
