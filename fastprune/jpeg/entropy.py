"""Huffman decoding of single blocks: the ones that are shown, and the ones that are passed over.

Both take the bit that a block starts at and return the bit behind it, 0 where the data is damaged.
At most 64 symbols of 31 bits are read for a block, so a caller that checks the end of the data
after each block needs a guard of 248 bytes behind it.
"""

import numpy as np

from fastprune.jpeg.native import inlined
from fastprune.jpeg.stream import load_word
from fastprune.jpeg.tables import END_OF_BLOCK, extended, places_of
from fastprune.jpeg.workspace import LIMIT_ITEMS, LOOKUP_BITS, PADDED_BLOCK, SKIP_BITS, SPEC_BYTES

# Numbers that meet a uint64 must be one, or Numba makes the result signed.
_THREE, _SEVEN = np.uint64(3), np.uint64(7)
_LOOKUP_SHIFT, _SKIP_SHIFT = np.uint64(64 - LOOKUP_BITS), np.uint64(64 - SKIP_BITS)
_SIZE_BITS, _SIZE_MASK = np.uint64(5), np.uint64(31)
_DAMAGED = np.uint64(0)

# A word shifted by up to 7 bits still holds 57: five symbols that a lookup holds whole, or two
# steps of up to 12 bits of codes and 15 of the last one's number.
_LOOKUPS_A_WORD = 5
_SKIPS_A_WORD = 2

# Zigzag order of the coefficients in a block. What lies beyond the 63rd goes to a spare place.
ZIGZAG = np.full(PADDED_BLOCK, 64, np.uint8)
ZIGZAG[:64] = sorted(
    range(64),
    key=lambda i: (i // 8 + i % 8, i // 8 if (i // 8 + i % 8) % 2 else i % 8),
)


@inlined
def _refilled(stream, bit):
    """The bits from this one on, leftmost first, at least 57 of them."""
    return load_word(stream, bit >> _THREE) << (bit & _SEVEN)


@inlined
def _long_symbol(bits, entry, work, table):
    """The entry of a symbol that the lookup does not hold whole; 0 where there is no such code."""
    symbol, length = np.int64(entry >> 16), np.int64((entry >> 8) & 255)
    if length == 0:
        code = np.int64(bits >> np.uint64(48))
        limit = table * LIMIT_ITEMS
        length = np.int64(LOOKUP_BITS + 1)
        while length <= 16 and code >= work.limits[limit + length]:
            length += 1
        if length > 16:
            return np.int64(0)
        place = (code >> (16 - length)) + work.limits[limit + 17 + length - 1]
        if place < 0 or place > 255:
            return np.int64(0)
        symbol = np.int64(work.specs[table * SPEC_BYTES + 16 + place])
    size = symbol & 15
    number = np.int64(bits << np.uint64(length) >> np.uint64(1) >> np.uint64(63 - size))
    return extended(number, size) << 16 | places_of(symbol) << 8 | (length + size)


@inlined
def _dc_difference(bits, work, table):
    """The entry of a DC symbol, 0 where the data is damaged."""
    base = np.uint64(table << LOOKUP_BITS)
    entry = np.int64(work.lookups[base + (bits >> _LOOKUP_SHIFT)])
    if entry & 255 == 0:
        entry = _long_symbol(bits, entry, work, table)
    return entry


@inlined
def decode_block(work, bit, component, dc_table, ac_table, quantizer):
    """Decode and dequantize a block into the workspace."""
    block, lookups, quantizers = work.block, work.lookups, work.quantizers
    stream = work.stream
    for i in range(64):
        block[i] = 0
    bits = _refilled(stream, bit)
    entry = _dc_difference(bits, work, dc_table)
    if entry == 0:
        return _DAMAGED
    work.predictions[component] += entry >> 16
    block[0] = work.predictions[component] * quantizers[quantizer]
    length = np.uint64(entry & 255)
    bit += length
    base = np.uint64(ac_table << LOOKUP_BITS)
    quantizer_base = np.uint64(quantizer)
    place = 1
    while place < 64:
        bits = _refilled(stream, bit)
        # A fixed number of symbols for each refill: a test of the bits left is mispredicted.
        for _ in range(_LOOKUPS_A_WORD):
            entry = np.int64(lookups[base + (bits >> _LOOKUP_SHIFT)])
            is_long = entry & 255 == 0
            if is_long:
                entry = _long_symbol(_refilled(stream, bit), entry, work, ac_table)
                if entry == 0:
                    return _DAMAGED
            place += (entry >> 8) & 255
            at = np.uint64(place - 1)
            block[ZIGZAG[at]] = (entry >> 16) * quantizers[quantizer_base + at]
            length = np.uint64(entry & 63)
            bits <<= length
            bit += length
            if is_long or place >= 64:
                break
    if 64 < place <= END_OF_BLOCK:
        return _DAMAGED
    return bit


@inlined
def skip_block(work, bit, component, dc_table, ac_table):
    """Pass over a block; only its DC value is noted, for the blocks that follow."""
    stream, skips = work.stream, work.skips
    bits = _refilled(stream, bit)
    entry = _dc_difference(bits, work, dc_table)
    if entry == 0:
        return _DAMAGED
    work.predictions[component] += entry >> 16
    length = np.uint64(entry & 255)
    bit += length
    base = np.uint64((ac_table - 4) << SKIP_BITS)
    place = 1
    while True:
        bits = _refilled(stream, bit)
        for _ in range(_SKIPS_A_WORD):
            step = np.uint64(skips[base + (bits >> _SKIP_SHIFT)])
            ahead = place + np.int64(step >> _SIZE_BITS)
            is_single = step == _DAMAGED or (ahead & 127) > 64
            if is_single:
                # A long code, or symbols joined beyond this block's end: one symbol alone.
                bits = _refilled(stream, bit)
                at = np.uint64(ac_table << LOOKUP_BITS) + (bits >> _LOOKUP_SHIFT)
                entry = np.int64(work.lookups[at])
                if entry & 255 == 0:
                    entry = _long_symbol(bits, entry, work, ac_table)
                    if entry == 0:
                        return _DAMAGED
                ahead = place + ((entry >> 8) & 255)
                if 64 < ahead <= END_OF_BLOCK:
                    return _DAMAGED
                step = np.uint64(entry & 63)
            place = ahead
            length = step & _SIZE_MASK
            bits <<= length
            bit += length
            if place >= 64:
                return bit
            if is_single:
                break
