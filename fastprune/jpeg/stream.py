"""The entropy-coded data as one stream of bits: without stuffing, restart intervals found.

In entropy-coded data an encoder stuffs a zero behind each byte 0xFF, so that an 0xFF with anything
else behind it is a marker (T.81, F.1.2.3). Without the zeros a reader can load eight bytes at once.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastprune.jpeg.native import (
    DAMAGED,
    LACKS_ROOM,
    OK,
    TRUNCATED,
    VECTORS,
    filled,
    inlined,
    kernel,
    load,
    pointer,
    store,
    vector_type,
)
from fastprune.jpeg.workspace import GUARD_BYTES

_CHUNK = 64  # a mask of its bytes is one number
_FILL = -1


@intrinsic
def load_word_vector(typing_context, array, offset):
    """Eight bytes as a big-endian number."""

    def generate(context, builder, signature, arguments):
        at = pointer(context, builder, signature.args[0], *arguments)
        # The first bit of the stream is the highest of its first byte.
        return builder.bswap(load(builder, at, ir.IntType(64)))

    return types.uint64(array, types.uint64), generate


@inlined
def load_word_plain(array, offset):
    """Eight bytes as a big-endian number, one by one."""
    word = np.uint64(0)
    for i in range(8):
        word = word << np.uint64(8) | np.uint64(array[offset + np.uint64(i)])
    return word


@intrinsic
def store_word_vector(typing_context, array, offset, word):
    """Store a number as eight bytes, big-endian."""

    def generate(context, builder, signature, arguments):
        array_value, offset_value, number = arguments
        at = pointer(context, builder, signature.args[0], array_value, offset_value)
        store(builder, builder.bswap(number), at)
        return context.get_dummy_value()

    return types.void(array, types.uint64, types.uint64), generate


@kernel
def store_word_plain(array, offset, word):
    """Store a number as eight bytes, big-endian, one by one."""
    for i in range(8):
        array[offset + np.uint64(i)] = word >> np.uint64(56 - 8 * i)


@intrinsic
def copy_chunk_vector(typing_context, source, start, target, target_start):
    """Copy 64 bytes; return where the first 0xFF is in them, 64 where there is none."""

    def generate(context, builder, signature, arguments):
        source_value, first, target_value, target_first = arguments
        at = pointer(context, builder, signature.args[0], source_value, first)
        chunk = load(builder, at, vector_type(8, _CHUNK))
        to = pointer(context, builder, signature.args[2], target_value, target_first)
        store(builder, chunk, to)
        # A vector of 64 truth values is the same 64 bits as a number, whose trailing zeros are the
        # bytes before the first 0xFF; 64 of them where there is none.
        found = builder.icmp_unsigned("==", chunk, filled(chunk.type, 0xFF))
        mask = builder.bitcast(found, ir.IntType(_CHUNK))
        return builder.cttz(mask, ir.Constant(ir.IntType(1), 0))

    return types.int64(source, types.int64, target, types.int64), generate


@kernel
def copy_chunk_plain(source, start, target, target_start):
    """The same, byte by byte."""
    first = _CHUNK
    for i in range(_CHUNK):
        target[target_start + i] = source[start + i]
        if source[start + i] == 0xFF and first == _CHUNK:
            first = i
    return first


load_word = load_word_vector if VECTORS else load_word_plain
store_word = store_word_vector if VECTORS else store_word_plain
copy_chunk = copy_chunk_vector if VECTORS else copy_chunk_plain


@kernel
def unstuff(data, start, stream, starts, first, last):
    """Copy restart intervals [first, last] of a scan into the stream, one after the other.

    Item i of `starts` becomes the first byte of interval first + i; one more item is the end.
    """
    # Checked once for all copies below: without stuffing the data is never longer.
    if len(stream) < len(data) - start + GUARD_BYTES or len(starts) < 2:
        return LACKS_ROOM
    position, interval = start, 0
    # Intervals are not listed anywhere: the markers before the first have to be counted. The
    # bytes are copied all the same, to where they are overwritten later, since copying and
    # searching 64 bytes is one step.
    while interval < first:
        position, _ = _copy_run(data, position, stream, 0)
        if position >= len(data) - 1:
            return TRUNCATED
        position, marker = _read_escape(data, position)
        if marker > 0:
            # Markers count up from RST0 (D0) to RST7 and again from RST0. 0xD9 is the image's end.
            if marker != 0xD0 + (interval & 7):
                return TRUNCATED if marker == 0xD9 else DAMAGED
            interval += 1
    starts[0] = 0
    length = 0
    while interval <= last:
        position, length = _copy_run(data, position, stream, length)
        # A last 0xFF without anything behind it is not an escape.
        if position >= len(data) - 1:
            break
        position, marker = _read_escape(data, position)
        if marker == 0:
            stream[length] = 0xFF
            length += 1
        elif marker > 0:
            # Whatever it is, the scan ends here; decoding finds out whether too early.
            if marker != 0xD0 + (interval & 7):
                break
            interval += 1
            if interval <= last:
                if interval - first + 1 >= len(starts):
                    return LACKS_ROOM
                starts[interval - first] = length
    starts[min(interval, last) - first + 1] = length
    # Readers look beyond the end. Zeros there are not from an earlier image, so a truncated file
    # gives the same result each time.
    for i in range(length, length + GUARD_BYTES):
        stream[i] = 0
    return OK if interval >= last else TRUNCATED


@inlined
def _copy_run(data, position, stream, length):
    """Copy up to the next 0xFF or the data's end; return where both have got to."""
    end = len(data)
    while position + _CHUNK <= end:
        # All 64 bytes are copied; those from the 0xFF on are overwritten by the next run.
        run = copy_chunk(data, position, stream, length)
        position += run
        length += run
        if run < _CHUNK:
            return position, length
    while position < end and data[position] != 0xFF:
        stream[length] = data[position]
        position += 1
        length += 1
    return position, length


@inlined
def _read_escape(data, position):
    """Read what follows an 0xFF: 0 for a stuffed byte, _FILL for fill, else the marker."""
    following = np.int64(data[position + 1])
    if following == 0xFF:
        # Any number of 0xFF may come before a marker (T.81, B.1.1.2): the second may begin one.
        return position + 1, np.int64(_FILL)
    return position + 2, following
