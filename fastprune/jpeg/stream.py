"""The entropy-coded data as one stream of bits: without stuffing, restart intervals found."""

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

_CHUNK = 64
_END = -1


@intrinsic
def load_word_vector(typing_context, array, offset):
    """Eight bytes as a big-endian number."""

    def generate(context, builder, signature, arguments):
        at = pointer(context, builder, signature.args[0], *arguments)
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
def copy_chunk_vector(typing_context, source, start, target, target_start):
    """Copy 64 bytes; return where the first 0xFF is in them, 64 where there is none."""

    def generate(context, builder, signature, arguments):
        source_value, first, target_value, target_first = arguments
        at = pointer(context, builder, signature.args[0], source_value, first)
        chunk = load(builder, at, vector_type(8, _CHUNK))
        to = pointer(context, builder, signature.args[2], target_value, target_first)
        store(builder, chunk, to)
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
_copy_chunk = copy_chunk_vector if VECTORS else copy_chunk_plain


@kernel
def unstuff(data, start, stream, starts, first, last):
    """Copy restart intervals [first, last] of a scan into the stream, one after the other.

    Item i of `starts` becomes the first byte of interval first + i; one more item is the end.
    """
    if len(stream) < len(data) - start + GUARD_BYTES or len(starts) < 2:
        return LACKS_ROOM
    position, interval = start, 0
    while interval < first:
        # The bytes are copied to where they are overwritten later.
        position, _ = _copy_run(data, position, stream, 0)
        if position >= len(data) - 1:
            return TRUNCATED
        position, marker = _read_escape(data, position)
        if marker > 0:
            if marker != 0xD0 + (interval & 7):
                return TRUNCATED if marker == 0xD9 else DAMAGED
            interval += 1
    starts[0] = 0
    filled_bytes = 0
    while interval <= last:
        position, filled_bytes = _copy_run(data, position, stream, filled_bytes)
        if position >= len(data) - 1:
            break
        position, marker = _read_escape(data, position)
        if marker == 0:
            stream[filled_bytes] = 0xFF
            filled_bytes += 1
        elif marker > 0:
            if marker != 0xD0 + (interval & 7):
                break
            interval += 1
            if interval <= last:
                if interval - first + 1 >= len(starts):
                    return LACKS_ROOM
                starts[interval - first] = filled_bytes
    starts[min(interval, last) - first + 1] = filled_bytes
    for i in range(filled_bytes, filled_bytes + GUARD_BYTES):
        stream[i] = 0
    return OK if interval >= last else TRUNCATED


@inlined
def _copy_run(data, position, stream, filled_bytes):
    """Copy up to the next 0xFF or the data's end; return where both have got to."""
    end = len(data)
    while position + _CHUNK <= end:
        run = _copy_chunk(data, position, stream, filled_bytes)
        position += run
        filled_bytes += run
        if run < _CHUNK:
            return position, filled_bytes
    while position < end and data[position] != 0xFF:
        stream[filled_bytes] = data[position]
        position += 1
        filled_bytes += 1
    return position, filled_bytes


@inlined
def _read_escape(data, position):
    """What follows an 0xFF: 0 for a stuffed byte, _END for fill, else the marker."""
    following = np.int64(data[position + 1])
    if following == 0xFF:
        return position + 1, np.int64(_END)
    return position + 2, following
