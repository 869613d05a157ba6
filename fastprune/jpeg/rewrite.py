"""The lossless rewrite to restart rows: the same coefficients, a restart marker after each row.

A decoder that wants some rows of the picture finds them without decoding those above; any other
decoder reads the file as before. AC symbols are copied bit for bit. DC values are coded anew, since
a row begins without a value to differ from, with tables made for the image.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastprune.errors import JpegError
from fastprune.jpeg.blocks import (
    NUM_CATEGORIES,
    are_same,
    count_categories,
    find_blocks,
    write_rows,
)
from fastprune.jpeg.frame import AC_TABLE, COMPONENTS, read_frame
from fastprune.jpeg.huffman import best_table
from fastprune.jpeg.native import LACKS_ROOM, MEANINGS, OK, UNSUPPORTED, entry
from fastprune.jpeg.scan import mcu_grid, prepare_tables
from fastprune.jpeg.workspace import SPEC_BYTES, Workspace, make_workspace

_MOST_DC_BYTES = 4  # a code of 16 bits, a number of 15

Table = tuple[list[int], list[int]]


class _Blocks(NamedTuple):
    """All blocks of a scan, see `blocks.find_blocks`; (n,) int64 each."""

    values: NDArray[np.int64]
    begins: NDArray[np.int64]
    ends: NDArray[np.int64]


def to_restart_rows(jpeg_bytes: bytes) -> bytes | None:
    """Rewrite a JPEG losslessly with a restart marker after each row of MCUs.

    Args:
        jpeg_bytes: the whole file.

    Returns:
        A JPEG with the same coefficients, quantization tables and metadata segments; None where the
        view decoder does not know its kind (progressive, CMYK, 12 bits, ...) and the bytes are best
        kept as they are.

    Raises:
        JpegError: its entropy-coded data is damaged or truncated; the caller says what to do.
    """
    data = np.frombuffer(jpeg_bytes, np.uint8)
    work = _workspace(data)
    if _prepare(data, work) != OK:
        return None
    mcus_per_row, _, num_blocks = _units(work)
    if num_blocks > len(data) * 8:
        return None
    blocks = _blocks(num_blocks)
    code = _find(data, work, *blocks)
    if code == UNSUPPORTED:
        return None
    assert code != LACKS_ROOM
    if code != OK:
        raise JpegError(f"the image cannot be rewritten: {MEANINGS[code]}")
    counts = np.zeros((2, 256), np.int64)
    if _count(blocks.values, work.frame, counts) != OK:
        return None
    tables = [best_table(row.tolist()) for row in counts if row.any()]
    scan = _scan(work, blocks, tables, len(data))
    rewritten = _header(jpeg_bytes, work, tables, mcus_per_row) + scan + b"\xff\xd9"
    return rewritten if _is_same(rewritten, work, blocks) else None


def _is_same(rewritten: bytes, work: Workspace, blocks: _Blocks) -> bool:
    """Whether the new file has the old one's blocks; one that repeats a symbol's code has not."""
    data = np.frombuffer(rewritten, np.uint8)
    again, found = _workspace(data), _blocks(len(blocks.values))
    if _prepare(data, again) != OK or _find(data, again, *found) != OK:
        return False
    same: bool = _compare(work, blocks.begins, blocks.ends, again, found.begins, found.ends)
    return same and np.array_equal(blocks.values, found.values)


def _workspace(data: NDArray[np.uint8]) -> Workspace:
    """Room for a file's data."""
    return make_workspace(file_bytes=len(data), width=8, height=8, output_height=8, output_width=8)


def _blocks(count: int) -> _Blocks:
    """Room for so many blocks."""
    return _Blocks(*(np.empty(count, np.int64) for _ in range(3)))


@entry()
def _prepare(data: Any, work: Any) -> Any:
    code = read_frame(data, work)
    return prepare_tables(work) if code == OK else code


@entry()
def _units(work: Any) -> Any:
    columns, rows, blocks = mcu_grid(work.frame)
    return columns, rows, columns * rows * blocks


@entry()
def _find(data: Any, work: Any, values: Any, begins: Any, ends: Any) -> Any:
    return find_blocks(data, work, values, begins, ends)


@entry()
def _count(values: Any, frame: Any, counts: Any) -> Any:
    return count_categories(values, frame, counts)


@entry()
def _write(
    work: Any, values: Any, begins: Any, ends: Any, codes: Any, lengths: Any, out: Any
) -> Any:
    return write_rows(work.stream, work.frame, values, begins, ends, codes, lengths, out)


@entry()
def _compare(
    work: Any, begins: Any, ends: Any, again: Any, other_begins: Any, other_ends: Any
) -> Any:
    return are_same(work.stream, begins, ends, again.stream, other_begins, other_ends)


def _scan(work: Workspace, blocks: _Blocks, tables: list[Table], num_bytes: int) -> bytes:
    """The scan's data."""
    codes, lengths = (
        np.zeros((2, NUM_CATEGORIES), np.int64),
        np.zeros((2, NUM_CATEGORIES), np.int64),
    )
    for number, (histogram, symbols) in enumerate(tables):
        code, place = 0, 0
        for length, count in enumerate(histogram, start=1):
            for symbol in symbols[place : place + count]:
                codes[number, symbol], lengths[number, symbol] = code, length
                code += 1
            place += count
            code <<= 1
    # Any byte may have to be stuffed; memory that is not touched costs nothing.
    out = np.empty(2 * (num_bytes + (_MOST_DC_BYTES + 16) * len(blocks.values)), np.uint8)
    written = _write(work, *blocks, codes, lengths, out)
    assert written >= 0
    scan: bytes = out[:written].tobytes()
    return scan


def _header(jpeg_bytes: bytes, work: Workspace, tables: list[Table], mcus_per_row: int) -> bytes:
    """The original's segments up to the scan, with new DC tables and a restart interval."""
    parts, at = [b"\xff\xd8"], 2
    while True:
        while jpeg_bytes[at + 1] == 0xFF:
            at += 1
        marker = jpeg_bytes[at + 1]
        end = at + 2 + int.from_bytes(jpeg_bytes[at + 2 : at + 4])
        if marker == 0xDA:
            break
        if marker not in (0xC4, 0xDD):
            parts.append(jpeg_bytes[at:end])
        at = end
    content = b"".join(
        bytes([number, *histogram, *symbols]) for number, (histogram, symbols) in enumerate(tables)
    )
    ac_tables = work.frame[AC_TABLE : AC_TABLE + work.frame[COMPONENTS]].tolist()
    for table in sorted(set(ac_tables)):
        spec = work.specs[table * SPEC_BYTES : (table + 1) * SPEC_BYTES]
        num_symbols = int(spec[:16].sum(dtype=np.int64))
        content += bytes([0x10 | (table - 4)]) + spec[: 16 + num_symbols].tobytes()
    parts.append(b"\xff\xc4" + (len(content) + 2).to_bytes(2) + content)
    parts.append(b"\xff\xdd\x00\x04" + mcus_per_row.to_bytes(2))
    scan = bytearray(jpeg_bytes[at:end])
    for component, table in enumerate(ac_tables):
        scan[6 + 2 * component] = min(component, 1) << 4 | (table - 4)
    return b"".join(parts) + bytes(scan)
