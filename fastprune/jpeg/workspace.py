"""The memory that one thread decodes with: made once, grown for larger images, never shared."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

LOOKUP_BITS = 10
SKIP_BITS = 12
# Tables lie a little further apart than they are long: of a power of two LLVM makes one double
# shift of base and index, which is slow, where every symbol waits for it.
LOOKUP_STRIDE = (1 << LOOKUP_BITS) + 8
SKIP_STRIDE = (1 << SKIP_BITS) + 8
NUM_TABLES = 8  # four for DC, then four for AC
SPEC_BYTES = 16 + 256
LIMIT_ITEMS = 34
# Behind the 64 coefficients of a block there is a spare item, so that the symbol that ends a block
# is stored like others. A power of two makes a block's offset a shift.
BLOCK_STRIDE = 128
GUARD_BYTES = 2048
PAD = 64

# Where the coefficient of a zigzag index lies in its block: along the diagonals, in alternating
# direction (T.81, figure A.6). What lies beyond the 63rd goes to the spare item.
ZIGZAG = np.full(256, 64, np.uint8)
ZIGZAG[:64] = sorted(
    range(64),
    key=lambda i: (i // 8 + i % 8, i // 8 if (i // 8 + i % 8) % 2 else i % 8),
)


class Workspace(NamedTuple):
    """Arrays that compiled code fills; what they hold is of no use outside.

    Attributes:
        frame: (40,) int64, the parsed header; its items are named in frame.py.
        quantizers: (4 * 64,) int16, quantization tables in the order of a block.
        specs: (8 * 272,) uint8, the image's Huffman tables: 16 counts, 256 symbols each.
        built: (8 * 272,) uint8, the tables that `lookups` were built from.
        lookups: (8 * 1032,) uint32, see tables.py.
        pairs: (4 * 1032,) uint64, AC lookups with a second symbol, see tables.py.
        limits: (8 * 34,) int32, for codes that are longer than a lookup.
        skip_built: (4 * 272,) uint8, the tables that `skips` were built from.
        skips: (4 * 4104,) uint16, several symbols at a step.
        steps: (8192,) uint16, the skip tables for fewer bits, while one is built.
        blocks: (4 * 128,) int16, the block being decoded and those before it.
        predictions: (4,) int64, the last DC value of each component.
        stream: uint8, entropy-coded data without its stuffing.
        starts: int64, where each restart interval begins in `stream`.
        planes: uint8, the components inside the crop, and what the resize makes of them.
        firsts: int64, the first sample that each output sample is made of; one half of it for
            each direction, as in the next two.
        counts: int64, how many they are.
        weights: uint16, how much each sample counts; 65535 together.
    """

    frame: NDArray[np.int64]
    quantizers: NDArray[np.int16]
    specs: NDArray[np.uint8]
    built: NDArray[np.uint8]
    lookups: NDArray[np.uint32]
    pairs: NDArray[np.uint64]
    limits: NDArray[np.int32]
    skip_built: NDArray[np.uint8]
    skips: NDArray[np.uint16]
    steps: NDArray[np.uint16]
    blocks: NDArray[np.int16]
    predictions: NDArray[np.int64]
    stream: NDArray[np.uint8]
    starts: NDArray[np.int64]
    planes: NDArray[np.uint8]
    firsts: NDArray[np.int64]
    counts: NDArray[np.int64]
    weights: NDArray[np.uint16]


def make_workspace(
    *, file_bytes: int, width: int, height: int, output_height: int, output_width: int
) -> Workspace:
    """Room for every JPEG up to this size, and every box in it.

    Memory that is not touched costs nothing, so generous numbers are fine.

    Args:
        file_bytes: of the largest file.
        width: of the widest image, in pixels.
        height: of the tallest image, in pixels.
        output_height: of the views, in pixels.
        output_width: of the views, in pixels.
    """
    taps = _most_taps(width, height, output_height, output_width)
    outputs = max(output_height, output_width)
    return Workspace(
        frame=np.zeros(40, np.int64),
        quantizers=np.zeros(4 * 64, np.int16),
        specs=np.zeros(NUM_TABLES * SPEC_BYTES, np.uint8),
        built=np.zeros(NUM_TABLES * SPEC_BYTES, np.uint8),
        lookups=np.zeros(NUM_TABLES * LOOKUP_STRIDE, np.uint32),
        pairs=np.zeros(4 * LOOKUP_STRIDE, np.uint64),
        limits=np.zeros(NUM_TABLES * LIMIT_ITEMS, np.int32),
        skip_built=np.zeros(4 * SPEC_BYTES, np.uint8),
        skips=np.zeros(4 * SKIP_STRIDE, np.uint16),
        steps=np.zeros(2 << SKIP_BITS, np.uint16),
        blocks=np.zeros(4 * BLOCK_STRIDE, np.int16),
        predictions=np.zeros(4, np.int64),
        stream=np.empty(file_bytes + GUARD_BYTES, np.uint8),
        starts=np.empty(file_bytes // 2 + 2, np.int64),
        planes=np.empty(plane_room(width, height, output_height, output_width), np.uint8),
        firsts=np.empty(2 * outputs, np.int64),
        counts=np.empty(2 * outputs, np.int64),
        weights=np.empty(2 * outputs * taps, np.uint16),
    )


def workspace_bytes(
    file_bytes: int, width: int, height: int, output_height: int, output_width: int
) -> int:
    """Bytes of the arrays of `make_workspace` whose size depends on these."""
    weights = (
        4
        * max(output_height, output_width)
        * _most_taps(width, height, output_height, output_width)
    )
    # The stream is as long as the file, and there is an int64 for each two bytes of it.
    return 5 * file_bytes + plane_room(width, height, output_height, output_width) + weights


def plane_room(width: int, height: int, output_height: int, output_width: int) -> int:
    """Bytes that `planes` needs at most."""
    padded_width, padded_height = width + 4 * PAD, height + 4 * PAD
    padded_output = output_width + 2 * PAD
    resized = padded_height * padded_output * 2
    outputs = 3 * (output_height * output_width + PAD)
    return 3 * padded_width * padded_height + resized + outputs + 8 * PAD


def _most_taps(width: int, height: int, output_height: int, output_width: int) -> int:
    """More samples than any output sample is made of."""
    scale = max(1, -(-width // output_width), -(-height // output_height))
    return 2 * scale + 4
