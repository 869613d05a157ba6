"""Huffman tables made for speed.

A lookup has one entry for each value of the next 10 bits:

    places << 24 | (63 - size) << 16 | code bits << 8 | all bits

`size` is how many bits of a number follow the code, `all bits` are those of both together. `places`
is how far the number lies ahead in the zigzag order, END_OF_BLOCK for the symbol that ends a block.
An entry is 0 for codes of more than 10 bits and for symbols of more than MOST_BITS in all.

A table of pairs is an AC lookup with the symbol behind it, where the 10 bits hold both whole:

    second number << 48 | second places << 40 | bits of the first << 32 | lookup's entry

with `all bits` those of both symbols. The second number and its places are 0 where there is none.

A skip table has one entry for each value of the next 12 bits, for blocks that nobody looks at:
places << 6 | bits of all symbols whose codes they hold, 0 for a code of more than 12 bits. The
symbol that ends a block counts SKIPPED_BLOCK there.
"""

import numpy as np

from fastprune.jpeg.native import (
    OK,
    UNSUPPORTED,
    inlined,
    kernel,
)
from fastprune.jpeg.workspace import (
    LIMIT_ITEMS,
    LOOKUP_BITS,
    LOOKUP_STRIDE,
    SKIP_BITS,
    SKIP_STRIDE,
    SPEC_BYTES,
)

END_OF_BLOCK = 129
SKIPPED_BLOCK = 513  # the same in a skip table, far from what joined symbols add up to
MOST_BITS = 18
PLACES_AT = np.uint64(24)
_ONE, _SIX_BITS, _BYTE = np.uint64(1), np.uint64(63), np.uint64(255)
_LENGTH_AT, _GAP_AT, FIRST_BITS_AT = np.uint64(8), np.uint64(16), np.uint64(32)
SECOND_PLACES_AT, SECOND_NUMBER_AT = np.uint64(40), np.uint64(48)


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
        if table >= 4:
            _build_pairs(
                work.lookups, table * LOOKUP_STRIDE, work.pairs, (table - 4) * LOOKUP_STRIDE
            )
    return code


@kernel
def prepare_skips(work, table):
    """Build the skip table of an AC table unless the last image had the same."""
    start = (table - 4) * SPEC_BYTES
    if _is_same(work.specs, table * SPEC_BYTES, work.skip_built, start):
        return
    _build_skips(work.specs, table * SPEC_BYTES, work.steps, work.skips, (table - 4) * SKIP_STRIDE)
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


@kernel
def _build_pairs(lookups, lookup, pairs, base):
    """Fill the pairs of one AC table from its lookup."""
    for i in range(np.uint64(1 << LOOKUP_BITS)):
        entry = np.uint64(lookups[np.uint64(lookup) + i])
        first_bits = entry & _BYTE
        packed = entry | first_bits << FIRST_BITS_AT
        rest = i << first_bits & np.uint64((1 << LOOKUP_BITS) - 1)
        second = np.uint64(lookups[np.uint64(lookup) + rest])
        both_bits = first_bits + (second & _BYTE)
        is_end = entry >> PLACES_AT == np.uint64(END_OF_BLOCK)
        if entry and second and not is_end and both_bits <= np.uint64(LOOKUP_BITS):
            number = np.uint64(number_of(rest << np.uint64(64 - LOOKUP_BITS), second))
            packed += (second & _BYTE) | second >> PLACES_AT << SECOND_PLACES_AT
            packed |= number << SECOND_NUMBER_AT
        pairs[np.uint64(base) + i] = packed


@inlined
def number_of(bits, entry):
    """The signed number behind a symbol's code (T.81, F.2.2.1); 0 where it has no bits."""
    number = bits << ((entry >> _LENGTH_AT) & _SIX_BITS)
    gap = (entry >> _GAP_AT) & _SIX_BITS
    negative = (number >> _SIX_BITS) - _ONE  # all ones where the number's first bit is not set
    return np.int64((number >> _ONE >> gap) - (negative >> _ONE >> gap))


@inlined
def entry_of(symbol, length):
    """What a lookup says of a symbol with a code of `length` bits."""
    size = symbol & 15
    return places_of(symbol) << 24 | (63 - size) << 16 | length << 8 | (length + size)


@inlined
def places_of(symbol):
    """How far an AC symbol leads ahead."""
    if is_end(symbol):
        return np.int64(END_OF_BLOCK)
    return (symbol >> 4) + 1


@inlined
def is_end(symbol):
    """Whether an AC symbol ends its block."""
    return symbol & 15 == 0 and symbol != 0xF0


@kernel
def _build_skips(specs, spec, steps, skips, base):
    """Fill a skip table, by way of those for 1, 2, ... bits.

    The table for n bits is at steps[2**n:]. Where a symbol and its number take m bits of them, what
    follows is the table for n - m bits, so nearly everything is copied in runs.
    """
    steps[1] = 0
    for known in range(1, SKIP_BITS + 1):
        for i in range(np.uint64(1 << known), np.uint64(2 << known)):
            steps[i] = 0
        start, symbol_at = 1 << known, spec + 16
        for length in range(1, known + 1):
            for _ in range(specs[spec + length - 1]):
                _fill_steps(steps, start, np.int64(specs[symbol_at]), length, known)
                start += 1 << (known - length)
                symbol_at += 1
    for i in range(np.uint64(1 << SKIP_BITS)):
        skips[np.uint64(base) + i] = steps[np.uint64(1 << SKIP_BITS) + i]


@inlined
def _fill_steps(steps, start, symbol, length, known):
    """Fill the entries whose bits begin with the code of one symbol."""
    size = symbol & 15
    places = np.int64(SKIPPED_BLOCK) if is_end(symbol) else places_of(symbol)
    own = np.uint16(places << 6 | (length + size))
    # Behind the symbol that ends a block there is no AC symbol.
    rest = np.int64(0) if is_end(symbol) else max(known - length - size, 0)
    source = np.uint64(1 << rest)
    mask = source - np.uint64(1)
    for i in range(np.uint64(start), np.uint64(start + (1 << (known - length)))):
        steps[i] = own + steps[source + (i & mask)]
