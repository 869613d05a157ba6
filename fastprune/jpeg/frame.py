"""Compiled walk over the segments in front of the scan: sizes, tables, where the scan begins.

Whatever is unusual is called unsupported here, damage too: a full decoder then has the last word.
"""

import numpy as np

from fastprune.jpeg.native import OK, UNSUPPORTED, inlined, kernel
from fastprune.jpeg.workspace import NUM_TABLES, SPEC_BYTES, ZIGZAG

# Items of Workspace.frame. Those of the second and third line are three each, one a component.
# H_FACTOR and V_FACTOR are the sampling factors of the first component; the others' are 1.
WIDTH, HEIGHT, COMPONENTS, H_FACTOR, V_FACTOR, RESTART, SCAN = range(7)
QUANTIZER, DC_TABLE, AC_TABLE, COMPONENT_ID = 8, 12, 16, 20
PLANE, STRIDE = 28, 32  # where the component's samples are in Workspace.planes, see scan.py
_JFIF, _ADOBE, _QUANTIZERS_SEEN = 24, 25, 26

_LARGEST_SIDE = 65_500
_NO_ADOBE = -1


@kernel
def read_frame(data, work):
    """Fill the workspace's frame, quantizers and Huffman specs; return a code."""
    frame = work.frame
    for i in range(len(frame)):
        frame[i] = 0
    frame[_ADOBE] = _NO_ADOBE
    for table in range(NUM_TABLES):
        for i in range(16):
            work.specs[table * SPEC_BYTES + i] = 0
    size = len(data)
    if size < 4 or data[0] != 0xFF or data[1] != 0xD8:
        return UNSUPPORTED
    at = 2
    while at + 4 <= size and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        length = data[at + 2] << 8 | data[at + 3]
        start, end = at + 4, at + 2 + length
        if length < 2 or end > size:
            return UNSUPPORTED
        if marker == 0xDA:
            frame[SCAN] = end
            return _read_scan_header(data, start, end, work)
        code = _read_segment(data, marker, start, end, work)
        if code != OK:
            return code
        at = end
    return UNSUPPORTED


@kernel
def _read_segment(data, marker, start, end, work):
    """Take from one segment what decoding needs."""
    frame = work.frame
    if marker == 0xDB:
        return _read_quantizers(data, start, end, work)
    if marker == 0xC4:
        return _read_huffman_tables(data, start, end, work)
    if marker == 0xC0 or marker == 0xC1:
        return _read_frame_header(data, start, end, frame)
    if marker == 0xDD:
        if end - start < 2:
            return UNSUPPORTED
        frame[RESTART] = data[start] << 8 | data[start + 1]
    elif marker == 0xE0:
        frame[_JFIF] |= end - start >= 5 and data[start] == 0x4A and data[start + 1] == 0x46
    elif marker == 0xEE:
        if end - start >= 12 and data[start] == 0x41 and data[start + 1] == 0x64:
            frame[_ADOBE] = data[start + 11]
    elif marker < 0xE0 or marker == 0xFF:
        return UNSUPPORTED
    return OK


@kernel
def _read_quantizers(data, start, end, work):
    """A DQT segment: tables in zigzag order, of 8 or 16 bits."""
    at = start
    while at < end:
        wide, table = data[at] >> 4, data[at] & 15
        at += 1
        if wide > 1 or table > 3 or at + (64 << wide) > end:
            return UNSUPPORTED
        for i in range(64):
            value = data[at + 2 * i] << 8 | data[at + 2 * i + 1] if wide else data[at + i]
            work.quantizers[table * 64 + ZIGZAG[i]] = value
        work.frame[_QUANTIZERS_SEEN] |= 1 << table
        at += 64 << wide
    return OK


