"""From the scan to planes of samples, inside the crop alone.

A scan is a sequence of minimum coded units (MCUs): 8 or 16 pixels a side, a block of each chroma
component and up to four of luma. What lies below the crop is not read. What lies above and left of
it is skipped block by block, or jumped over where restart markers allow it.
"""

import numpy as np

from fastprune.jpeg.entropy import decode_block, skip_block
from fastprune.jpeg.frame import (
    AC_TABLE,
    COMPONENTS,
    DC_TABLE,
    H_FACTOR,
    HEIGHT,
    PLANE,
    QUANTIZER,
    RESTART,
    SCAN,
    STRIDE,
    V_FACTOR,
    WIDTH,
    sampling_factors,
)
from fastprune.jpeg.idct import inverse_dct_pair
from fastprune.jpeg.native import DAMAGED, OK, TRUNCATED, inlined, kernel
from fastprune.jpeg.stream import unstuff
from fastprune.jpeg.tables import prepare_lookup, prepare_skips
from fastprune.jpeg.workspace import BLOCK_STRIDE, PAD

_ZERO = np.uint64(0)  # not a plain 0, which would make a reader's numbers signed


@kernel
def prepare_tables(work):
    """Build the tables that the scan names; return a code."""
    for component in range(work.frame[COMPONENTS]):
        # Components may share a table; the second time it is found to be built.
        code = prepare_lookup(work, work.frame[DC_TABLE + component])
        if code == OK:
            code = prepare_lookup(work, work.frame[AC_TABLE + component])
        if code != OK:
            return code
        prepare_skips(work, work.frame[AC_TABLE + component])
    return OK


