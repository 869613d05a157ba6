"""A view of a JPEG: its crop, resized, in RGB, from the bytes to the pixels."""

import numpy as np

from fastprune.jpeg.color import color
from fastprune.jpeg.frame import (
    ACROSS,
    COMPONENTS,
    DOWN,
    HEIGHT,
    PLANE,
    STRIDE,
    WIDTH,
    read_frame,
)
from fastprune.jpeg.native import (
    BAD_BOX,
    LACKS_ROOM,
    OK,
    inlined,
    kernel,
)
from fastprune.jpeg.resize import (
    ACROSS_IT,
    DOWN_IT,
    blend_lines,
    support_of,
    transpose,
    weigh,
)
from fastprune.jpeg.scan import decode_units, prepare_tables
from fastprune.jpeg.workspace import PAD


@kernel
def read_view(data, work, top, left, height, width, output_height, output_width, flip, pixels):
    """Decode the box of a JPEG, resize it, and write (output_height * output_width * 3,) pixels.

    Returns a code; unless it is OK, the pixels are not of use.
    """
    code = read_frame(data, work)
    if code != OK:
        return code
    frame = work.frame
    if top < 0 or left < 0 or height < 1 or width < 1:
        return BAD_BOX
    if top + height > frame[HEIGHT] or left + width > frame[WIDTH]:
        return BAD_BOX
    unit_height, unit_width = 8 * frame[DOWN], 8 * frame[ACROSS]
    first_row, first_column = top // unit_height, left // unit_width
    rows = (top + height - 1) // unit_height - first_row + 1
    columns = (left + width - 1) // unit_width - first_column + 1
    outputs = _outputs_start(frame, rows, columns)
    if not _has_room(work, outputs, height, width, output_height, output_width):
        return LACKS_ROOM
    code = prepare_tables(work)
    if code == OK:
        code = decode_units(data, work, first_row, rows, first_column, columns)
    if code != OK:
        return code
    vertical = (top - first_row * unit_height, height, output_height)
    horizontal = (left - first_column * unit_width, width, output_width)
    output_bytes = output_height * output_width
    taps = (np.int64(0), np.int64(0))
    for component in range(frame[COMPONENTS]):
        # Cb has the weights of Y unless it is smaller, Cr those of Cb.
        if component == 0 or (component == 1 and frame[ACROSS] * frame[DOWN] > 1):
            taps = _weigh_component(work, component, vertical, horizontal, flip)
        target = outputs + component * output_bytes
        scratch = outputs + 3 * output_bytes + PAD
        _resize_component(work, component, taps, vertical, output_width, target, scratch)
    if frame[COMPONENTS] == 1:
        for i in range(outputs + output_bytes, outputs + 3 * output_bytes):
            work.planes[i] = 128
    color(
        work.planes,
        outputs,
        outputs + output_bytes,
        outputs + 2 * output_bytes,
        pixels,
        output_bytes,
    )
    return OK


@kernel
def _outputs_start(frame, rows, columns):
    """The end of the components' planes, where the resized ones begin."""
    total = PAD
    for component in range(frame[COMPONENTS]):
        across = frame[ACROSS] if component == 0 else 1
        down = frame[DOWN] if component == 0 else 1
        total += columns * across * 8 * (rows * down * 8 + PAD)
    return total


@kernel
def _has_room(work, outputs, height, width, output_height, output_width):
    """Whether the workspace was made for views like this one."""
    between = 2 * (height + 2 * PAD) * (output_width + 2 * PAD)
    needed = outputs + 3 * output_height * output_width + 3 * PAD + between
    scale = max(np.int64(1), -(-width // output_width), -(-height // output_height))
    most = max(output_height, output_width)
    enough = needed <= len(work.planes) and 2 * most <= len(work.firsts)
    return enough and 2 * most * (2 * scale + 4) <= len(work.weights)


@kernel
def _weigh_component(work, component, vertical, horizontal, flip):
    """Fill the weights of one component in both directions; return the taps of each.

    `vertical` and `horizontal` are (start in the decoded units, size, output size) in pixels.
    """
    top, height, output_height = vertical
    left, width, output_width = horizontal
    across, down = _factors(work.frame, component)
    first_row, lines = _lines(vertical, down)
    first_column, columns = _lines(horizontal, across)
    support = support_of(width / across / output_width, across)
    last_column = first_column + columns
    taps_across = weigh(
        work,
        ACROSS_IT,
        left / across,
        width / across,
        first_column,
        last_column,
        output_width,
        support,
        flip,
    )
    support = support_of(height / down / output_height, down)
    start = top / down - first_row
    taps_down = weigh(work, DOWN_IT, start, height / down, 0, lines, output_height, support, False)
    return taps_across, taps_down


@kernel
def _resize_component(work, component, taps, vertical, output_width, target, scratch):
    """Resize one component's part of the crop to the output's size, at `target`."""
    frame, output_height = work.frame, vertical[2]
    stride = frame[STRIDE + component]
    first_row, lines = _lines(vertical, _factors(frame, component)[1])
    between_stride = lines + PAD - lines % PAD
    start = frame[PLANE + component] + first_row
    blend_lines(
        work, ACROSS_IT, start, stride, lines, taps[0], scratch, between_stride, output_width
    )
    upright = scratch + between_stride * (output_width + PAD)
    upright_stride = output_width + PAD - output_width % PAD
    transpose(work.planes, scratch, between_stride, output_width, lines, upright, upright_stride)
    blend_lines(
        work,
        DOWN_IT,
        upright,
        upright_stride,
        output_width,
        taps[1],
        target,
        output_width,
        output_height,
    )


@inlined
def _factors(frame, component):
    """How many pixels one sample of a component is wide and high."""
    if component > 0:
        return frame[ACROSS], frame[DOWN]
    return np.int64(1), np.int64(1)


@inlined
def _lines(extent, factor):
    """The first line of samples in an extent of pixels, and how many there are."""
    start, size, _ = extent
    first = start // factor
    return first, -(-(start + size) // factor) - first
