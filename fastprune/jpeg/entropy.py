"""Huffman decoding of single blocks: the ones that are shown, and the ones that are skipped.

A reader is three uint64: `at`, the next byte of the stream; `bits`, a window onto the stream with
the next bit leftmost; `held`, how many bits of the window are valid. Both functions take a reader
and return it behind the block, with `at` 0 where the data is damaged. At most 64 symbols of 31 bits
are read for a block, so a caller that checks the end of the data after each block needs a guard of
256 bytes behind it.
"""

import numpy as np

from fastprune.jpeg.native import inlined
from fastprune.jpeg.stream import load_word
from fastprune.jpeg.tables import (
    ADVANCE_SHIFT,
    END_OF_BLOCK,
    FIRST_BITS_SHIFT,
    SECOND_ADVANCE_SHIFT,
    SECOND_VALUE_SHIFT,
    entry_of,
    receive_extend,
)
from fastprune.jpeg.workspace import (
    LIMIT_ITEMS,
    LOOKUP_BITS,
    LOOKUP_STRIDE,
    SKIP_BITS,
    SKIP_STRIDE,
    SPEC_BYTES,
    ZIGZAG,
)

# Numbers that meet a uint64 must be one, or Numba makes the result signed: shifts would copy the
# sign bit, and indices would be checked for being negative.
_ZERO, _THREE = np.uint64(0), np.uint64(3)
_SIX_BITS, _NINE_BITS, _BYTE = np.uint64(63), np.uint64(511), np.uint64(255)
# The window's next bits are its leftmost, so a shift to the right leaves a table's index.
_LOOKUP_SHIFT, _SKIP_SHIFT = np.uint64(64 - LOOKUP_BITS), np.uint64(64 - SKIP_BITS)
_SKIP_ADVANCE_SHIFT = np.uint64(6)
_REFILLED = np.uint64(56)

# A refilled reader holds at least 56 bits: three symbols of up to 18, or two steps of up to 12 bits
# of codes and 15 of the last one's additional bits. A fixed number for each refill needs no branch
# on what is left, which would be mispredicted often.
_SYMBOLS_A_REFILL = 3
_SKIPS_A_REFILL = 2


@inlined
def refilled(stream, at, bits, held):
    """The reader with at least 56 bits at hand.

    Source: F. Giesen, "Reading bits in far too many ways", variant 4.
    """
    # The next eight bytes go behind the bits held. Of the last one only a part may fit; it is read
    # again at the next refill, to the same bits, so ORing them in twice does no harm, and nothing
    # but this OR waits for `held`.
    bits |= load_word(stream, at) >> held
    # (63 - held) // 8 bytes fit whole. With them `held` lies in [56, 63] and its lower three bits
    # are what they were, so setting the bits of 56 is the addition.
    return at + ((_SIX_BITS - held) >> _THREE), bits, held | _REFILLED


@inlined
def _long_symbol(bits, work, table):
    """Find the entry of a symbol that the lookup does not hold; 0 for an invalid code."""
    # Canonical codes grow with their length: left-aligned to 16 bits, a code has `length` bits if
    # it is the first to lie below the end of that length's codes (T.81, figure F.16).
    code = np.int64(bits >> np.uint64(48))
    limit = table * LIMIT_ITEMS
    length = np.int64(1)
    while length <= 16 and code >= work.limits[limit + length]:
        length += 1
    if length > 16:
        return _ZERO
    # The second half of `limits` turns a code into the index of its symbol. Only a damaged table
    # leads out of the 256 symbols.
    index = (code >> (16 - length)) + work.limits[limit + 17 + length - 1]
    if index < 0 or index > 255:
        return _ZERO
    return np.uint64(entry_of(np.int64(work.specs[table * SPEC_BYTES + 16 + index]), length))


@inlined
def symbol_entry(bits, work, table):
    """Return the entry of the next symbol of any length; 0 for an invalid code."""
    entry = np.uint64(work.lookups[np.uint64(table * LOOKUP_STRIDE) + (bits >> _LOOKUP_SHIFT)])
    return entry if entry != _ZERO else _long_symbol(bits, work, table)


@inlined
def read_dc(work, at, bits, held, component, dc_table):
    """Read a block's DC value, which becomes the component's prediction."""
    at, bits, held = refilled(work.stream, at, bits, held)
    entry = symbol_entry(bits, work, dc_table)
    if entry == _ZERO:
        return _ZERO, bits, held
    # DC is coded as the difference from the component's block before.
    work.predictions[component] += receive_extend(bits, entry)
    # An entry's lowest byte is the bits of code and value together; a shift takes its low six bits.
    return at, bits << (entry & _SIX_BITS), held - (entry & _BYTE)


