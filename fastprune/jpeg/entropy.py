"""Huffman decoding of single blocks: the ones that are shown, and the ones that are passed over.

A reader is three numbers: `at`, the next byte of the stream; `bits`, those at hand, leftmost first;
`held`, how many they are. Both functions take a reader and return it behind the block, with `at` 0
where the data is damaged. At most 64 symbols of 31 bits are read for a block, so a caller that
checks the end of the data after each block needs a guard of 256 bytes behind it.
"""

import numpy as np

from fastprune.jpeg.native import inlined
from fastprune.jpeg.stream import load_word
from fastprune.jpeg.tables import (
    END_OF_BLOCK,
    FIRST_BITS_AT,
    PLACES_AT,
    SECOND_NUMBER_AT,
    SECOND_PLACES_AT,
    entry_of,
    number_of,
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

# Numbers that meet a uint64 must be one, or Numba makes the result signed.
_ZERO, _THREE = np.uint64(0), np.uint64(3)
_SIX_BITS, _NINE_BITS, _BYTE = np.uint64(63), np.uint64(511), np.uint64(255)
_LOOKUP_SHIFT, _SKIP_SHIFT = np.uint64(64 - LOOKUP_BITS), np.uint64(64 - SKIP_BITS)
_SKIP_PLACES_AT = np.uint64(6)
_REFILLED = np.uint64(56)

# A refilled reader holds at least 56 bits: three symbols of up to 18, or two steps of up to 12 bits
# of codes and 15 of the last one's number. A fixed number for each refill needs no branch, which
# would be mispredicted often.
_SYMBOLS_A_REFILL = 3
_SKIPS_A_REFILL = 2


@inlined
def refilled(stream, at, bits, held):
    """The reader with at least 56 bits at hand.

    Bytes that fit in part are read again, to the same bits, so nothing waits for the shift alone.
    Source: F. Giesen, "Reading bits in far too many ways", variant 4.
    """
    bits |= load_word(stream, at) >> held
    return at + ((_SIX_BITS - held) >> _THREE), bits, held | _REFILLED


@inlined
def _long_symbol(bits, work, table):
    """The entry of a symbol that the lookup does not hold; 0 where there is no such code."""
    code = np.int64(bits >> np.uint64(48))
    limit = table * LIMIT_ITEMS
    length = np.int64(1)
    while length <= 16 and code >= work.limits[limit + length]:
        length += 1
    if length > 16:
        return _ZERO
    place = (code >> (16 - length)) + work.limits[limit + 17 + length - 1]
    if place < 0 or place > 255:
        return _ZERO
    return np.uint64(entry_of(np.int64(work.specs[table * SPEC_BYTES + 16 + place]), length))


@inlined
def _symbol(bits, work, table):
    """The entry of the next symbol of any length; 0 where there is no such code."""
    entry = np.uint64(work.lookups[np.uint64(table * LOOKUP_STRIDE) + (bits >> _LOOKUP_SHIFT)])
    return entry if entry != _ZERO else _long_symbol(bits, work, table)


@inlined
def decode_block(work, at, bits, held, component, dc_table, ac_table, start):
    """Decode a block into the workspace's blocks, from `start` on."""
    blocks, pairs, stream = work.blocks, work.pairs, work.stream
    for i in range(64):
        blocks[start + np.uint64(i)] = 0
    at, bits, held = refilled(stream, at, bits, held)
    entry = _symbol(bits, work, dc_table)
    if entry == _ZERO:
        return _ZERO, bits, held
    work.predictions[component] += number_of(bits, entry)
    blocks[start] = work.predictions[component]
    bits, held = bits << (entry & _SIX_BITS), held - (entry & _BYTE)
    base = np.uint64((ac_table - 4) * LOOKUP_STRIDE)
    place = _ZERO
    while place < _SIX_BITS:
        at, bits, held = refilled(stream, at, bits, held)
        for _ in range(_SYMBOLS_A_REFILL):
            entry = pairs[base + (bits >> _LOOKUP_SHIFT)]
            if entry == _ZERO:
                break
            place += (entry >> PLACES_AT) & _BYTE
            second = place + ((entry >> SECOND_PLACES_AT) & _BYTE)
            # Without a second symbol this is the first one's place, which is written next.
            blocks[start + np.uint64(ZIGZAG[second])] = entry >> SECOND_NUMBER_AT
            blocks[start + np.uint64(ZIGZAG[place])] = number_of(bits, entry)
            if place >= _SIX_BITS:
                length = (entry >> FIRST_BITS_AT) & _SIX_BITS
                bits, held = bits << length, held - length
                break
            place = second
            bits, held = bits << (entry & _SIX_BITS), held - (entry & _BYTE)
            if place >= _SIX_BITS:
                break
        if entry == _ZERO:
            at, bits, held = refilled(stream, at, bits, held)
            entry = _long_symbol(bits, work, ac_table)
            if entry == _ZERO:
                return _ZERO, bits, held
            place += entry >> PLACES_AT
            blocks[start + np.uint64(ZIGZAG[place])] = number_of(bits, entry)
            bits, held = bits << (entry & _SIX_BITS), held - (entry & _BYTE)
    if _SIX_BITS < place < np.uint64(END_OF_BLOCK):
        return _ZERO, bits, held
    return at, bits, held


@inlined
def skip_block(work, at, bits, held, component, dc_table, ac_table):
    """Pass over a block; only its DC value is noted, for the blocks that follow."""
    stream, skips = work.stream, work.skips
    at, bits, held = refilled(stream, at, bits, held)
    entry = _symbol(bits, work, dc_table)
    if entry == _ZERO:
        return _ZERO, bits, held
    work.predictions[component] += number_of(bits, entry)
    bits, held = bits << (entry & _SIX_BITS), held - (entry & _BYTE)
    base = np.uint64((ac_table - 4) * SKIP_STRIDE)
    place = _ZERO
    while place < _SIX_BITS:
        at, bits, held = refilled(stream, at, bits, held)
        for _ in range(_SKIPS_A_REFILL):
            step = np.uint64(skips[base + (bits >> _SKIP_SHIFT)])
            ahead = place + (step >> _SKIP_PLACES_AT)
            is_single = step == _ZERO or (ahead & _NINE_BITS) > _SIX_BITS
            if is_single:
                break
            place = ahead
            bits, held = bits << (step & _SIX_BITS), held - (step & _SIX_BITS)
            if place >= _SIX_BITS:
                break
        if is_single:
            # A long code, or symbols joined beyond this block's end: one symbol alone.
            at, bits, held = refilled(stream, at, bits, held)
            entry = _symbol(bits, work, ac_table)
            place += entry >> PLACES_AT
            if entry == _ZERO or _SIX_BITS < place < np.uint64(END_OF_BLOCK):
                return _ZERO, bits, held
            bits, held = bits << (entry & _SIX_BITS), held - (entry & _BYTE)
    return at, bits, held
