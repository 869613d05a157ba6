"""Does every row's metadata agree with the allocation table? Arrays only; no image is read."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastprune.base.checks import MAX_CLASSES
from fastprune.beton import layout
from fastprune.beton.structure import Fault, Tables

# A file that is cut has a fault in every row.
_MOST_ROWS_NAMED = 1000


@dataclass(frozen=True)
class Placement:
    """Where the data of one field lies.

    Attributes:
        offsets: (N,) int64, absolute file offset of every row's data.
        sizes: (N,) int64, in bytes.
    """

    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]


class _Allocations:
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
        """Yield entries that lie outside the pages, cross a page, or overlap the next one."""
        # Offsets and sizes come from the file and may be anything: unsigned arithmetic wraps
        # around, so differences are compared, not sums.
        begin, end = np.uint64(self.tables.data_offset), np.uint64(self.tables.table_offset)
        page = np.uint64(self.tables.page_bytes)
        inside = (self.ptr >= begin) & (self.ptr <= end)
        inside &= self.size <= end - np.minimum(self.ptr, end)
        yield from self._name(
            ~inside, "outside", f"lies outside the data, bytes {begin:,} to {end:,}"
        )
        # An empty allocation at the end of a page belongs to it.
        last = self.ptr + np.maximum(self.size, np.uint64(1)) - np.uint64(1)
        crossing = inside & (self.ptr // page != last // page)
        yield from self._name(crossing, "page", f"crosses a boundary of the {page:,}-byte pages")
        overlap = np.zeros(len(self.ptr), bool)
        overlap[:-1] = inside[:-1] & (self.ptr[:-1] + self.size[:-1] > self.ptr[1:])
        yield from self._name(overlap, "overlap", "overlaps the allocation behind it")

    def orphans(self) -> Iterator[Fault]:
        """Yield entries that no row refers to, because two rows or fields share another one."""
        # Right only after `place` saw every field: it marks the entries that rows use.
        orphan = ~self._used & (self.size > 0)
        yield from self._name(orphan, "orphan", "belongs to no row's data")

    def place(self, offsets: NDArray[np.uint64], name: str) -> tuple[Placement, list[Fault]]:
        """Look up every row's data of one field; also return the faults of rows that have none."""
        faults: list[Fault] = []
        # Our writer puts the rows in file order: no search is needed for a million of them.
        if np.array_equal(self.ptr, offsets):
            index = np.arange(len(offsets))
            found = np.ones(len(offsets), bool)
        else:
            index = np.maximum(np.searchsorted(self.ptr, offsets, side="right") - 1, 0)
            found = self.ptr[index] == offsets
        missing = np.flatnonzero(~found)
        faults += per_row(
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
        # Rows without data may share an offset; rows with data may not.
        foreign = rows[(self.row[index[rows]] != rows) & (sizes[rows] > 0)]
        faults += per_row(
            "owner",
            foreign,
            lambda row: (
                f"its {name} points to byte {offsets[row]:,}, which the allocation table "
                f"gives to row {self.row[index[row]]:,}"
            ),
        )
        return Placement(offsets.astype(np.int64), sizes), faults

    def _name(self, wrong: NDArray[np.bool_], kind: str, what: str) -> Iterator[Fault]:
        """Yield one fault per entry, with the row that the entry names."""
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

    Returns:
        The placement of each field that has data, by the field's index, and the faults. Where
        there are faults, the placements must not be used to read.
    """
    allocations = _Allocations(tables)
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


def label_faults(labels: NDArray[np.int64]) -> list[Fault]:
    """Find labels that no set of classes reaches; loaders keep a name for each class."""
    return per_row(
        "label",
        np.flatnonzero(labels >= MAX_CLASSES),
        lambda row: f"its label is {labels[row]:,}, but labels must be below {MAX_CLASSES:,}",
    )


def _value_faults(tables: Tables, index: int, sizes: NDArray[np.int64]) -> list[Fault]:
    """Find values of one field that do not fit the size of its data."""
    field, column = tables.fields[index], tables.metadata[f"f{index}"]
    if field.kind == "image":
        return _image_faults(column, sizes)
    expected: Any = layout.array_bytes(field)
    if expected is None:
        expected = column["size"].astype(np.int64)
    expected = np.broadcast_to(expected, sizes.shape)
    return per_row(
        "size",
        np.flatnonzero(sizes != expected),
        lambda row: (
            f"its {field.name} should take {expected[row]:,} bytes, but the allocation "
            f"table gives {sizes[row]:,}"
        ),
    )


def _image_faults(image: NDArray[np.void], sizes: NDArray[np.int64]) -> list[Fault]:
    """Find image records with an unknown mode, no extent, or data of the wrong size."""
    mode, width, height = image["mode"], image["width"], image["height"]
    faults = per_row(
        "mode",
        np.flatnonzero(mode > layout.RAW),
        lambda row: f"its image has mode {mode[row]}, but must be 0 (jpg) or 1 (raw)",
    )
    faults += per_row(
        "extent",
        np.flatnonzero((width == 0) | (height == 0)),
        lambda row: f"its image is {width[row]} x {height[row]} pixels",
    )
    # 65,535 x 65,535 overflows uint16 and int32.
    pixels = width.astype(np.int64) * height
    wrong = np.where(mode == layout.RAW, sizes != 3 * pixels, sizes == 0)
    faults += per_row(
        "size",
        np.flatnonzero(wrong),
        lambda row: f"its image of {width[row]} x {height[row]} pixels takes {sizes[row]:,} bytes",
    )
    return faults


def per_row(kind: str, rows: NDArray[np.int64], describe: Callable[[int], str]) -> list[Fault]:
    """Return one fault per row, up to a number that can be read."""
    faults = [Fault(kind, describe(row), int(row)) for row in rows[:_MOST_ROWS_NAMED]]
    return [*faults, *_rest(kind, len(rows))]


def _rest(kind: str, count: int) -> Iterator[Fault]:
    """Count the faults that were not named."""
    if count > _MOST_ROWS_NAMED:
        yield Fault(kind, f"and {count - _MOST_ROWS_NAMED:,} more rows with this fault")
