"""The lossless rewrite to restart rows: the same coefficients, a restart marker after each row.

A decoder that wants some rows of the picture finds them without decoding the rows above; any other
decoder reads the file as before. AC symbols are copied bit for bit. DC values are coded again, with
tables made for the image, since a row begins without a prediction.
"""

import itertools
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastprune.base.errors import JpegError
from fastprune.jpeg.best_table import best_table
from fastprune.jpeg.blocks import NUM_CATEGORIES, find_blocks, has_same_blocks, write_rows
from fastprune.jpeg.frame import (
    AC_TABLE,
    COMPONENTS,
    read_frame,
)
from fastprune.jpeg.native import MEANINGS, OK, entry
from fastprune.jpeg.scan import mcu_grid, prepare_tables
from fastprune.jpeg.workspace import GUARD_BYTES, SPEC_BYTES, Workspace, make_workspace

_MOST_DC_BYTES = 4  # a code of 16 bits, a value of 15
_CHUNK_BYTES = 64  # are copied at a time, beyond the end too

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
        JpegError: its entropy-coded data is damaged or truncated; the caller adds the cure.
    """
    data = np.frombuffer(jpeg_bytes, np.uint8)
    work = make_workspace(file_bytes=len(data), width=8, height=8, output_height=8, output_width=8)
    code, mcus_per_row, num_blocks = _prepare(data, work)
    # A block takes two bits at least, one of DC and one of AC.
    if code != OK or num_blocks > len(data) * 8:
        return None
    blocks = _Blocks(*np.empty((3, num_blocks), np.int64))
    counts = np.zeros((2, 65), np.int64)
    code = _find_blocks(data, work, *blocks, counts)
    if code != OK:
        raise JpegError(f"the image cannot be rewritten: {MEANINGS[code]}")
    # Only damaged data has such differences, and no code for them.
    if counts[:, NUM_CATEGORIES:].any():
        return None
    tables = [best_table(row) for row in counts[:, :NUM_CATEGORIES].tolist() if any(row)]
    header = _header(jpeg_bytes, work, tables, mcus_per_row)
    rewritten = b"".join([header, _scan(work, blocks, tables), b"\xff\xd9"])
    return rewritten if _is_same(rewritten, work, blocks) else None


def _is_same(rewritten: bytes, work: Workspace, blocks: _Blocks) -> bool:
    """Whether a decoder finds the original's frame, tables and blocks in the new file."""
    data = np.frombuffer(rewritten, np.uint8)
    # What is built from the AC tables is shared, since they must be equal.
    again = work._replace(
        frame=np.zeros_like(work.frame),
        quantizers=np.zeros_like(work.quantizers),
        specs=np.zeros_like(work.specs),
        stream=np.empty(len(data) + GUARD_BYTES, np.uint8),
        starts=np.empty(len(data) // 2 + 2, np.int64),
    )
    code, _, num_blocks = _prepare(data, again)
    if code != OK or num_blocks != len(blocks.values):
        return False
    same: bool = _has_same_blocks(data, again, work, *blocks)
    return same


@entry()
def _prepare(data: Any, work: Any) -> Any:
    """Read the headers and build the tables; a code, MCUs in a row, and all blocks."""
    code = read_frame(data, work)
    if code == OK:
        code = prepare_tables(work)
    if code != OK:
        return code, 0, 0
    columns, rows, blocks = mcu_grid(work.frame)
    return code, columns, columns * rows * blocks


@entry()
def _find_blocks(data: Any, work: Any, values: Any, begins: Any, ends: Any, counts: Any) -> Any:
    return find_blocks(data, work, values, begins, ends, counts)


@entry()
def _write_rows(
    work: Any, values: Any, begins: Any, ends: Any, codes: Any, lengths: Any, row: Any, out: Any
) -> Any:
    return write_rows(work, values, begins, ends, codes, lengths, row, out)


@entry()
def _has_same_blocks(data: Any, again: Any, work: Any, values: Any, begins: Any, ends: Any) -> Any:
    return has_same_blocks(data, again, work, values, begins, ends)


def _scan(work: Workspace, blocks: _Blocks, tables: list[Table]) -> memoryview:
    """The scan's data."""
    codes, lengths = np.zeros((2, 2, NUM_CATEGORIES), np.int64)
    for number, (histogram, symbols) in enumerate(tables):
        # Canonical codes (T.81, C.2): consecutive numbers, doubled from a length to the next.
        code, ordered = 0, iter(symbols)
        for length, count in enumerate(histogram, start=1):
            for symbol in itertools.islice(ordered, count):
                codes[number, symbol], lengths[number, symbol] = code, length
                code += 1
            code <<= 1
    num_bytes = len(work.stream) + _MOST_DC_BYTES * len(blocks.values)
    row = np.empty(num_bytes + _CHUNK_BYTES, np.uint8)
    # Any byte may have to be stuffed, and a row of MCUs ends with a byte that is filled up and a
    # marker; memory that is not touched costs nothing.
    out = np.empty(2 * num_bytes + 3 * len(blocks.values) + _CHUNK_BYTES, np.uint8)
    written = _write_rows(work, *blocks, codes, lengths, row, out)
    return out[:written].data


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
        spec = work.specs[table * SPEC_BYTES : (table + 1) * SPEC_BYTES].tobytes()
        content += bytes([0x10 | (table - 4)]) + spec[: 16 + sum(spec[:16])]
    parts.append(b"\xff\xc4" + (len(content) + 2).to_bytes(2) + content)
    parts.append(b"\xff\xdd\x00\x04" + mcus_per_row.to_bytes(2))
    scan = bytearray(jpeg_bytes[at:end])
    for component, table in enumerate(ac_tables):
        scan[6 + 2 * component] = min(component, 1) << 4 | (table - 4)
    return b"".join(parts) + bytes(scan)
