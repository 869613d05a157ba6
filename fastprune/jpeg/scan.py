"""From the scan to planes of samples, inside the crop alone.

What lies below the crop is not read. What lies above and left of it is passed over, or jumped over
where restart markers allow it.
"""

import numpy as np

from fastprune.jpeg.codes import DAMAGED, OK, TRUNCATED
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
from fastprune.jpeg.idct import inverse_dct
from fastprune.jpeg.native import inlined, kernel
from fastprune.jpeg.stream import unstuff
from fastprune.jpeg.tables import prepare_lookup, prepare_skips
from fastprune.jpeg.workspace import PAD, PADDED_BLOCK


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
    interval, unit = np.int64(-1), np.int64(0)
    bit, end = np.uint64(0), np.uint64(0)
    for row in range(rows):
        begin = first_unit + row * unit_columns
        if begin // restart != interval:
            interval = begin // restart
            unit = interval * restart
            bit, end = enter_interval(work, interval - first_interval)
        while unit < begin:
            bit = _skip_unit(work, bit)
            if bit == 0 or bit > end:
                return DAMAGED if bit == 0 else TRUNCATED
            unit += 1
        for column in range(columns):
            if unit == (interval + 1) * restart:
                interval += 1
                bit, end = enter_interval(work, interval - first_interval)
            bit = _decode_unit(work, bit, row, column)
            if bit == 0 or bit > end:
                return DAMAGED if bit == 0 else TRUNCATED
            unit += 1
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
    """Forget the DC values; return the bits at which an interval begins and ends."""
    for component in range(3):
        work.predictions[component] = 0
    starts = work.starts
    return np.uint64(starts[interval] * 8), np.uint64(starts[interval + 1] * 8)


@inlined
def _skip_unit(work, bit):
    """Pass over one unit; return the bit behind it, 0 where it is damaged."""
    frame = work.frame
    for component in range(frame[COMPONENTS]):
        blocks = frame[ACROSS] * frame[DOWN] if component == 0 else 1
        dc_table, ac_table = frame[DC_TABLE + component], frame[AC_TABLE + component]
        for _ in range(blocks):
            bit = skip_block(work, bit, component, dc_table, ac_table)
            if bit == 0:
                return bit
    return bit


@inlined
def _decode_unit(work, bit, row, column):
    """Decode one unit into the planes; return the bit behind it, 0 where it is damaged."""
    frame = work.frame
    for component in range(frame[COMPONENTS]):
        across = frame[ACROSS] if component == 0 else 1
        down = frame[DOWN] if component == 0 else 1
        dc_table, ac_table = frame[DC_TABLE + component], frame[AC_TABLE + component]
        quantizer = frame[QUANTIZER + component] * PADDED_BLOCK
        stride = frame[STRIDE + component]
        corner = frame[PLANE + component] + column * across * 8 * stride + row * down * 8
        for y in range(down):
            for x in range(across):
                bit = decode_block(work, bit, component, dc_table, ac_table, quantizer)
                if bit == 0:
                    return bit
                inverse_dct(work.block, work.planes, corner + x * 8 * stride + y * 8, stride)
    return bit
