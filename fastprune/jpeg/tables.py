"""Huffman tables made for speed.

An AC symbol is a run of zeros and the category of the value behind them (T.81, F.1.2.2): its high
and low four bits. The category is the number of bits behind the code that hold the value.
`advance` is how far the value lies ahead in zigzag order: the run plus one.

A lookup has one entry for each value of the next 10 bits:

    advance << 24 | (63 - category) << 16 | code bits << 8 | all bits

`all bits` counts code and value together. The advance of the symbol that ends a block is
END_OF_BLOCK. An entry is 0 for codes of more than 10 bits and for symbols of more than MOST_BITS in
all.

A table of pairs is an AC lookup with the symbol behind it, where the 10 bits hold both whole:

    second value << 48 | second advance << 40 | bits of the first << 32 | lookup's entry

with `all bits` of both symbols. Second value and advance are 0 if there is only one symbol.

A skip table has one entry for each value of the next 12 bits, for blocks that are skipped:
advance << 6 | bits of all symbols whose codes they hold, 0 for a code of more than 12 bits. The
symbol that ends a block counts SKIPPED_BLOCK there.
"""

import numpy as np

from fastprune.jpeg.native import OK, UNSUPPORTED, inlined, kernel
from fastprune.jpeg.workspace import (
    LIMIT_ITEMS,
    LOOKUP_BITS,
    LOOKUP_STRIDE,
    SKIP_BITS,
    SKIP_STRIDE,
    SPEC_BYTES,
)

# Added to an index, it leads beyond 62 + 16, the farthest that a run in damaged data can lead.
END_OF_BLOCK = 129
# The same in a skip table. The symbols joined there, of a bit or more each, advance by 12 * 16 at
# most, so bit 9 of the sum tells whether the block has ended.
SKIPPED_BLOCK = 513
MOST_BITS = 18  # a third of what a refilled reader holds
ADVANCE_SHIFT = np.uint64(24)
_ONE, _SIX_BITS, _BYTE = np.uint64(1), np.uint64(63), np.uint64(255)
_LENGTH_SHIFT, _GAP_SHIFT, FIRST_BITS_SHIFT = np.uint64(8), np.uint64(16), np.uint64(32)
SECOND_ADVANCE_SHIFT, SECOND_VALUE_SHIFT = np.uint64(40), np.uint64(48)


@kernel
def prepare_lookup(work, table):
    """Build the lookup of a table unless the last image had the same."""
    # Most of ImageNet's files have tables of their own, but many encoders, Pillow's default among
    # them, use the standard's: comparing 272 bytes saves building them again.
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
    # Differences are gathered by OR and looked at once: loops without an exit can be vectorized.
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
    # Codes are canonical (T.81, C.2): one length's codes are consecutive numbers, and the next
    # length's first is twice the number behind the last.
    code, first = 0, 0
    for length in range(1, 17):
        count = specs[spec + length - 1]
        # See entropy._long_symbol: where the codes of a length end, aligned to 16 bits, and what
        # must be added to a code for the index of its symbol.
        limits[limit + length] = (code + count) << (16 - length)
        limits[limit + 17 + length - 1] = first - code
        if code + count > 1 << length:
            return UNSUPPORTED  # more codes than numbers of that length
        if length <= LOOKUP_BITS:
            # A short code is the beginning of all entries that differ in the bits behind it.
            span = 1 << (LOOKUP_BITS - length)
            for i in range(count):
                symbol = np.int64(specs[spec + 16 + first + i])
                # A DC symbol is a category alone; libjpeg refuses others too.
                if table < 4 and symbol > 15:
                    return UNSUPPORTED
                if length + (symbol & 15) <= MOST_BITS:
                    entry = np.uint32(entry_of(symbol, length))
                    start = base + (code + i) * span
                    for index in range(start, start + span):
                        lookups[index] = entry
        first += count
        code = (code + count) << 1
    return OK if first > 0 else UNSUPPORTED


