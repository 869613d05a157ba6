"""All coefficients of a JPEG, and the way back: symbols and bits, a restart marker after each row.

A block's 64 coefficients are in natural order, its DC value absolute. Blocks are in scan order.
"""

import numpy as np

from fastprune.jpeg.codes import DAMAGED, LACKS_ROOM, OK, TRUNCATED, UNSUPPORTED
from fastprune.jpeg.entropy import decode_block
from fastprune.jpeg.frame import (
    AC_TABLE,
    ACROSS,
    COMPONENTS,
    DC_TABLE,
    DOWN,
    HEIGHT,
    RESTART,
    SCAN,
    WIDTH,
)
from fastprune.jpeg.native import inlined, kernel
from fastprune.jpeg.scan import enter_interval, position
from fastprune.jpeg.stream import unstuff
from fastprune.jpeg.workspace import ZIGZAG

_MOST_BLOCK_BYTES = 512  # 64 symbols of 31 bits, each byte of them stuffed
_MOST_SIZE = 15


@kernel
def read_coefficients(data, work, coefficients):
    """Decode all blocks of a scan whose frame and tables are prepared; return a code."""
    frame = work.frame
    unit_columns, unit_rows, unit_blocks = units_of(frame)
    total = unit_columns * unit_rows
    if len(coefficients) != total * unit_blocks * 64:
        return LACKS_ROOM
    restart = frame[RESTART] if frame[RESTART] > 0 else total
    code = unstuff(data, frame[SCAN], work.stream, work.starts, 0, (total - 1) // restart)
    if code != OK:
        return code
    reader, end = enter_interval(work, 0)
    at = 0
    for unit in range(total):
        if unit % restart == 0:
            reader, end = enter_interval(work, unit // restart)
        for block in range(unit_blocks):
            component = max(block - unit_blocks + frame[COMPONENTS], 0)
            dc_table, ac_table = frame[DC_TABLE + component], frame[AC_TABLE + component]
            reader = decode_block(work, *reader, component, dc_table, ac_table, np.uint64(0))
            if reader[0] == 0 or position(reader) > end:
                return DAMAGED if reader[0] == 0 else TRUNCATED
            for i in range(64):
                coefficients[at + i] = work.blocks[i]
            at += 64
    return OK


@kernel
def units_of(frame):
    """Columns and rows of minimum coded units, and blocks in each."""
    columns = -(-frame[WIDTH] // (8 * frame[ACROSS]))
    rows = -(-frame[HEIGHT] // (8 * frame[DOWN]))
    return columns, rows, frame[ACROSS] * frame[DOWN] + frame[COMPONENTS] - 1


@kernel
def count_symbols(coefficients, frame, counts):
    """Add up (4, 256): DC and AC symbols of the first component, then of the others."""
    unit_columns, unit_rows, unit_blocks = units_of(frame)
    predictions = (np.int64(0), np.int64(0), np.int64(0))
    at = 0
    for unit in range(unit_columns * unit_rows):
        if unit % unit_columns == 0:
            predictions = (np.int64(0), np.int64(0), np.int64(0))
        for block in range(unit_blocks):
            component = max(block - unit_blocks + frame[COMPONENTS], 0)
            table = 2 if component else 0
            size = size_of(coefficients[at] - predictions[component])
            if size > _MOST_SIZE:
                return UNSUPPORTED
            counts[table, size] += 1
            predictions = replaced(predictions, component, np.int64(coefficients[at]))
            zeros = 0
            for place in range(1, 64):
                value = np.int64(coefficients[at + ZIGZAG[place]])
                if value == 0:
                    zeros += 1
                    continue
                size = size_of(value)
                if size > _MOST_SIZE:
                    return UNSUPPORTED
                counts[table + 1, 0xF0] += zeros >> 4
                counts[table + 1, (zeros & 15) << 4 | size] += 1
                zeros = 0
            if zeros:
                counts[table + 1, 0] += 1
            at += 64
    return OK


@kernel
def write_scan(coefficients, frame, codes, lengths, out):
    """Write the scan's data with codes and lengths (4, 256); return its bytes, -1 for no room."""
    unit_columns, unit_rows, unit_blocks = units_of(frame)
    predictions = (np.int64(0), np.int64(0), np.int64(0))
    state = (np.int64(0), np.int64(0), np.int64(0))
    at = 0
    for unit in range(unit_columns * unit_rows):
        if unit > 0 and unit % unit_columns == 0:
            predictions = (np.int64(0), np.int64(0), np.int64(0))
            state = _flushed(out, state)
            out[state[0]], out[state[0] + 1] = 0xFF, 0xD0 + ((unit // unit_columns - 1) & 7)
            state = (state[0] + 2, np.int64(0), np.int64(0))
        for block in range(unit_blocks):
            if state[0] + 2 * _MOST_BLOCK_BYTES > len(out):
                return -1
            component = max(block - unit_blocks + frame[COMPONENTS], 0)
            table = 2 if component else 0
            difference = coefficients[at] - predictions[component]
            size = size_of(difference)
            state = _put(out, state, codes[table, size], lengths[table, size])
            state = _put(out, state, _bits_of(difference, size), size)
            predictions = replaced(predictions, component, np.int64(coefficients[at]))
            zeros = 0
            for place in range(1, 64):
                value = np.int64(coefficients[at + ZIGZAG[place]])
                if value == 0:
                    zeros += 1
                    continue
                while zeros > 15:
                    state = _put(out, state, codes[table + 1, 0xF0], lengths[table + 1, 0xF0])
                    zeros -= 16
                size = size_of(value)
                symbol = zeros << 4 | size
                state = _put(out, state, codes[table + 1, symbol], lengths[table + 1, symbol])
                state = _put(out, state, _bits_of(value, size), size)
                zeros = 0
            if zeros:
                state = _put(out, state, codes[table + 1, 0], lengths[table + 1, 0])
            at += 64
    return _flushed(out, state)[0]


@inlined
def size_of(value):
    """How many bits a number takes (T.81, F.1.2.1)."""
    size, rest = np.int64(0), abs(np.int64(value))
    while rest:
        rest >>= 1
        size += 1
    return size


@inlined
def replaced(values, place, value):
    """A tuple of three with one of them changed."""
    return (
        value if place == 0 else values[0],
        value if place == 1 else values[1],
        value if place == 2 else values[2],
    )


@inlined
def _bits_of(value, size):
    """A number's bits as they are written behind its symbol."""
    return value if value >= 0 else value + (1 << size) - 1


@inlined
def _put(out, state, bits, count):
    """Append bits; the state is (bytes written, bits not yet written, their number)."""
    at, waiting, held = state
    waiting = waiting << count | bits
    held += count
    while held >= 8:
        held -= 8
        byte = (waiting >> held) & 255
        out[at] = byte
        at += 1
        if byte == 0xFF:
            out[at] = 0
            at += 1
    return at, waiting & ((1 << held) - 1), held


@inlined
def _flushed(out, state):
    """Fill the last byte with ones."""
    gap = -state[2] & 7
    return _put(out, state, (1 << gap) - 1, gap)
