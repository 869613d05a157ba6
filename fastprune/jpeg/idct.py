"""Inverse DCT of one 8 × 8 block: libjpeg's accurate integer transform, exact to the bit.

The result is stored transposed (a column of pixels is contiguous), as the resize wants it.

Source: Loeffler, Ligtenberg, Moschytz 1989; constants and rounding of libjpeg's jidctint.c.
"""

from typing import Any

import numpy as np
from numba import types
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

_COLUMNS_SHIFT = 11  # CONST_BITS - PASS1_BITS
_ROWS_SHIFT = 18  # CONST_BITS + PASS1_BITS + 3


def _eight_points(
    x0: Any, x1: Any, x2: Any, x3: Any, x4: Any, x5: Any, x6: Any, x7: Any, shift: int
) -> Any:
    """One-dimensional transform of eight numbers, scaled down by 2**shift, rounded."""
    half = 1 << (shift - 1)
    even = (x2 + x6) * 4433
    even_2 = even - x6 * 15137
    even_3 = even + x2 * 6270
    even_0 = ((x0 + x4) << 13) + half
    even_1 = ((x0 - x4) << 13) + half
    sum_0, sum_3 = even_0 + even_3, even_0 - even_3
    sum_1, sum_2 = even_1 + even_2, even_1 - even_2
    z3, z4 = x7 + x3, x5 + x1
    z5 = (z3 + z4) * 9633
    z1, z2 = (x7 + x1) * -7373, (x5 + x3) * -20995
    z3, z4 = z3 * -16069 + z5, z4 * -3196 + z5
    odd_0 = x7 * 2446 + z1 + z3
    odd_1 = x5 * 16819 + z2 + z4
    odd_2 = x3 * 25172 + z2 + z3
    odd_3 = x1 * 12299 + z1 + z4
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
def inverse_dct_plain(block, plane, start, stride):
    """Transform block[:64] (int16, rows of frequencies) into 8 columns of 8 pixels of the plane."""
    for column in range(8):
        results = _eight_numbers(
            np.int64(block[column]),
            np.int64(block[8 + column]),
            np.int64(block[16 + column]),
            np.int64(block[24 + column]),
            np.int64(block[32 + column]),
            np.int64(block[40 + column]),
            np.int64(block[48 + column]),
            np.int64(block[56 + column]),
            _COLUMNS_SHIFT,
        )
        for row in range(8):
            # Numbers outside 16 bits come from damaged data alone.
            block[64 + 8 * row + column] = min(max(results[row], -32768), 32767)
    for row in range(8):
        at = 64 + 8 * row
        results = _eight_numbers(
            np.int64(block[at]),
            np.int64(block[at + 1]),
            np.int64(block[at + 2]),
            np.int64(block[at + 3]),
            np.int64(block[at + 4]),
            np.int64(block[at + 5]),
            np.int64(block[at + 6]),
            np.int64(block[at + 7]),
            _ROWS_SHIFT,
        )
        for column in range(8):
            level = min(max(results[column] + 128, 0), 255)
            plane[start + column * stride + row] = level


@intrinsic
def inverse_dct_vector(typing_context, block, plane, start, stride):
    """The same on eight lanes of 32 bits."""

    def generate(context, builder, signature, arguments):
        block_type, plane_type = signature.args[:2]
        block_value, plane_value, first, step = arguments
        rows = []
        for row in range(8):
            at = pointer(context, builder, block_type, block_value, first.type(8 * row))
            wide = builder.sext(load(builder, at, vector_type(16, 8)), vector_type(32, 8))
            rows.append(Lanes(builder, wide))
        columns = _transposed(builder, [v.value for v in _eight_points(*rows, _COLUMNS_SHIFT)])
        lanes = [Lanes(builder, column) for column in columns]
        for number, column in enumerate(_eight_points(*lanes, _ROWS_SHIFT)):
            levels = clamped(builder, (column + 128).value, 0, 255)
            offset = builder.add(first, builder.mul(step, step.type(number)))
            at = pointer(context, builder, plane_type, plane_value, offset)
            store(builder, builder.trunc(levels, vector_type(8, 8)), at)
        return context.get_dummy_value()

    return types.void(block, plane, types.int64, types.int64), generate


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """Eight vectors of eight lanes, mirrored at the diagonal."""
    low = [lane for i in range(4) for lane in (i, 8 + i)]
    high = [lane + 4 for lane in low]
    for _ in range(3):
        mixed = []
        for i in range(4):
            mixed.append(shuffled(builder, rows[i], rows[i + 4], low))
            mixed.append(shuffled(builder, rows[i], rows[i + 4], high))
        rows = mixed
    return rows


if VECTORS:

    @inlined
    def inverse_dct(block, plane, start, stride):
        """Transform a block into the plane."""
        inverse_dct_vector(block, plane, np.int64(start), np.int64(stride))
else:
    inverse_dct = inverse_dct_plain