@kernel
def _build_pairs(lookups, lookup, pairs, base):
    """Fill the pairs of one AC table from its lookup."""
    for i in range(np.uint64(1 << LOOKUP_BITS)):
        entry = np.uint64(lookups[np.uint64(lookup) + i])
        first_bits = entry & _BYTE
        packed = entry | first_bits << FIRST_BITS_SHIFT
        # Without the first symbol's bits the index begins with the second. It is filled up with
        # zeros, which may look like a symbol: only one that fits into the real bits counts.
        rest = i << first_bits & np.uint64((1 << LOOKUP_BITS) - 1)
        second = np.uint64(lookups[np.uint64(lookup) + rest])
        both_bits = first_bits + (second & _BYTE)
        is_end = entry >> ADVANCE_SHIFT == np.uint64(END_OF_BLOCK)
        if entry and second and not is_end and both_bits <= np.uint64(LOOKUP_BITS):
            value = np.uint64(receive_extend(rest << np.uint64(64 - LOOKUP_BITS), second))
            packed += (second & _BYTE) | second >> ADVANCE_SHIFT << SECOND_ADVANCE_SHIFT
            packed |= value << SECOND_VALUE_SHIFT  # its low 16 bits, negative values too
        pairs[np.uint64(base) + i] = packed


@inlined
def receive_extend(bits, entry):
    """The signed value behind a symbol's code (T.81, F.2.2.1); 0 where it has no bits.

    In n additional bits, those that begin with 1 are the value itself, others the value plus
    2**n - 1: "01" is -2, "10" is 2.
    """
    value = bits << ((entry >> _LENGTH_SHIFT) & _SIX_BITS)  # without the code
    # A shift by 64 - n is one by 1 and one by 63 - n, so that none is by 64 where n is 0.
    gap = (entry >> _GAP_SHIFT) & _SIX_BITS
    # 0 - 1 is all ones where the first bit is not set; shifted alike, that is 2**n - 1.
    negative = (value >> _SIX_BITS) - _ONE
    return np.int64((value >> _ONE >> gap) - (negative >> _ONE >> gap))


@inlined
def entry_of(symbol, length):
    """A lookup's entry for a symbol with a code of `length` bits."""
    category = symbol & 15
    return advance_of(symbol) << 24 | (63 - category) << 16 | length << 8 | (length + category)


@inlined
def advance_of(symbol):
    """How far ahead in zigzag order the value of an AC symbol lies."""
    if is_end(symbol):
        return np.int64(END_OF_BLOCK)
    return (symbol >> 4) + 1


@inlined
def is_end(symbol):
    """Whether an AC symbol ends its block."""
    # Of the symbols without a value, 0xF0 is a run of sixteen zeros. The others but 0x00 mean
    # something in progressive scans alone; libjpeg takes them for an end too.
    return symbol & 15 == 0 and symbol != 0xF0


@kernel
def _build_skips(specs, spec, steps, skips, base):
    """Fill a skip table, by way of those for 1, 2, ... bits.

    The table for n bits is at steps[2**n:]. Where a symbol and its value take m bits of them, what
    follows is the table for n - m bits, so nearly everything is copied in runs.
    """
    steps[1] = 0  # the table for no bits: nothing known, nothing passed
    for known in range(1, SKIP_BITS + 1):
        for i in range(np.uint64(1 << known), np.uint64(2 << known)):
            steps[i] = 0
        start, symbol_at = 1 << known, spec + 16
        for length in range(1, known + 1):
            for _ in range(specs[spec + length - 1]):
                _fill_steps(steps, start, np.int64(specs[symbol_at]), length, known)
                # Canonical codes follow each other, so their entries do.
                start += 1 << (known - length)
                symbol_at += 1
    for i in range(np.uint64(1 << SKIP_BITS)):
        skips[np.uint64(base) + i] = steps[np.uint64(1 << SKIP_BITS) + i]


@inlined
def _fill_steps(steps, start, symbol, length, known):
    """Fill the entries whose bits begin with the code of one symbol."""
    category = symbol & 15
    advance = np.int64(SKIPPED_BLOCK) if is_end(symbol) else advance_of(symbol)
    own = np.uint16(advance << 6 | (length + category))
    # Nothing follows the symbol that ends a block. A value may reach beyond the known bits:
    # the step passes it all the same, but nothing behind it.
    rest = np.int64(0) if is_end(symbol) else max(known - length - category, 0)
    source = np.uint64(1 << rest)
    mask = source - np.uint64(1)
    for i in range(np.uint64(start), np.uint64(start + (1 << (known - length)))):
        # Advances and bits are added at once. Codes and values take 12 bits and the last value 15
        # more at most, so the sum of bits stays below the advance.
        steps[i] = own + steps[source + (i & mask)]
