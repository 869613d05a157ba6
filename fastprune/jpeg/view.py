"""A view of a JPEG: its crop, resized, in RGB, from the bytes to the pixels."""

import numpy as np

from fastprune.jpeg.color import ycc_to_rgb
from fastprune.jpeg.frame import (
    COMPONENTS,
    H_FACTOR,
    HEIGHT,
    PLANE,
    STRIDE,
    V_FACTOR,
    WIDTH,
    read_frame,
    sampling_factors,
)
from fastprune.jpeg.native import (
    BAD_BOX,
    LACKS_ROOM,
    OK,
    inlined,
    kernel,
)
from fastprune.jpeg.resize import (
    HORIZONTAL,
    VERTICAL,
    blend_lines,
    support_of,
    transpose,
    weigh,
)
from fastprune.jpeg.scan import decode_mcus, prepare_tables
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
    mcu_height, mcu_width = 8 * frame[V_FACTOR], 8 * frame[H_FACTOR]
    first_row, first_column = top // mcu_height, left // mcu_width
    rows = (top + height - 1) // mcu_height - first_row + 1
    columns = (left + width - 1) // mcu_width - first_column + 1
    outputs = _outputs_start(frame, rows, columns)
    if not _has_room(work, outputs, height, width, output_height, output_width):
        return LACKS_ROOM
    code = prepare_tables(work)
    if code == OK:
        code = decode_mcus(data, work, first_row, rows, first_column, columns)
    if code != OK:
        return code
    vertical = (top - first_row * mcu_height, height, output_height)
    horizontal = (left - first_column * mcu_width, width, output_width)
    output_bytes = output_height * output_width
    taps = (np.int64(0), np.int64(0))
    for component in range(frame[COMPONENTS]):
        # Cb has the weights of Y unless it is smaller; Cr has the weights of Cb.
        if component == 0 or (component == 1 and frame[H_FACTOR] * frame[V_FACTOR] > 1):
            taps = _weigh_component(work, component, vertical, horizontal, flip)
        target = outputs + component * output_bytes
        scratch = outputs + 3 * output_bytes + PAD
        _resize_component(work, component, taps, vertical, output_width, target, scratch)
    if frame[COMPONENTS] == 1:
        for i in range(outputs + output_bytes, outputs + 3 * output_bytes):
            work.planes[i] = 128
    ycc_to_rgb(
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
        h_factor, v_factor = sampling_factors(frame, component)
        total += columns * h_factor * 8 * (rows * v_factor * 8 + PAD)
    return total


@kernel
def _has_room(work, outputs, height, width, output_height, output_width):
    """Whether the workspace was made for views like this one."""
    middle = 2 * (height + 2 * PAD) * (output_width + 2 * PAD)
    needed = outputs + 3 * output_height * output_width + 3 * PAD + middle
    scale = max(np.int64(1), -(-width // output_width), -(-height // output_height))
    most = max(output_height, output_width)
    enough = needed <= len(work.planes) and 2 * most <= len(work.firsts)
    return enough and 2 * most * (2 * scale + 4) <= len(work.weights)


@kernel
def _weigh_component(work, component, vertical, horizontal, flip):
    """Fill the weights of one component in both directions; return the taps of each.

    `vertical` and `horizontal` are (start in the decoded MCUs, size, output size) in pixels.
    """
    top, height, output_height = vertical
    left, width, output_width = horizontal
    across, down = _pixels_per_sample(work.frame, component)
    first_row, lines = _lines(vertical, down)
    first_column, columns = _lines(horizontal, across)
    support = support_of(width / across / output_width, across)
    last_column = first_column + columns
    taps_across = weigh(
        work,
        HORIZONTAL,
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
    taps_down = weigh(work, VERTICAL, start, height / down, 0, lines, output_height, support, False)
    return taps_across, taps_down


@kernel
def _resize_component(work, component, taps, vertical, output_width, target, scratch):
    """Resize one component's part of the crop to the output's size, at `target`."""
    frame, output_height = work.frame, vertical[2]
    stride = frame[STRIDE + component]
    first_row, lines = _lines(vertical, _pixels_per_sample(frame, component)[1])
    middle_stride = lines + PAD - lines % PAD
    start = frame[PLANE + component] + first_row
    blend_lines(
        work, HORIZONTAL, start, stride, lines, taps[0], scratch, middle_stride, output_width
    )
    upright = scratch + middle_stride * (output_width + PAD)
    upright_stride = output_width + PAD - output_width % PAD
    transpose(work.planes, scratch, middle_stride, output_width, lines, upright, upright_stride)
    blend_lines(
        work,
        VERTICAL,
        upright,
        upright_stride,
        output_width,
        taps[1],
        target,
        output_width,
        output_height,
    )


@inlined
def _pixels_per_sample(frame, component):
    """Pixels that one sample of a component is wide and high."""
    if component > 0:
        return frame[H_FACTOR], frame[V_FACTOR]
    return np.int64(1), np.int64(1)


@inlined
def _lines(extent, factor):
    """The first line of samples in an extent of pixels, and how many there are."""
    start, size, _ = extent
    first = start // factor
    return first, -(-(start + size) // factor) - first
