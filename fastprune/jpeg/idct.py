"""Inverse DCT of 8 × 8 blocks: libjpeg's accurate integer transform, exact to the bit.

The result is stored transposed (a column of pixels is contiguous), as the resize wants it.

Source: Loeffler, Ligtenberg, Moschytz 1989; constants and rounding of libjpeg's jidctint.c.
"""

from typing import Any

import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fastprune.jpeg.native import (
    VECTORS,
    Lanes,
    clamped,
    inlined,
    kernel,
    load,
    pointer,
    shuffled,
    store,
    vector_type,
)
from fastprune.jpeg.workspace import BLOCK_STRIDE

# libjpeg's CONST_BITS is 13: constants are multiplied by 2**13. PASS1_BITS is 2: between the passes
# two bits of fraction are kept. The 3 takes out the transform's own factor of 8.
_COLUMNS_SHIFT = 11  # CONST_BITS - PASS1_BITS
_ROWS_SHIFT = 18  # CONST_BITS + PASS1_BITS + 3


def _eight_points(
    x0: Any, x1: Any, x2: Any, x3: Any, x4: Any, x5: Any, x6: Any, x7: Any, shift: int
) -> Any:
    """One-dimensional transform of eight numbers, scaled down by 2**shift, rounded."""
    half = 1 << (shift - 1)
    # Even part: a rotation of x2 and x6 in three multiplications. The numbers below are 2**13 times
    # 0.541196100, 1.847759065 and 0.765366865.
    even = (x2 + x6) * 4433
    even_2 = even - x6 * 15137
    even_3 = even + x2 * 6270
    even_0 = ((x0 + x4) << 13) + half
    even_1 = ((x0 - x4) << 13) + half
    sum_0, sum_3 = even_0 + even_3, even_0 - even_3
    sum_1, sum_2 = even_1 + even_2, even_1 - even_2
    # Odd part, figure 8 of the paper. 2**13 times 1.175875602, 0.899976223, 2.562915447,
    # 1.961570560, 0.390180644, 0.298631336, 2.053119869, 3.072711026 and 1.501321110.
    z3, z4 = x7 + x3, x5 + x1
    z5 = (z3 + z4) * 9633
    z1, z2 = (x7 + x1) * -7373, (x5 + x3) * -20995
    z3, z4 = z3 * -16069 + z5, z4 * -3196 + z5
    odd_0 = x7 * 2446 + z1 + z3
    odd_1 = x5 * 16819 + z2 + z4
    odd_2 = x3 * 25172 + z2 + z3
    odd_3 = x1 * 12299 + z1 + z4
    # Outputs come in pairs mirrored at the middle: the cosines of even frequencies are symmetric
    # there, of odd ones antisymmetric.
    return (
        (sum_0 + odd_3) >> shift,
        (sum_1 + odd_2) >> shift,
        (sum_2 + odd_1) >> shift,
        (sum_3 + odd_0) >> shift,
        (sum_3 - odd_0) >> shift,
        (sum_2 - odd_1) >> shift,
        (sum_1 - odd_2) >> shift,
        (sum_0 - odd_3) >> shift,
    )


_eight_numbers = inlined(_eight_points)


@kernel
def inverse_dct_plain(blocks, block, quantizers, quantizer, plane, start, stride):
    """Dequantize and transform 64 coefficients into 8 columns of 8 pixels of the plane.

    blocks[block:] are rows of frequencies, which are overwritten; quantizers[quantizer:] are the
    factors. Their products are cut to 16 bits, and only damaged data has larger ones.
    """
    for i in range(64):
        blocks[block + i] *= quantizers[quantizer + i]
    for column in range(block, block + 8):
        results = _eight_numbers(
            np.int64(blocks[column]),
            np.int64(blocks[column + 8]),
            np.int64(blocks[column + 16]),
            np.int64(blocks[column + 24]),
            np.int64(blocks[column + 32]),
            np.int64(blocks[column + 40]),
            np.int64(blocks[column + 48]),
            np.int64(blocks[column + 56]),
            _COLUMNS_SHIFT,
        )
        # As the vectors do it, see there. Whole data stays far below.
        for row in range(8):
            blocks[column + 8 * row] = min(max(results[row], -32768), 32767)
    for row in range(8):
        at = block + 8 * row
        results = _eight_numbers(
            np.int64(blocks[at]),
            np.int64(blocks[at + 1]),
            np.int64(blocks[at + 2]),
            np.int64(blocks[at + 3]),
            np.int64(blocks[at + 4]),
            np.int64(blocks[at + 5]),
            np.int64(blocks[at + 6]),
            np.int64(blocks[at + 7]),
            _ROWS_SHIFT,
        )
        for column in range(8):
            # Samples are coded around 0 (T.81, A.3.1).
            level = min(max(results[column] + 128, 0), 255)
            plane[start + column * stride + row] = level


