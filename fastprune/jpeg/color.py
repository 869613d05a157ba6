"""Y, Cb and Cr planes to interleaved RGB, in 16-bit fixed point with four bits of fraction.

Source: ITU-T T.871 (JFIF).
"""

import numpy as np
from numba import types
from numba.extending import intrinsic

from fastprune.jpeg.native import (
    VECTORS,
    Lanes,
    clamped,
    filled,
    kernel,
    load,
    pointer,
    shuffled,
    store,
    vector_type,
)

LANES = 32
# 16 * 256 times 1.402, 0.344136, 0.714136 and 1.772: chroma is shifted left by 8, and the upper 16
# bits of the product with 2**12 times the factor are the contribution with 4 bits of fraction.
_RED_CR, _GREEN_CB, _GREEN_CR, _BLUE_CB = 5743, 1410, 2925, 7258


@kernel
def convert_pixel(planes, y, cb, cr, pixels, target):
    """Convert one pixel: `y`, `cb` and `cr` are offsets in the planes."""
    # The 8 is half a level, for rounding.
    luma = (np.int64(planes[y]) << 4) + 8
    # Chroma is coded around 128.
    blue = (np.int64(planes[cb]) - 128) << 8
    red = (np.int64(planes[cr]) - 128) << 8
    green = luma - (blue * _GREEN_CB >> 16) - (red * _GREEN_CR >> 16)
    pixels[target] = min(max((luma + (red * _RED_CR >> 16)) >> 4, 0), 255)
    pixels[target + 1] = min(max(green >> 4, 0), 255)
    pixels[target + 2] = min(max((luma + (blue * _BLUE_CB >> 16)) >> 4, 0), 255)


@intrinsic
def convert_vector(typing_context, planes, y, cb, cr, pixels, target):
    """The same for 32 pixels."""
    narrow, lane = vector_type(8, LANES), vector_type(16, LANES)

    def generate(context, builder, signature, arguments):
        planes_value, y_at, cb_at, cr_at, pixels_value, to = arguments

        def levels(offset):
            at = pointer(context, builder, signature.args[0], planes_value, offset)
            return Lanes(builder, builder.zext(load(builder, at, narrow), lane))

        def clipped(channel):
            return builder.trunc(clamped(builder, (channel >> 4).value, 0, 255), narrow)

        # All sums fit into 16 bits: 255 * 16 of luma and 128 * 1.772 * 16 of chroma.
        luma = (levels(y_at) << 4) + 8
        blue, red = (levels(cb_at) - 128) << 8, (levels(cr_at) - 128) << 8
        green = luma - _high(red, _GREEN_CR) - _high(blue, _GREEN_CB)
        both = list(range(2 * LANES))
        first = shuffled(builder, clipped(luma + _high(red, _RED_CR)), clipped(green), both)
        third = clipped(luma + _high(blue, _BLUE_CB))
        # A shuffle takes two vectors of one length, so blue is doubled.
        third = shuffled(builder, third, third, both)
        # Red and green lie end to end, blue behind them: from three planes of 32 to 32 pixels.
        order = [i for pixel in range(LANES) for i in (pixel, LANES + pixel, 2 * LANES + pixel)]
        at = pointer(context, builder, signature.args[4], pixels_value, to)
        store(builder, shuffled(builder, first, third, order), at)
        return context.get_dummy_value()

    integer = types.int64
    return types.void(planes, integer, integer, integer, pixels, integer), generate


def _high(lanes, factor):
    """The upper 16 bits of each lane's product with a number."""
    builder, wide = lanes.builder, vector_type(32, lanes.value.type.count)
    # One instruction for LLVM, as in resize.blend_vector, for signed lanes.
    product = builder.mul(builder.sext(lanes.value, wide), filled(wide, factor))
    return Lanes(builder, builder.trunc(builder.ashr(product, filled(wide, 16)), lanes.value.type))


@kernel
def ycc_to_rgb(planes, y, cb, cr, pixels, count):
    """Convert `count` pixels; the planes begin at `y`, `cb` and `cr`, the pixels at 0."""
    i = 0
    # The last pixels go one by one: the array ends with them.
    if VECTORS:
        while i + LANES <= count:
            convert_vector(
                planes,
                np.int64(y + i),
                np.int64(cb + i),
                np.int64(cr + i),
                pixels,
                np.int64(3 * i),
            )
            i += LANES
    while i < count:
        convert_pixel(planes, y + i, cb + i, cr + i, pixels, 3 * i)
        i += 1
