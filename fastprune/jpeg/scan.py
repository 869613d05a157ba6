"""From the scan to planes of samples, inside the crop alone.

What lies below the crop is not read. What lies above and left of it is passed over, or jumped over
where restart markers allow it.
"""

import numpy as np

from fastprune.jpeg.entropy import decode_block, skip_block
from fastprune.jpeg.frame import (
    AC_TABLE,
    ACROSS,
    COMPONENTS,
    DC_TABLE,
    DOWN,
    HEIGHT,
    PLANE,
    QUANTIZER,
    RESTART,
    SCAN,
    STRIDE,
    WIDTH,
)
from fastprune.jpeg.idct import inverse_dct_pair
from fastprune.jpeg.native import (
    DAMAGED,
    OK,
    TRUNCATED,
    inlined,
    kernel,
)
from fastprune.jpeg.stream import unstuff
from fastprune.jpeg.tables import prepare_lookup, prepare_skips
from fastprune.jpeg.workspace import PAD, PADDED_BLOCK

_ZERO = np.uint64(0)


@kernel
def prepare_tables(work):
    """Build the tables that the scan names; return a code."""
    for component in range(work.frame[COMPONENTS]):
        code = prepare_lookup(work, work.frame[DC_TABLE + component])
        if code == OK:
            code = prepare_lookup(work, work.frame[AC_TABLE + component])
        if code != OK:
            return code
        prepare_skips(work, work.frame[AC_TABLE + component])
    return OK


@kernel
def decode_units(data, work, first_row, rows, first_column, columns):
    """Decode a rectangle of the image's minimum coded units into planes; return a code.

    The planes lie one after the other in `work.planes`, transposed: a column of samples is
    contiguous. The frame's PLANE and STRIDE say where they are.
    """
    frame = work.frame
    unit_columns = -(-frame[WIDTH] // (8 * frame[ACROSS]))
    total = unit_columns * -(-frame[HEIGHT] // (8 * frame[DOWN]))
    restart = frame[RESTART] if frame[RESTART] > 0 else total
    first_unit = first_row * unit_columns + first_column
    last_unit = first_unit + (rows - 1) * unit_columns + columns - 1
    first_interval = first_unit // restart
    code = unstuff(
        data, frame[SCAN], work.stream, work.starts, first_interval, last_unit // restart
    )
    if code != OK:
        return code
    _lay_out_planes(frame, rows, columns)
    interval, unit, end = np.int64(-1), np.int64(0), np.int64(0)
    reader = (_ZERO, _ZERO, _ZERO)
    target = (np.int64(0), np.int64(0), frame[STRIDE])
    waiting = (np.int64(0), target, target)
    for row in range(rows):
        begin = first_unit + row * unit_columns
        if begin // restart != interval:
            interval = begin // restart
            unit = interval * restart
            reader, end = enter_interval(work, interval - first_interval)
        while unit < begin:
            reader = _skip_unit(work, reader)
            if reader[0] == 0 or position(reader) > end:
                return DAMAGED if reader[0] == 0 else TRUNCATED
            unit += 1
        for column in range(columns):
            if unit == (interval + 1) * restart:
                interval += 1
                reader, end = enter_interval(work, interval - first_interval)
            reader, waiting = _decode_unit(work, reader, waiting, row, column)
            if reader[0] == 0 or position(reader) > end:
                return DAMAGED if reader[0] == 0 else TRUNCATED
            unit += 1
    _transform_last(work, waiting)
    return OK


@kernel
def _lay_out_planes(frame, rows, columns):
    """Say where each component's plane begins and how far apart its columns are."""
    start = 0
    for component in range(frame[COMPONENTS]):
        across = frame[ACROSS] if component == 0 else 1
        down = frame[DOWN] if component == 0 else 1
        frame[PLANE + component] = start
        frame[STRIDE + component] = rows * down * 8 + PAD
        start += frame[STRIDE + component] * columns * across * 8


@inlined
def enter_interval(work, interval):
    """Forget the DC values; return a reader at an interval's begin, and the bit at its end."""
    for component in range(3):
        work.predictions[component] = 0
    starts = work.starts
    return (np.uint64(starts[interval]), _ZERO, _ZERO), starts[interval + 1] * 8


@inlined
def position(reader):
    """The bit of the stream that a reader has got to."""
    return np.int64(reader[0]) * 8 - np.int64(reader[2])


@inlined
def _skip_unit(work, reader):
    """Pass over one unit; return the reader behind it, at 0 where it is damaged."""
    frame = work.frame
    for component in range(frame[COMPONENTS]):
        blocks = frame[ACROSS] * frame[DOWN] if component == 0 else 1
        dc_table, ac_table = frame[DC_TABLE + component], frame[AC_TABLE + component]
        for _ in range(blocks):
            reader = skip_block(work, *reader, component, dc_table, ac_table)
            if reader[0] == 0:
                return reader
    return reader


@inlined
def _decode_unit(work, reader, waiting, row, column):
    """Decode one unit into the planes; return the reader behind it and the blocks that wait.

    Blocks are transformed in pairs, and not before the block behind a pair has been decoded: what
    was written last is still on its way to memory, and the transform would wait for it.
    """
    frame = work.frame
    for component in range(frame[COMPONENTS]):
        across = frame[ACROSS] if component == 0 else 1
        down = frame[DOWN] if component == 0 else 1
        dc_table, ac_table = frame[DC_TABLE + component], frame[AC_TABLE + component]
        quantizer = frame[QUANTIZER + component] * 64
        stride = frame[STRIDE + component]
        corner = frame[PLANE + component] + column * across * 8 * stride + row * down * 8
        for y in range(down):
            for x in range(across):
                number, first, second = waiting
                start = np.uint64(_place_of(number))
                reader = decode_block(work, *reader, component, dc_table, ac_table, start)
                if reader[0] == 0:
                    return reader, waiting
                target = (quantizer, corner + x * 8 * stride + y * 8, stride)
                if number & 1:
                    waiting = (number + 1, first, target)
                else:
                    _transform(work, number - 2, first, second)
                    waiting = (number + 1, target, second)
    return reader, waiting


@inlined
def _place_of(number):
    """Where in the workspace's blocks one is decoded: the last four are kept."""
    return (number & 3) * PADDED_BLOCK


@inlined
def _transform(work, number, first, second):
    """Transform the block of this number and the one behind it."""
    place = _place_of(number)
    inverse_dct_pair(work.blocks, place, work.quantizers, work.planes, first, second)


@inlined
def _transform_last(work, waiting):
    """Transform what waits at the end: a pair, or one block, beside which anything may be."""
    number, first, second = waiting
    if number & 1:
        _transform(work, number - 1, first, first)
    else:
        _transform(work, number - 2, first, second)
