"""Where the blocks of a scan lie, and the way back to a scan with a restart marker after each row.

A block is its DC value and a run of bits, those of its AC symbols, which are copied as they are. So
no coefficient is decoded, and none can change.
"""

import numpy as np

from fastprune.jpeg.entropy import skip_block
from fastprune.jpeg.frame import (
    AC_TABLE,
    COMPONENTS,
    DC_TABLE,
    RESTART,
    SCAN,
)
from fastprune.jpeg.native import (
    DAMAGED,
    LACKS_ROOM,
    OK,
    TRUNCATED,
    UNSUPPORTED,
    inlined,
    kernel,
)
from fastprune.jpeg.scan import mcu_grid, position, start_interval
from fastprune.jpeg.stream import load_word, unstuff
from fastprune.jpeg.workspace import SPEC_BYTES

NUM_CATEGORIES = 16  # a DC value's difference takes fewer bits
_WORD_BITS = 48  # what a word holds at least, from any bit of a byte on


@kernel
def find_blocks(data, work, values, begins, ends):
    """Find all blocks of a scan whose frame and tables are prepared; return a code.

    Block i, in scan order, has the DC value values[i]; its AC symbols are the bits from begins[i]
    to ends[i] of the workspace's stream.
    """
    frame = work.frame
    mcus_per_row, mcu_rows, blocks_per_mcu = mcu_grid(frame)
    total = mcus_per_row * mcu_rows
    if len(values) != total * blocks_per_mcu:
        return LACKS_ROOM
    restart = frame[RESTART] if frame[RESTART] > 0 else total
    code = unstuff(data, frame[SCAN], work.stream, work.starts, 0, (total - 1) // restart)
    if code != OK:
        return code
    reader, end = start_interval(work, 0)
    block = 0
    for mcu in range(total):
        if mcu % restart == 0:
            reader, end = start_interval(work, mcu // restart)
        for i in range(blocks_per_mcu):
            component = component_of(i, blocks_per_mcu, frame)
            dc_table, ac_table = frame[DC_TABLE + component], frame[AC_TABLE + component]
            before, start = work.predictions[component], position(reader)
            reader = skip_block(work, *reader, component, dc_table, ac_table)
            if reader[0] == 0 or position(reader) > end:
                return DAMAGED if reader[0] == 0 else TRUNCATED
            size = category_of(work.predictions[component] - before)
            if size >= NUM_CATEGORIES:
                return UNSUPPORTED
            values[block] = work.predictions[component]
            begins[block] = start + _code_length(work.specs, dc_table * SPEC_BYTES, size) + size
            ends[block] = position(reader)
            block += 1
    return OK


@inlined
def _code_length(specs, spec, symbol):
    """How many bits the code of a symbol has."""
    at = spec + 16
    for length in range(1, 17):
        for _ in range(specs[spec + length - 1]):
            if specs[at] == symbol:
                return length
            at += 1
    return 0


@inlined
def component_of(block, blocks_per_mcu, frame):
    """The component of an MCU's block: the first has all but one for each of the others."""
    return max(block - blocks_per_mcu + frame[COMPONENTS], 0)


@kernel
def count_categories(values, frame, counts):
    """Add up (2, 256): sizes of the DC differences of the first component, and of the others."""
    mcus_per_row, _, blocks_per_mcu = mcu_grid(frame)
    predictions = (np.int64(0), np.int64(0), np.int64(0))
    for block in range(len(values)):
        if block % (mcus_per_row * blocks_per_mcu) == 0:
            predictions = (np.int64(0), np.int64(0), np.int64(0))
        component = component_of(block % blocks_per_mcu, blocks_per_mcu, frame)
        size = category_of(values[block] - predictions[component])
        if size >= NUM_CATEGORIES:
            return UNSUPPORTED
        counts[min(component, 1), size] += 1
        predictions = _replaced(predictions, component, values[block])
    return OK


@kernel
def write_rows(stream, frame, values, begins, ends, codes, lengths, out):
    """Write the scan's data; return its bytes, -1 for no room.

    `codes` and `lengths` (2, 16) are those of DC sizes, for the first component and the others.
    """
    mcus_per_row, _, blocks_per_mcu = mcu_grid(frame)
    predictions = (np.int64(0), np.int64(0), np.int64(0))
    state = (np.int64(0), np.int64(0), np.int64(0))
    for block in range(len(values)):
        if block % (mcus_per_row * blocks_per_mcu) == 0:
            predictions = (np.int64(0), np.int64(0), np.int64(0))
            if block > 0:
                state = _flushed(out, state)
                marker = block // (mcus_per_row * blocks_per_mcu) - 1
                out[state[0]], out[state[0] + 1] = 0xFF, 0xD0 + (marker & 7)
                state = (state[0] + 2, np.int64(0), np.int64(0))
        # Each byte may have to be stuffed.
        if state[0] + 2 * ((ends[block] - begins[block]) // 8 + 16) > len(out):
            return -1
        component = component_of(block % blocks_per_mcu, blocks_per_mcu, frame)
        table = min(component, 1)
        difference = values[block] - predictions[component]
        size = category_of(difference)
        state = _put(out, state, codes[table, size], lengths[table, size])
        number = difference if difference >= 0 else difference + (1 << size) - 1
        state = _put(out, state, number, size)
        predictions = _replaced(predictions, component, values[block])
        bit, end = begins[block], ends[block]
        while bit < end:
            count = min(end - bit, np.int64(_WORD_BITS))
            state = _put(out, state, _bits_at(stream, bit, count), count)
            bit += count
    return _flushed(out, state)[0]


@kernel
def are_same(stream, begins, ends, other_stream, other_begins, other_ends):
    """Whether all blocks of two scans have the same bits of AC symbols."""
    for block in range(len(begins)):
        bit, end, other = begins[block], ends[block], other_begins[block]
        if end - bit != other_ends[block] - other:
            return False
        while bit < end:
            count = min(end - bit, np.int64(_WORD_BITS))
            if _bits_at(stream, bit, count) != _bits_at(other_stream, other, count):
                return False
            bit += count
            other += count
    return True


@inlined
def _bits_at(stream, bit, count):
    """From 1 to 48 bits of a stream as a number."""
    word = load_word(stream, np.uint64(bit >> 3)) << np.uint64(bit & 7)
    return np.int64(word >> np.uint64(64 - count))


@inlined
def category_of(value):
    """How many bits a number takes (T.81, F.1.2.1)."""
    size, rest = np.int64(0), abs(np.int64(value))
    while rest:
        rest >>= 1
        size += 1
    return size


@inlined
def _replaced(values, place, value):
    """A tuple of three with one of them changed."""
    return (
        value if place == 0 else values[0],
        value if place == 1 else values[1],
        value if place == 2 else values[2],
    )


@inlined
def _put(out, state, bits, count):
    """Append bits; the state is (bytes written, bits not yet written, their number)."""
    at, pending, held = state
    pending = pending << count | bits
    held += count
    while held >= 8:
        held -= 8
        byte = (pending >> held) & 255
        out[at] = byte
        at += 1
        if byte == 0xFF:
            out[at] = 0
            at += 1
    return at, pending & ((1 << held) - 1), held


@inlined
def _flushed(out, state):
    """Fill the last byte with ones."""
    gap = -state[2] & 7
    return _put(out, state, (1 << gap) - 1, gap)
