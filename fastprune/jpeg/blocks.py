"""Where the blocks of a scan lie, and the way back to a scan with a restart marker after each row.

A block is its DC value and the bits of its AC symbols, which are copied as they are. Coefficients
are not decoded, so they cannot change.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastprune.jpeg.entropy import read_dc, skip_ac, symbol_entry
from fastprune.jpeg.frame import (
    AC_TABLE,
    COMPONENTS,
    DC_TABLE,
    H_FACTOR,
    QUANTIZER,
    RESTART,
    SCAN,
    V_FACTOR,
)
from fastprune.jpeg.native import DAMAGED, OK, TRUNCATED, inlined, kernel
from fastprune.jpeg.scan import mcu_grid, position, start_interval
from fastprune.jpeg.stream import copy_chunk, load_word, store_word, unstuff
from fastprune.jpeg.tables import receive_extend
from fastprune.jpeg.workspace import SPEC_BYTES

NUM_CATEGORIES = 16  # a DC difference takes fewer bits (T.81, table F.1)
# From any bit of a byte on, the 64 bits at that byte hold at least this many, in whole bytes.
_STEP_BITS = 56
_ZERO, _SEVEN, _EIGHT = np.uint64(0), np.uint64(7), np.uint64(8)
_WHOLE_BYTES = np.uint64(56)


@kernel
def find_blocks(data, work, values, begins, ends, counts):
    """Find all blocks of a scan whose frame and tables are prepared; return a code.

    Block i, in scan order, has the DC value values[i]; its AC symbols are the bits from begins[i]
    to ends[i] of the workspace's stream. counts (2, 65) are how often each category of DC
    differences occurs, in luma and in chroma, when each row starts without a prediction.
    """
    frame = work.frame
    mcus_per_row, mcu_rows, blocks_per_mcu = mcu_grid(frame)
    luma_blocks = frame[H_FACTOR] * frame[V_FACTOR]
    num_mcus = mcus_per_row * mcu_rows
    restart = frame[RESTART] if frame[RESTART] > 0 else num_mcus
    code = unstuff(data, frame[SCAN], work.stream, work.starts, 0, (num_mcus - 1) // restart)
    if code != OK:
        return code
    reader, end = start_interval(work, 0)
    block, column = 0, 0
    for mcu in range(num_mcus):
        if mcu % restart == 0:
            reader, end = start_interval(work, mcu // restart)
        for i in range(blocks_per_mcu):
            component = max(i - luma_blocks + 1, 0)
            reader = read_dc(work, *reader, component, frame[DC_TABLE + component])
            if reader[0] == 0:
                return DAMAGED
            values[block] = work.predictions[component]
            begins[block] = position(reader)
            reader = skip_ac(work, *reader, frame[AC_TABLE + component])
            # The two faults are told apart block by block, so that each file has one of them.
            if reader[0] == 0 or position(reader) > end:
                return DAMAGED if reader[0] == 0 else TRUNCATED
            ends[block] = position(reader)
            difference = _difference(values, block, i, column, luma_blocks, blocks_per_mcu)
            counts[min(component, 1), _category_of(difference)] += 1
            block += 1
        column = column + 1 if column + 1 < mcus_per_row else 0
    return OK


@inlined
def _difference(values, block, i, column, luma_blocks, blocks_per_mcu):
    """The DC value of an MCU's block i less its prediction, where each row of MCUs begins at 0."""
    if 0 < i < luma_blocks:
        return values[block] - values[block - 1]
    if column == 0:
        return values[block]
    # The MCU before has as many blocks: its chroma block of the same component is as many back,
    # its last luma block lies behind its first.
    back = blocks_per_mcu - luma_blocks + 1 if i == 0 else blocks_per_mcu
    return values[block] - values[block - back]


@inlined
def _category_of(value):
    """How many bits a number takes (T.81, F.1.2.1)."""
    return 64 - _leading_zeros(np.uint64(abs(np.int64(value))))


@intrinsic
def _leading_zeros(typing_context, number):
    """How many bits of 64 are not set before the first that is; 64 for 0."""

    def generate(context, builder, signature, arguments):
        # The flag makes the result for 0 defined.
        return builder.ctlz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.uint64), generate


@kernel
def write_rows(work, values, begins, ends, codes, lengths, row_bytes, out):
    """Write the scan's data, a restart interval for each row of MCUs; return how many bytes.

    `codes` and `lengths` (2, 16) belong to the DC categories of luma and chroma. `row_bytes` has
    room for any row before stuffing.
    """
    mcus_per_row, mcu_rows, blocks_per_mcu = mcu_grid(work.frame)
    luma_blocks = work.frame[H_FACTOR] * work.frame[V_FACTOR]
    block, written = 0, 0
    for row in range(mcu_rows):
        writer = (_ZERO, _ZERO, _ZERO)
        for column in range(mcus_per_row):
            for i in range(blocks_per_mcu):
                difference = _difference(values, block, i, column, luma_blocks, blocks_per_mcu)
                table, category = np.int64(i >= luma_blocks), _category_of(difference)
                # A negative value is coded as itself less 1, without its higher bits.
                bits = difference if difference >= 0 else difference + (1 << category) - 1
                length = lengths[table, category] + category
                word = np.uint64(codes[table, category] << category | bits)
                writer = _put(row_bytes, writer, word << np.uint64(64 - length), length)
                writer = _put_copy(row_bytes, writer, work.stream, begins[block], ends[block])
                block += 1
        if row > 0:
            out[written], out[written + 1] = 0xFF, 0xD0 + (row - 1 & 7)
            written += 2
        written = _put_stuffed(out, written, row_bytes, _flushed(row_bytes, writer))
    return written