@kernel
def decode_mcus(data, work, first_row, rows, first_column, columns):
    """Decode a rectangle of the image's MCUs into planes; return a code.

    The planes lie one after the other in `work.planes`, transposed: a column of samples is
    contiguous. The frame's PLANE and STRIDE locate them.
    """
    frame = work.frame
    mcus_per_row, mcu_rows, _ = mcu_grid(frame)
    first_mcu = first_row * mcus_per_row + first_column
    last_mcu = first_mcu + (rows - 1) * mcus_per_row + columns - 1
    # Without restart markers the whole scan is one interval. With a marker after each row of MCUs,
    # as rewrite.py sets them, nothing above the crop is decoded.
    restart = frame[RESTART] if frame[RESTART] > 0 else mcus_per_row * mcu_rows
    first_interval = first_mcu // restart
    code = unstuff(data, frame[SCAN], work.stream, work.starts, first_interval, last_mcu // restart)
    if code != OK:
        return code
    _lay_out_planes(frame, rows, columns)
    # Where the reader is: the next MCU, its interval, and the bit at which that ends. Plain numbers
    # and tuples stay in registers.
    mcu, interval, end = np.int64(0), np.int64(-1), np.int64(0)
    reader = (_ZERO, _ZERO, _ZERO)
    target = (np.int64(0), np.int64(0), frame[STRIDE])
    pending = (np.int64(0), target, target)
    for row in range(rows):
        begin = first_mcu + row * mcus_per_row
        if begin // restart != interval:
            # What lies between, to the right of the crop or in rows of markers above it, is jumped.
            interval = begin // restart
            mcu = interval * restart
            reader, end = start_interval(work, interval - first_interval)
        code, reader = _skip_mcus(work, reader, end, begin - mcu)
        if code != OK:
            return code
        mcu = begin
        for column in range(columns):
            # Intervals may end anywhere in a row.
            if mcu == (interval + 1) * restart:
                interval += 1
                reader, end = start_interval(work, interval - first_interval)
            reader, pending = _decode_mcu(work, reader, pending, row, column)
            # A valid code was found beyond the interval's end: bits of the next one, or the guard.
            if reader[0] == 0 or position(reader) > end:
                return DAMAGED if reader[0] == 0 else TRUNCATED
            mcu += 1
    _transform_last(work, pending)
    return OK


@kernel
def read_scan(data, work):
    """Read over all MCUs of the image, which finds all damage; return a code."""
    frame = work.frame
    mcus_per_row, mcu_rows, _ = mcu_grid(frame)
    num_mcus = mcus_per_row * mcu_rows
    restart = frame[RESTART] if frame[RESTART] > 0 else num_mcus
    last_interval = (num_mcus - 1) // restart
    code = unstuff(data, frame[SCAN], work.stream, work.starts, 0, last_interval)
    for interval in range(last_interval + 1):
        if code != OK:
            return code
        reader, end = start_interval(work, interval)
        count = min(restart, num_mcus - interval * restart)
        code, _ = _skip_mcus(work, reader, end, count)
    return code


@kernel
def mcu_grid(frame):
    """Columns and rows of MCUs, and the blocks in each."""
    columns = -(-frame[WIDTH] // (8 * frame[H_FACTOR]))
    rows = -(-frame[HEIGHT] // (8 * frame[V_FACTOR]))
    return columns, rows, frame[H_FACTOR] * frame[V_FACTOR] + frame[COMPONENTS] - 1


@kernel
def _lay_out_planes(frame, rows, columns):
    """Say where each component's plane begins and how far apart its columns are."""
    start = 0
    for component in range(frame[COMPONENTS]):
        h_factor, v_factor = sampling_factors(frame, component)
        frame[PLANE + component] = start
        # The resize reads up to PAD - 1 samples behind a column.
        frame[STRIDE + component] = rows * v_factor * 8 + PAD
        start += frame[STRIDE + component] * columns * h_factor * 8


@inlined
def start_interval(work, interval):
    """Forget the DC values; return a reader at an interval's begin, and the bit at its end.

    `interval` counts from the first in the stream.
    """
    for component in range(3):
        work.predictions[component] = 0
    starts = work.starts
    # A reader with no bits at hand: the next block refills it.
    return (np.uint64(starts[interval]), _ZERO, _ZERO), starts[interval + 1] * 8


@inlined
def position(reader):
    """The bit of the stream at which a reader is."""
    return np.int64(reader[0]) * 8 - np.int64(reader[2])


@inlined
def _skip_mcus(work, reader, end, count):
    """Read over MCUs of one interval; return a code and the reader behind them."""
    frame = work.frame
    for _ in range(count):
        for component in range(frame[COMPONENTS]):
            h_factor, v_factor = sampling_factors(frame, component)
            dc_table, ac_table = frame[DC_TABLE + component], frame[AC_TABLE + component]
            for _ in range(h_factor * v_factor):
                reader = skip_block(work, *reader, component, dc_table, ac_table)
                if reader[0] == 0:
                    return DAMAGED, reader
        # Once per MCU is enough: the guard behind the stream has room for what its blocks can read.
        if position(reader) > end:
            return TRUNCATED, reader
    return OK, reader


@inlined
def _decode_mcu(work, reader, pending, row, column):
    """Decode one MCU into the planes; return the reader behind it and the pending blocks.

    Blocks are transformed in pairs, and not before the block behind a pair has been decoded: what
    was written last is still on its way to memory, and the transform would wait for it. `pending`
    is the number of blocks decoded so far and the targets of the last two.
    """
    frame = work.frame
    for component in range(frame[COMPONENTS]):
        h_factor, v_factor = sampling_factors(frame, component)
        dc_table, ac_table = frame[DC_TABLE + component], frame[AC_TABLE + component]
        quantizer = frame[QUANTIZER + component] * 64
        stride = frame[STRIDE + component]
        # Planes are transposed, so columns are a stride apart and rows one byte.
        corner = frame[PLANE + component] + column * h_factor * 8 * stride + row * v_factor * 8
        for y in range(v_factor):
            for x in range(h_factor):
                number, first, second = pending
                start = np.uint64(_slot_of(number))
                reader = decode_block(work, *reader, component, dc_table, ac_table, start)
                if reader[0] == 0:
                    return reader, pending
                target = (quantizer, corner + x * 8 * stride + y * 8, stride)
                if number & 1:
                    # This block completes a pair, which waits for the next block.
                    pending = (number + 1, first, target)
                else:
                    # The first of a pair: the pair before it is due. Before the very first block
                    # that is blocks -2 and -1, nothing, at the corner that it overwrites later.
                    _transform(work, number - 2, first, second)
                    pending = (number + 1, target, second)
    return reader, pending


@inlined
def _slot_of(number):
    """Where in the workspace's blocks one is decoded: the last four are kept."""
    return (number & 3) * BLOCK_STRIDE


@inlined
def _transform(work, number, first, second):
    """Transform the block of this number and the one behind it."""
    slot = _slot_of(number)
    inverse_dct_pair(work.blocks, slot, work.quantizers, work.planes, first, second)


@inlined
def _transform_last(work, pending):
    """Transform what is pending at the end."""
    number, first, second = pending
    if number & 1:
        # A single block: the slot beside it may hold anything, which goes to the same target before
        # the block itself does.
        _transform(work, number - 1, first, first)
    else:
        _transform(work, number - 2, first, second)