@kernel
def _read_huffman_tables(data, start, end, work):
    """A DHT segment: counts of the sixteen code lengths, then the symbols."""
    at = start
    while at < end:
        kind, table = data[at] >> 4, data[at] & 15
        at += 1
        if kind > 1 or table > 3 or at + 16 > end:
            return UNSUPPORTED
        spec = (kind * 4 + table) * SPEC_BYTES
        num_symbols = 0
        for i in range(16):
            num_symbols += data[at + i]
            work.specs[spec + i] = data[at + i]
        at += 16
        if num_symbols > 256 or at + num_symbols > end:
            return UNSUPPORTED
        for i in range(num_symbols):
            work.specs[spec + 16 + i] = data[at + i]
        for i in range(num_symbols, 256):
            work.specs[spec + 16 + i] = 0
        at += num_symbols
    return OK


@kernel
def _read_frame_header(data, start, end, frame):
    """A baseline (or extended, 8-bit Huffman) frame header."""
    if end - start < 9 or data[start] != 8 or frame[COMPONENTS] != 0:
        return UNSUPPORTED
    components = data[start + 5]
    if end - start < 6 + 3 * components or (components != 1 and components != 3):
        return UNSUPPORTED
    frame[HEIGHT] = data[start + 1] << 8 | data[start + 2]
    frame[WIDTH] = data[start + 3] << 8 | data[start + 4]
    frame[COMPONENTS] = components
    for side in (frame[HEIGHT], frame[WIDTH]):
        if side < 1 or side > _LARGEST_SIDE:
            return UNSUPPORTED
    for component in range(components):
        at = start + 6 + 3 * component
        frame[COMPONENT_ID + component] = data[at]
        sampling = data[at + 1]
        if component == 0:
            # A scan of one component is not interleaved: its sampling has no effect.
            frame[H_FACTOR] = sampling >> 4 if components == 3 else 1
            frame[V_FACTOR] = sampling & 15 if components == 3 else 1
        elif sampling != 0x11:
            return UNSUPPORTED
        if data[at + 2] > 3:
            return UNSUPPORTED
        frame[QUANTIZER + component] = data[at + 2]
    for factor in (frame[H_FACTOR], frame[V_FACTOR]):
        if factor < 1 or factor > 2:
            return UNSUPPORTED
    return OK


@kernel
def _read_scan_header(data, start, end, work):
    """The scan's tables; all components in frame order, all 64 coefficients at once."""
    frame = work.frame
    components = frame[COMPONENTS]
    if components == 0 or end - start != 4 + 2 * components or data[start] != components:
        return UNSUPPORTED
    for component in range(components):
        at = start + 1 + 2 * component
        dc, ac = data[at + 1] >> 4, data[at + 1] & 15
        if data[at] != frame[COMPONENT_ID + component] or dc > 3 or ac > 3:
            return UNSUPPORTED
        frame[DC_TABLE + component], frame[AC_TABLE + component] = dc, 4 + ac
        if not (frame[_QUANTIZERS_SEEN] >> frame[QUANTIZER + component]) & 1:
            return UNSUPPORTED
    at = end - 3
    if data[at] != 0 or data[at + 1] != 63 or data[at + 2] != 0:
        return UNSUPPORTED
    return OK if components == 1 or _is_ycbcr(frame) else UNSUPPORTED


@inlined
def sampling_factors(frame, component):
    """Blocks per MCU of a component, horizontally and vertically; chroma has one of each."""
    if component > 0:
        return np.int64(1), np.int64(1)
    return frame[H_FACTOR], frame[V_FACTOR]


@kernel
def _is_ycbcr(frame):
    """Libjpeg's guess of the color space (jdapimin.c, default_decompress_parms)."""
    if frame[_JFIF]:
        return True
    if frame[_ADOBE] != _NO_ADOBE:
        return frame[_ADOBE] != 0
    named_rgb = (
        frame[COMPONENT_ID] == 0x52
        and frame[COMPONENT_ID + 1] == 0x47
        and frame[COMPONENT_ID + 2] == 0x42
    )
    return not named_rgb