@kernel
def inverse_dct_pair_plain(blocks, block, quantizers, plane, first, second):
    """Transform two blocks, BLOCK_STRIDE apart.

    `first` and `second` are (quantizer, start, stride) of each; if both have the same start, the
    first block is what remains there.
    """
    inverse_dct_plain(
        blocks, block + BLOCK_STRIDE, quantizers, second[0], plane, second[1], second[2]
    )
    inverse_dct_plain(blocks, block, quantizers, first[0], plane, first[1], first[2])


@intrinsic
def inverse_dct_pair_vector(typing_context, blocks, block, quantizers, plane, first, second):
    """The same on sixteen lanes of 32 bits, eight for each block; the blocks stay as they are."""

    def generate(context, builder, signature, arguments):
        blocks_value, block_at, quantizers_value, plane_value, first_value, second_value = arguments
        targets = [cgutils.unpack_tuple(builder, v, 3) for v in (second_value, first_value)]

        def both(kind, array, offsets):
            halves = []
            for offset in offsets:
                at = pointer(context, builder, kind, array, offset)
                halves.append(load(builder, at, vector_type(16, 8)))
            return shuffled(builder, *halves, list(range(16)))

        rows = []
        for row in range(8):
            # A vector has a row of the second block, then the same row of the first. Each lane is a
            # column of its own, so the first pass needs no shuffle.
            skips = (BLOCK_STRIDE + 8 * row, 8 * row)
            offsets = [builder.add(block_at, block_at.type(skip)) for skip in skips]
            coefficients = both(signature.args[0], blocks_value, offsets)
            offsets = [builder.add(target[0], block_at.type(8 * row)) for target in targets]
            factors = both(signature.args[2], quantizers_value, offsets)
            # 16 bits hold every product that T.81 allows.
            product = builder.mul(coefficients, factors)
            rows.append(Lanes(builder, builder.sext(product, vector_type(32, 16))))
        # Cut to 16 bits, which takes half the shuffles, and keeps the next pass within 32 bits.
        narrow = [
            builder.trunc(clamped(builder, v.value, -32768, 32767), vector_type(16, 16))
            for v in _eight_points(*rows, _COLUMNS_SHIFT)
        ]
        columns = [builder.sext(v, vector_type(32, 16)) for v in _transposed(builder, narrow)]
        lanes = [Lanes(builder, column) for column in columns]
        for number, column in enumerate(_eight_points(*lanes, _ROWS_SHIFT)):
            levels = clamped(builder, (column + 128).value, 0, 255)
            levels = builder.trunc(levels, vector_type(8, 16))
            # After the transposition a vector is a column of pixels, the plane's contiguous
            # direction. The first block is stored last, see inverse_dct_pair_plain.
            for half, (_, start, stride) in enumerate(targets):
                offset = builder.add(start, builder.mul(stride, stride.type(number)))
                at = pointer(context, builder, signature.args[3], plane_value, offset)
                eight = list(range(8 * half, 8 * half + 8))
                store(builder, shuffled(builder, levels, levels, eight), at)
        return context.get_dummy_value()

    integer = types.int64
    target = types.UniTuple(integer, 3)
    return types.void(blocks, integer, quantizers, plane, target, target), generate


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """Eight vectors of twice eight lanes, each half of them transposed."""
    # Vector i and i + 4 are interleaved, three times. A round moves the highest bit of the row's
    # number to the lowest of the lane's, so after three rounds row and lane are exchanged.
    low = [half + lane for half in (0, 8) for i in range(4) for lane in (i, 16 + i)]
    high = [lane + 4 for lane in low]
    for _ in range(3):
        mixed = []
        for i in range(4):
            mixed.append(shuffled(builder, rows[i], rows[i + 4], low))
            mixed.append(shuffled(builder, rows[i], rows[i + 4], high))
        rows = mixed
    return rows


inverse_dct_pair = inverse_dct_pair_vector if VECTORS else inverse_dct_pair_plain
