"""Huffman tables made for speed.

A lookup has one entry for each value of the next 10 bits:

    places << 24 | (63 - size) << 16 | code bits << 8 | all bits

`size` is how many bits of a number follow the code, `all bits` are those of both together. `places`
is how far the number lies ahead in the zigzag order, END_OF_BLOCK for the symbol that ends a block.
An entry is 0 for codes of more than 10 bits and for symbols of more than MOST_BITS in all.

A skip table has one entry for each value of the next 12 bits, for blocks that nobody looks at:
places << 6 | bits of several symbols at a step, 0 for a code of more than 12 bits.
"""

import numpy as np

from fastprune.jpeg.codes import OK, UNSUPPORTED
from fastprune.jpeg.native import inlined, kernel
from fastprune.jpeg.workspace import (
    LIMIT_ITEMS,
    LOOKUP_BITS,
    LOOKUP_STRIDE,
    SKIP_BITS,
    SKIP_STRIDE,
    SPEC_BYTES,
)

END_OF_BLOCK = 129
MOST_BITS = 18
_MOST_SYMBOLS = 4


@kernel
def prepare_lookup(work, table):
    """Build the lookup of a table unless the last image had the same."""
    if _is_same(work.specs, table * SPEC_BYTES, work.built, table * SPEC_BYTES):
        return OK
    for i in range(16):
        work.built[table * SPEC_BYTES + i] = 0  # equal to none, should the building fail
    code = _build(work, table)
    if code == OK:
        for i in range(table * SPEC_BYTES, (table + 1) * SPEC_BYTES):
            work.built[i] = work.specs[i]
    return code


@kernel
def prepare_skips(work, table):
    """Build the skip table of an AC table unless the last image had the same."""
    start = (table - 4) * SPEC_BYTES
    if _is_same(work.specs, table * SPEC_BYTES, work.skip_built, start):
        return
    _build_steps(work.specs, table * SPEC_BYTES, work.steps)
    _combine_steps(work.steps, work.skips, (table - 4) * SKIP_STRIDE)
    for i in range(SPEC_BYTES):
        work.skip_built[start + i] = work.specs[table * SPEC_BYTES + i]


@kernel
def _is_same(first, first_start, second, second_start):
    """Whether two specs are the same and hold any symbol."""
    different, symbols = 0, 0
    for i in range(16):
        different |= first[first_start + i] ^ second[second_start + i]
        symbols |= first[first_start + i]
    if different or not symbols:
        return False
    for i in range(16, SPEC_BYTES):
        different |= first[first_start + i] ^ second[second_start + i]
    return different == 0


@kernel
def _build(work, table):
    """Fill lookup and limits of one table; return a code."""
    specs, lookups, limits = work.specs, work.lookups, work.limits
    spec, base, limit = table * SPEC_BYTES, table * LOOKUP_STRIDE, table * LIMIT_ITEMS
    for i in range(1 << LOOKUP_BITS):
        lookups[base + i] = 0
    code, first = 0, 0
    for length in range(1, 17):
        count = specs[spec + length - 1]
        limits[limit + length] = (code + count) << (16 - length)
        limits[limit + 17 + length - 1] = first - code
        if code + count > 1 << length:
            return UNSUPPORTED
        if length <= LOOKUP_BITS:
            span = 1 << (LOOKUP_BITS - length)
            for i in range(count):
                symbol = np.int64(specs[spec + 16 + first + i])
                if length + (symbol & 15) <= MOST_BITS:
                    entry = np.uint32(entry_of(symbol, length))
                    start = base + (code + i) * span
                    for place in range(start, start + span):
                        lookups[place] = entry
        first += count
        code = (code + count) << 1
    return OK if first > 0 else UNSUPPORTED


@inlined
def entry_of(symbol, length):
    """What a lookup says of a symbol with a code of `length` bits."""
    size = symbol & 15
    return places_of(symbol) << 24 | (63 - size) << 16 | length << 8 | (length + size)


@inlined
def places_of(symbol):
    """How far an AC symbol leads ahead."""
    size = symbol & 15
    if size:
        return (symbol >> 4) + 1
    return np.int64(16) if symbol == 0xF0 else np.int64(END_OF_BLOCK)


@kernel
def _build_steps(specs, spec, steps):
    """One entry for each 12 bits: places << 16 | bits << 8 | code bits, 0 for longer codes."""
    for i in range(1 << SKIP_BITS):
        steps[i] = 0
    code, first = 0, 0
    for length in range(1, SKIP_BITS + 1):
        count = specs[spec + length - 1]
        span = 1 << (SKIP_BITS - length)
        for i in range(count):
            symbol = np.int64(specs[spec + 16 + first + i])
            entry = places_of(symbol) << 16 | (length + (symbol & 15)) << 8 | length
            start = (code + i) * span
            for place in range(start, start + span):
                steps[place] = entry
        first += count
        code = (code + count) << 1


@kernel
def _combine_steps(steps, skips, base):
    """Join as many symbols as the 12 bits hold the codes of."""
    size = 1 << SKIP_BITS
    for i in range(size):
        entry = steps[i]
        places, bits = entry >> 16, (entry >> 8) & 255
        symbols = 1
        while entry and bits < SKIP_BITS and places < 48 and symbols < _MOST_SYMBOLS:
            entry = steps[(i << bits) & (size - 1)]
            if entry == 0 or (entry & 255) > SKIP_BITS - bits:
                break
            places += entry >> 16
            bits += (entry >> 8) & 255
            symbols += 1
        skips[base + i] = places << 6 | bits
