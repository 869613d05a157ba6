"""Antialiased bilinear resize of one plane: PIL's BILINEAR, in fixed point.

A plane comes transposed. Its columns are blended first, across the picture; the result is
transposed and its rows are blended. Each pass rounds to whole levels, as PIL does.
"""

import math

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fastprune.jpeg.native import (
    VECTORS,
    filled,
    inlined,
    kernel,
    load,
    pointer,
    shuffled,
    store,
    vector_type,
)

HORIZONTAL, VERTICAL = 0, 1
LANES = 32  # of 16 bits: two of AVX2's registers
TILE = 16
# A line of more samples is summed in full: so many products rounded down would darken it.
_MOST_ROUNDED = 64
# The sum of an output's weights: with 16 bits, a weight alone can be nearly 1.
_WHOLE = 65_535.0


@kernel
def weigh(work, direction, start, size, first, last, outputs, support, mirrored):
    """Fill one direction's half of firsts, counts and weights.

    The box [start, start + size) of samples becomes `outputs` samples; those outside [first, last)
    are not used. A triangle reaches `support` samples to both sides. Output i is made of samples
    firsts[i] ... firsts[i] + counts[i] - 1 with the weights from i * taps on, counted from the
    half's beginning; returns taps.
    """
    half, weights_half = direction * (len(work.firsts) // 2), direction * (len(work.weights) // 2)
    # The filter is PIL's (Resample.c, precompute_coeffs): a triangle that is as wide as two output
    # samples where the picture shrinks, and as two input samples where it grows.
    scale = size / outputs
    taps = np.int64(math.ceil(support)) * 2 + 2
    inverse = 1.0 / support  # a multiplication is cheaper, and enough before rounding to 16 bits
    for i in range(outputs):
        center = start + (i + 0.5) * scale
        # Samples whose centers, at + 0.5, lie under the triangle; at the border fewer, and always
        # one at least.
        low = max(np.int64(center - support + 0.5), first)
        high = min(max(np.int64(center + support + 0.5), low + 1), last)
        low = min(low, high - 1)
        total = 0.0
        for sample in range(low, high):
            total += max(1.0 - abs(sample + 0.5 - center) * inverse, 0.0)
        # A flip costs nothing: output i is made where its mirror image belongs.
        target = outputs - 1 - i if mirrored else i
        work.firsts[half + target], work.counts[half + target] = low, high - low
        # Rounded are the sums so far, and weights are their differences. So what rounding leaves
        # goes to the next weight, and they are 65535 together: a flat area keeps its level.
        factor = _WHOLE / total if total > 0.0 else 0.0
        sum_so_far, given = 0.0, np.int64(0)
        for sample in range(low, high):
            sum_so_far += max(1.0 - abs(sample + 0.5 - center) * inverse, 0.0) * factor
            weight = np.int64(sum_so_far + 0.5) - given
            given += weight
            work.weights[weights_half + target * taps + sample - low] = weight
    return taps


@kernel
def blend_plain(planes, start, stride, weights, first_weight, count, target):
    """Blend 32 samples of `count` lines, `stride` apart, into 32 samples at `target`."""
    bias = 128 + count // 2  # the high products are rounded v_factor
    for lane in range(LANES):
        total = bias
        for i in range(count):
            sample = np.int64(planes[start + i * stride + lane])
            total += (sample << 8) * np.int64(weights[first_weight + i]) >> 16
        planes[target + lane] = total >> 8


@kernel
def blend_many(planes, start, stride, weights, first_weight, count, target):
    """The same, rounded once, for strong reductions."""
    for lane in range(LANES):
        total = np.int64(1 << 15)  # half of what the last shift takes
        for i in range(count):
            sample = np.int64(planes[start + i * stride + lane])
            total += sample * np.int64(weights[first_weight + i])
        planes[target + lane] = min(total >> 16, 255)


@intrinsic
def blend_vector(typing_context, planes, start, stride, weights, first_weight, count, target):
    """The same on lanes of 16 bits."""
    narrow, lane, wide = vector_type(8, LANES), vector_type(16, LANES), vector_type(32, LANES)

    def generate(context, builder, signature, arguments):
        planes_value, first, step, weights_value, weight, number, to = arguments
        # The same bias as in blend_plain.
        half = builder.lshr(number, number.type(1))
        bias = builder.add(half, half.type(128))
        total = cgutils.alloca_once_value(builder, _splat(builder, bias, lane))
        with cgutils.for_range(builder, number, intp=number.type) as loop:
            offset = builder.add(first, builder.mul(step, loop.index))
            line = pointer(context, builder, signature.args[0], planes_value, offset)
            samples = builder.zext(load(builder, line, narrow), lane)
            samples = builder.shl(samples, filled(lane, 8))
            item = builder.add(weight, loop.index)
            at = pointer(context, builder, signature.args[3], weights_value, item)
            factor = builder.zext(_splat(builder, builder.load(at), lane), wide)
            # LLVM makes one instruction of widening, multiplying and shifting: the multiplication
            # that keeps the upper half (vpmulhuw).
            product = builder.mul(builder.zext(samples, wide), factor)
            high = builder.trunc(builder.lshr(product, filled(wide, 16)), lane)
            builder.store(builder.add(builder.load(total), high), total)
        levels = builder.lshr(builder.load(total), filled(lane, 8))
        at = pointer(context, builder, signature.args[0], planes_value, to)
        store(builder, builder.trunc(levels, narrow), at)
        return context.get_dummy_value()

    integer = types.int64
    arguments = (planes, integer, integer, weights, integer, integer, integer)
    return types.void(*arguments), generate


def _splat(builder, number, kind):
    """A number, cut to the lane's bits, in each lane."""
    if number.type.width > kind.element.width:
        number = builder.trunc(number, kind.element)
    # LLVM's idiom for a broadcast.
    undefined = ir.Constant(kind, ir.Undefined)
    single = builder.insert_element(undefined, number, ir.IntType(32)(0))
    return shuffled(builder, single, undefined, [0] * kind.count)


@kernel
def transpose_plain(planes, start, stride, target, target_stride):
    """Transpose a tile of 16 × 16 samples."""
    for y in range(TILE):
        for x in range(TILE):
            planes[target + x * target_stride + y] = planes[start + y * stride + x]


@intrinsic
def transpose_vector(typing_context, planes, start, stride, target, target_stride):
    """The same in four rounds of interleaving."""
    line = vector_type(8, TILE)

    def generate(context, builder, signature, arguments):
        planes_value, first, step, to, target_step = arguments
        lines = []
        for y in range(TILE):
            offset = builder.add(first, builder.mul(step, step.type(y)))
            at = pointer(context, builder, signature.args[0], planes_value, offset)
            lines.append(load(builder, at, line))
        # Line i and i + 8 are interleaved. Each round moves the highest bit of the line's number to
        # the lowest of the lane's, so after four rounds line and lane are exchanged.
        low = [lane for i in range(TILE // 2) for lane in (i, TILE + i)]
        high = [lane + TILE // 2 for lane in low]
        for _ in range(4):
            mixed = []
            for i in range(TILE // 2):
                mixed.append(shuffled(builder, lines[i], lines[i + TILE // 2], low))
                mixed.append(shuffled(builder, lines[i], lines[i + TILE // 2], high))
            lines = mixed
        for x in range(TILE):
            offset = builder.add(to, builder.mul(target_step, target_step.type(x)))
            at = pointer(context, builder, signature.args[0], planes_value, offset)
            store(builder, lines[x], at)
        return context.get_dummy_value()

    integer = types.int64
    return types.void(planes, integer, integer, integer, integer), generate


_blend = blend_vector if VECTORS else blend_plain
_transpose = transpose_vector if VECTORS else transpose_plain


@kernel
def blend_lines(work, direction, start, stride, length, taps, target, target_stride, outputs):
    """Make `outputs` lines of `length` samples from the lines at `start`; see `weigh`.

    Up to 31 samples more are read and written behind each line.
    """
    half, weights_half = direction * (len(work.firsts) // 2), direction * (len(work.weights) // 2)
    for i in range(outputs):
        source = start + work.firsts[half + i] * stride
        first_weight, count = np.int64(weights_half + i * taps), work.counts[half + i]
        # What is written behind the line is the next one's, which comes later, or padding.
        # A line's samples lie side by side; each lane blends its own and waits for no other.
        for x in range(0, length, LANES):
            at, to = np.int64(source + x), np.int64(target + i * target_stride + x)
            # Only views much smaller than their box come here, so it is not made fast.
            if count > _MOST_ROUNDED:
                blend_many(work.planes, at, np.int64(stride), work.weights, first_weight, count, to)
            else:
                _blend(work.planes, at, np.int64(stride), work.weights, first_weight, count, to)


@kernel
def transpose(planes, start, stride, lines, length, target, target_stride):
    """Transpose `lines` lines of `length` samples; both are rounded up to tiles."""
    for y in range(0, lines, TILE):
        for x in range(0, length, TILE):
            _transpose(
                planes,
                np.int64(start + y * stride + x),
                np.int64(stride),
                np.int64(target + x * target_stride + y),
                np.int64(target_stride),
            )


@inlined
def support_of(scale, factor):
    """How far the triangle reaches, for a component with 1 / factor of the resolution.

    A decoder that makes chroma larger first blurs it by a triangle of one sample; PIL's filter of
    `scale` samples comes on top of that, and their variances add up.
    """
    if factor > 1:
        return math.sqrt(1.0 + scale * scale)
    return max(scale, 1.0)
