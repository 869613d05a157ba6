"""The lossless rewrite to restart rows: the same coefficients, a restart marker after each row.

A decoder that wants some rows of the picture finds them without decoding those above; any other
decoder reads the file as before. Huffman tables are made for the image, which pays for the markers.
"""

import numpy as np
from numpy.typing import NDArray

from fastprune.errors import JpegError
from fastprune.jpeg.codes import LACKS_ROOM, MEANINGS, OK, UNSUPPORTED
from fastprune.jpeg.coefficients import count_symbols, read_coefficients, units_of, write_scan
from fastprune.jpeg.compiled import cached, source_digest
from fastprune.jpeg.frame import read_frame
from fastprune.jpeg.huffman import best_table
from fastprune.jpeg.scan import prepare_tables
from fastprune.jpeg.workspace import Workspace, make_workspace

_SPARE_BYTES = 4_096


def to_restart_rows(jpeg_bytes: bytes) -> bytes | None:
    """Rewrite a JPEG losslessly with a restart marker after each row of units.

    Args:
        jpeg_bytes: the whole file.

    Returns:
        A JPEG with the same coefficients, quantization tables and metadata segments; None where the
        view decoder does not know its kind (progressive, CMYK, 12 bits, ...) and the bytes are best
        kept as they are.

    Raises:
        JpegError: its entropy-coded data is damaged or truncated.
    """
    data = np.frombuffer(jpeg_bytes, np.uint8)
    work = make_workspace(
        file_bytes=2 * len(data) + _SPARE_BYTES, width=8, height=8, output_height=8, output_width=8
    )
    if _prepare(data, work) != OK or _units(work)[2] > len(data) * 8:
        return None
    coefficients = _coefficients(data, work)
    tables = _tables(coefficients, work.frame)
    scan = _scan(coefficients, work.frame, tables, len(data)) if tables else None
    if tables is None or scan is None:
        return None
    rewritten = _header(jpeg_bytes, tables, _units(work)[0]) + scan + b"\xff\xd9"
    again = np.frombuffer(rewritten, np.uint8)
    assert len(again) <= 2 * len(data) + _SPARE_BYTES
    code = _prepare(again, work)
    assert code == OK
    assert np.array_equal(_coefficients(again, work), coefficients)
    return rewritten


def _entries(digest: int):  # type: ignore[no-untyped-def]
    """Compiled entries, see `source_digest`."""

    def prepare(data, work):  # type: ignore[no-untyped-def]
        code = read_frame(data, work)
        return prepare_tables(work) if code == OK and digest != 0 else code

    def units(work):  # type: ignore[no-untyped-def]
        columns, rows, blocks = units_of(work.frame)
        return columns, rows, columns * rows * blocks + (digest == 0)

    def read(data, work, coefficients):  # type: ignore[no-untyped-def]
        return read_coefficients(data, work, coefficients) if digest != 0 else UNSUPPORTED

    def count(coefficients, frame, counts):  # type: ignore[no-untyped-def]
        return count_symbols(coefficients, frame, counts) if digest != 0 else UNSUPPORTED

    def write(coefficients, frame, codes, lengths, out):  # type: ignore[no-untyped-def]
        return write_scan(coefficients, frame, codes, lengths, out) if digest != 0 else -1

    return tuple(cached(entry) for entry in (prepare, units, read, count, write))


_prepare, _units, _read, _count, _write = _entries(source_digest())


def _coefficients(data: NDArray[np.uint8], work: Workspace) -> NDArray[np.int16]:
    """All coefficients of a file whose header has been read."""
    coefficients = np.empty(_units(work)[2] * 64, np.int16)
    code = _read(data, work, coefficients)
    assert code != LACKS_ROOM
    if code != OK:
        raise JpegError(
            f"the image cannot be rewritten: {MEANINGS[code]}. Get the file again, or leave it "
            "out with --on-error skip."
        )
    return coefficients


def _tables(
    coefficients: NDArray[np.int16], frame: NDArray[np.int64]
) -> list[tuple[list[int], list[int]]] | None:
    """The best DC and AC tables of the first component, then of the others if there are any."""
    counts = np.zeros((4, 256), np.int64)
    if _count(coefficients, frame, counts) != OK:
        return None
    return [best_table(row.tolist()) for row in counts if row.any()]


def _scan(
    coefficients: NDArray[np.int16],
    frame: NDArray[np.int64],
    tables: list[tuple[list[int], list[int]]],
    num_bytes: int,
) -> bytes | None:
    """The scan's data; None where it is out of all proportion to the original's."""
    codes, lengths = np.zeros((4, 256), np.int64), np.zeros((4, 256), np.int64)
    for number, (histogram, symbols) in enumerate(tables):
        code, place = 0, 0
        for length, count in enumerate(histogram, start=1):
            for symbol in symbols[place : place + count]:
                codes[number, symbol], lengths[number, symbol] = code, length
                code += 1
            place += count
            code <<= 1
    out = np.empty(2 * num_bytes + _SPARE_BYTES // 2, np.uint8)
    written = _write(coefficients, frame, codes, lengths, out)
    return None if written < 0 else out[:written].tobytes()


def _header(
    jpeg_bytes: bytes, tables: list[tuple[list[int], list[int]]], unit_columns: int
) -> bytes:
    """The original's segments up to the scan, with other Huffman tables and a restart interval."""
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
        bytes([(number % 2) << 4 | number // 2, *histogram, *symbols])
        for number, (histogram, symbols) in enumerate(tables)
    )
    parts.append(b"\xff\xc4" + (len(content) + 2).to_bytes(2) + content)
    parts.append(b"\xff\xdd\x00\x04" + unit_columns.to_bytes(2))
    scan = bytearray(jpeg_bytes[at:end])
    for component in range(scan[4]):
        scan[6 + 2 * component] = 0x11 if component else 0x00
    return b"".join(parts) + bytes(scan)