@inlined
def _put(target, writer, word, count):
    """Append the leftmost `count` bits of a word whose others are 0; from 1 to 56.

    A writer is three uint64: `at`, the byte that comes next; `bits`, up to seven that do not fill a
    byte, leftmost; `held`, how many they are.
    """
    at, bits, held = writer
    # All eight bytes are stored, and what does not fill a byte is stored again by the next call: no
    # branch on how many there are.
    bits |= word >> held
    store_word(target, at, bits)
    held += np.uint64(count)
    return at + (held >> np.uint64(3)), bits << (held & _WHOLE_BYTES), held & _SEVEN


@inlined
def _put_copy(target, writer, stream, begin, end):
    """Append the bits from `begin` to `end` of a stream, one at least."""
    while end - begin > _STEP_BITS:
        word = _word_at(stream, begin) >> _EIGHT << _EIGHT
        writer = _put(target, writer, word, _STEP_BITS)
        begin += _STEP_BITS
    beyond = np.uint64(64 - (end - begin))
    return _put(target, writer, _word_at(stream, begin) >> beyond << beyond, end - begin)


@inlined
def _word_at(stream, bit):
    """At least 57 bits of a stream, leftmost; zeros behind them."""
    return load_word(stream, np.uint64(bit >> 3)) << np.uint64(bit & 7)


@inlined
def _flushed(target, writer):
    """Fill the last byte with ones (T.81, F.1.2.3); return how many bytes there are."""
    at, bits, held = writer
    if held > 0:
        target[at] = (bits >> _WHOLE_BYTES) | (np.uint64(255) >> held)
        at += np.uint64(1)
    return np.int64(at)


@inlined
def _put_stuffed(out, written, source, length):
    """Append bytes with a zero behind each 0xFF; return how many bytes `out` has now."""
    at = 0
    while at < length:
        # Up to 64 bytes are copied, also from behind the end; what they leave is written over.
        run = min(copy_chunk(source, np.int64(at), out, np.int64(written)), length - at)
        at += run
        written += run
        if at < length and source[at] == 0xFF:
            out[written], out[written + 1] = 0xFF, 0
            at += 1
            written += 2
    return written


@kernel
def has_same_blocks(data, again, work, values, begins, ends):
    """Whether a rewritten file has the original's frame, tables and blocks; `again` is prepared.

    The DC values are decoded as any decoder would do it. AC symbols are not: bits that are equal to
    the original's, from the same point of a block on and with the same tables, are equal symbols,
    and they end where the original's do.
    """
    frame = again.frame
    if not _has_same_tables(work, again):
        return False
    mcus_per_row, mcu_rows, blocks_per_mcu = mcu_grid(frame)
    luma_blocks = frame[H_FACTOR] * frame[V_FACTOR]
    if unstuff(data, frame[SCAN], again.stream, again.starts, 0, mcu_rows - 1) != OK:
        return False
    block = 0
    for row in range(mcu_rows):
        bit, end = again.starts[row] * 8, again.starts[row + 1] * 8
        for component in range(3):
            again.predictions[component] = 0
        for _ in range(mcus_per_row):
            for i in range(blocks_per_mcu):
                component = max(i - luma_blocks + 1, 0)
                word = _word_at(again.stream, bit)
                entry = symbol_entry(word, again, frame[DC_TABLE + component])
                again.predictions[component] += receive_extend(word, entry)
                if entry == 0 or again.predictions[component] != values[block]:
                    return False
                bit += np.int64(entry & np.uint64(255))
                length = ends[block] - begins[block]
                if not _are_equal(work.stream, begins[block], again.stream, bit, length):
                    return False
                bit += length
                if bit > end:
                    return False
                block += 1
        # Less than a byte is left, which the writer has filled up.
        if end - bit > 7:
            return False
    return True


@kernel
def _has_same_tables(work, again):
    """Whether two files have equal frames, quantization tables and AC tables."""
    for item in range(len(work.frame)):
        # These are what a rewrite changes.
        is_new = item in (RESTART, SCAN) or DC_TABLE <= item < DC_TABLE + 3
        if work.frame[item] != again.frame[item] and not is_new:
            return False
    for component in range(work.frame[COMPONENTS]):
        start = work.frame[AC_TABLE + component] * SPEC_BYTES
        for i in range(start, start + SPEC_BYTES):
            if work.specs[i] != again.specs[i]:
                return False
        start = work.frame[QUANTIZER + component] * 64
        for i in range(start, start + 64):
            if work.quantizers[i] != again.quantizers[i]:
                return False
    return True


@inlined
def _are_equal(first, first_bit, second, second_bit, length):
    """Whether two runs of bits are equal."""
    different = _ZERO
    while length > _STEP_BITS:
        different |= (_word_at(first, first_bit) ^ _word_at(second, second_bit)) >> _EIGHT
        first_bit += _STEP_BITS
        second_bit += _STEP_BITS
        length -= _STEP_BITS
    # `length` is from 1 to 56, so that what is shifted out is not compared.
    last = _word_at(first, first_bit) ^ _word_at(second, second_bit)
    return different | last >> np.uint64(64 - length) == _ZERO