@inlined
def decode_block(work, at, bits, held, component, dc_table, ac_table, start):
    """Decode a block into the workspace's blocks, from `start` on."""
    blocks, pairs, stream = work.blocks, work.pairs, work.stream
    for i in range(64):
        blocks[start + np.uint64(i)] = 0
    at, bits, held = read_dc(work, at, bits, held, component, dc_table)
    if at == _ZERO:
        return _ZERO, bits, held
    blocks[start] = work.predictions[component]
    # Pairs exist for AC tables alone, which are numbers 4 to 7.
    base = np.uint64((ac_table - 4) * LOOKUP_STRIDE)
    zigzag = _ZERO
    while zigzag < _SIX_BITS:
        at, bits, held = refilled(stream, at, bits, held)
        for _ in range(_SYMBOLS_A_REFILL):
            entry = pairs[base + (bits >> _LOOKUP_SHIFT)]
            if entry == _ZERO:
                break
            zigzag += (entry >> ADVANCE_SHIFT) & _BYTE
            second = zigzag + ((entry >> SECOND_ADVANCE_SHIFT) & _BYTE)
            # Both are always written, since a branch would be mispredicted often. Without a second
            # symbol `second` is the first one's index, so what is written there is overwritten
            # next. An end of block adds END_OF_BLOCK, and ZIGZAG leads all beyond 63 to a spare
            # item.
            blocks[start + np.uint64(ZIGZAG[second])] = entry >> SECOND_VALUE_SHIFT
            blocks[start + np.uint64(ZIGZAG[zigzag])] = receive_extend(bits, entry)
            if zigzag >= _SIX_BITS:
                # The first symbol ended the block; what looks like a second is the next block's DC.
                length = (entry >> FIRST_BITS_SHIFT) & _SIX_BITS
                bits, held = bits << length, held - length
                break
            zigzag = second
            bits, held = bits << (entry & _SIX_BITS), held - (entry & _BYTE)
            if zigzag >= _SIX_BITS:
                break
        if entry == _ZERO:
            # A code of more than LOOKUP_BITS, or a symbol of more than MOST_BITS, for which a
            # refill of its own is needed: 16 bits of code and 15 of value.
            at, bits, held = refilled(stream, at, bits, held)
            entry = _long_symbol(bits, work, ac_table)
            if entry == _ZERO:
                return _ZERO, bits, held
            zigzag += entry >> ADVANCE_SHIFT
            blocks[start + np.uint64(ZIGZAG[zigzag])] = receive_extend(bits, entry)
            bits, held = bits << (entry & _SIX_BITS), held - (entry & _BYTE)
    # A whole block ends at 63 or by its symbol. Anything between is a run that leads out of it.
    if _SIX_BITS < zigzag < np.uint64(END_OF_BLOCK):
        return _ZERO, bits, held
    return at, bits, held


@inlined
def skip_block(work, at, bits, held, component, dc_table, ac_table):
    """Read over a block; only its DC value is noted, as the next block's prediction."""
    at, bits, held = read_dc(work, at, bits, held, component, dc_table)
    if at == _ZERO:
        return _ZERO, bits, held
    return skip_ac(work, at, bits, held, ac_table)


@inlined
def skip_ac(work, at, bits, held, ac_table):
    """Read over what follows the DC value of a block."""
    stream, skips = work.stream, work.skips
    base = np.uint64((ac_table - 4) * SKIP_STRIDE)
    zigzag = _ZERO
    while zigzag < _SIX_BITS:
        at, bits, held = refilled(stream, at, bits, held)
        for _ in range(_SKIPS_A_REFILL):
            step = np.uint64(skips[base + (bits >> _SKIP_SHIFT)])
            ahead = zigzag + (step >> _SKIP_ADVANCE_SHIFT)
            # An end of block counts 513, that is 1 modulo 512. So the test holds for a step whose
            # symbols stay in the block, with or without an end behind them, and fails for one
            # that joins symbols of the next block.
            is_single = step == _ZERO or (ahead & _NINE_BITS) > _SIX_BITS
            if is_single:
                break
            zigzag = ahead
            bits, held = bits << (step & _SIX_BITS), held - (step & _SIX_BITS)
            if zigzag >= _SIX_BITS:
                break
        if is_single:
            # A long code, or symbols joined beyond this block's end: one symbol alone.
            at, bits, held = refilled(stream, at, bits, held)
            entry = symbol_entry(bits, work, ac_table)
            zigzag += entry >> ADVANCE_SHIFT
            if entry == _ZERO or _SIX_BITS < zigzag < np.uint64(END_OF_BLOCK):
                return _ZERO, bits, held
            bits, held = bits << (entry & _SIX_BITS), held - (entry & _BYTE)
    return at, bits, held
