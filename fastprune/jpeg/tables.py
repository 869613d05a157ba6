"""Huffman tables made for speed.

A lookup has one entry for each value of the next 10 bits. Where they hold a whole symbol and its
number, the entry is number << 16 | places << 8 | bits; places is how far the number lies ahead in
the zigzag order, END_OF_BLOCK for the symbol that ends a block. Otherwise its lowest byte is 0, and
it is symbol << 16 | code bits << 8, or 0 for a code of more than 10 bits.

A skip table has one entry for each value of the next 12 bits, for blocks that nobody looks at:
places << 5 | bits of up to four symbols at a step, 0 for a code of more than 12 bits.
"""

import numpy as np

from fastprune.jpeg.codes import OK, UNSUPPORTED
from fastprune.jpeg.native import inlined, kernel
from fastprune.jpeg.workspace import LIMIT_ITEMS, LOOKUP_BITS, SKIP_BITS, SPEC_BYTES

END_OF_BLOCK = 129
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
    _combine_steps(work.steps, work.skips, (table - 4) << SKIP_BITS)
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
    spec, base, limit = table * SPEC_BYTES, table << LOOKUP_BITS, table * LIMIT_ITEMS
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
                _fill_lookup(lookups, base + (code + i) * span, span, symbol, length)
        first += count
        code = (code + count) << 1
    return OK if first > 0 else UNSUPPORTED


@kernel
def _fill_lookup(lookups, start, span, symbol, length):
    """Fill the entries whose bits begin with the code of one symbol."""
    size = symbol & 15
    places = places_of(symbol)
    if (1 << size) > span:
        for i in range(span):
            lookups[start + i] = symbol << 16 | length << 8
        return
    bits = length + size
    repeats = span >> size
    entry = start
    for number in range(1 << size):
        value = extended(number, size)
        packed = value << 16 | places << 8 | bits
        for _ in range(repeats):
            lookups[entry] = packed
            entry += 1


@inlined
def places_of(symbol):
    """How far an AC symbol leads ahead."""
    size = symbol & 15
    if size:
        return (symbol >> 4) + 1
    return np.int64(16) if symbol == 0xF0 else np.int64(END_OF_BLOCK)


@inlined
def extended(number, size):
    """A number of `size` bits as the signed value that it stands for (T.81, F.2.2.1)."""
    if size and number < 1 << (size - 1):
        return number - (1 << size) + 1
    return number


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
        skips[base + i] = places << 5 | bits
