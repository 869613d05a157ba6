"""Is every image of a beton what its metadata and its checksum say?"""

import warnings
from concurrent.futures import ThreadPoolExecutor

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from fastprune.beton import layout
from fastprune.beton.row_check import Placement
from fastprune.beton.structure import Fault, Tables
from fastprune.cpus import usable_cpus
from fastprune.errors import JpegError
from fastprune.jpeg.headers import read_header
from fastprune.progress import track

_ROWS_PER_TASK = 64


def image_faults(
    tables: Tables, image: int, placement: Placement, crcs: dict[int, int] | None
) -> list[Fault]:
    """Decode every image that lies inside the file, on every core.

    Args:
        tables: the parts of the beton; other rows may be damaged.
        image: the index of the image field.
        placement: where the images lie.
        crcs: row -> CRC-32C of its stored bytes; None where nobody knows them.

    Returns:
        At most one fault per row, in row order.
    """
    rows = _readable_rows(tables, placement)
    pieces = [rows[at : at + _ROWS_PER_TASK] for at in range(0, len(rows), _ROWS_PER_TASK)]
    columns = tables.metadata[f"f{image}"]

    def check(piece: NDArray[np.int64]) -> list[Fault]:
        found = []
        for row in piece.tolist():
            start = placement.offsets[row]
            stored = tables.content[start : start + placement.sizes[row]].tobytes()
            fault = _fault(row, stored, columns[row], crcs)
            if fault is not None:
                found.append(fault)
        return found

    # Images are decoded without the interpreter's lock. PIL's warnings of metadata are no faults;
    # they are silenced here, once, because doing so is not safe in the threads.
    with warnings.catch_warnings(), ThreadPoolExecutor(usable_cpus()) as pool:
        warnings.simplefilter("ignore")
        done = track(
            pool.map(check, pieces),
            description="check",
            total=len(rows),
            unit="images",
            step=_ROWS_PER_TASK,
        )
        return [fault for piece in done for fault in piece]


def _readable_rows(tables: Tables, placement: Placement) -> NDArray[np.int64]:
    """Rows whose data lies inside the file, even when other rows' does not."""
    offsets, sizes, end = placement.offsets, placement.sizes, tables.table_offset
    inside = (sizes > 0) & (offsets >= tables.data_offset) & (sizes <= end)
    return np.flatnonzero(inside & (offsets <= end - np.minimum(sizes, end)))


def _fault(row: int, stored: bytes, record: np.void, crcs: dict[int, int] | None) -> Fault | None:
    """The first thing that is wrong with one image."""
    if crcs is not None and google_crc32c.value(stored) != crcs.get(row):
        return Fault("crc", "its bytes are not those that were written (CRC-32C)", row)
    if record["mode"] == layout.RAW:
        return None
    # Numba is loaded for a deep check alone.
    from fastprune.jpeg.decode import require_whole

    width, height = int(record["width"]), int(record["height"])
    try:
        header = read_header(stored)
        if (header.width, header.height) != (width, height):
            actual = f"its JPEG has {header.width} x {header.height} pixels"
            return Fault("extent", f"{actual}, but the metadata says {width} x {height}", row)
        # Stricter than libjpeg, which makes up what is damaged: as the loader is.
        require_whole(stored, height=height, width=width)
    except JpegError as error:
        return Fault("image", f"its image is damaged: {error}", row)
    return None
