"""Writing a beton: images into the pages, and the frame around them."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastprune.beton import layout
from fastprune.beton.pages import PageCursor

_MOST_BUFFERS = 512  # pwritev takes at most 1,024 (IOV_MAX)
_FLUSH_BYTES = 1 << 20
_BLOCKS_PER_WRITE = 8192

Data = bytes | NDArray[np.uint8]


def write_images(descriptor: int, data: Sequence[Data], offsets: Sequence[int]) -> None:
    """Write images to their places; what lies together goes out in one call.

    Args:
        descriptor: a file open for writing.
        data: the images; empty ones are passed over.
        offsets: the file offset of each, ascending.

    Raises:
        OSError: the disk is full, or the system refuses otherwise.
    """
    buffers: list[Data] = []
    start = end = 0
    for image, offset in zip(data, offsets, strict=True):
        if not len(image):
            continue
        gap = offset - end
        if buffers and not (0 <= gap < layout.ALIGNMENT and len(buffers) < _MOST_BUFFERS):
            _write_all(descriptor, buffers, start)
            buffers = []
        if not buffers:
            start = offset
        elif gap:
            buffers.append(bytes(gap))
        buffers.append(image)
        end = offset + len(image)
    if buffers:
        _write_all(descriptor, buffers, start)


def write_frame(
    path: Path,
    fields: tuple[layout.Field, ...],
    metadata: NDArray[np.void],
    table: NDArray[np.void],
    cursor: PageCursor,
    num_classes: int,
) -> None:
    """Complete a file whose pages are written, and flush it to the disk; the header goes last.

    Args:
        path: the file.
        fields: the columns.
        metadata: (N,) records of `layout.metadata_dtype(fields)`.
        table: (A,) of dtype `layout.ALLOCATION`.
        cursor: the end of the data and the page size.
        num_classes: how many label blocks to write for DALI, behind the data.
    """
    blocks_offset = label_blocks_offset(cursor.offset)
    blocks_end = blocks_offset + num_classes * layout.ALIGNMENT
    table_offset = layout.align_up(blocks_end, cursor.page_bytes)
    header = layout.pack_header(len(fields), cursor.page_bytes, len(metadata), table_offset)
    with path.open("r+b") as file:
        file.seek(layout.HEADER.itemsize)
        file.write(layout.pack_descriptors(fields))
        file.write(metadata.tobytes())
        file.seek(blocks_offset)
        for first in range(0, num_classes, _BLOCKS_PER_WRITE):
            file.write(_label_blocks(first, min(first + _BLOCKS_PER_WRITE, num_classes)))
        file.seek(table_offset)
        file.write(table.tobytes())
        file.truncate()
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        file.write(header)
        file.flush()
        os.fsync(file.fileno())


def label_blocks_offset(end_of_data: int) -> int:
    """Where the label blocks start: one per class, 512 bytes apart, the label as <i8 in each."""
    return layout.align_up(end_of_data, layout.ALIGNMENT)


def _label_blocks(first: int, end: int) -> bytes:
    """The label blocks of the classes in [first, end)."""
    blocks = np.zeros((end - first, layout.ALIGNMENT // 8), "<i8")
    blocks[:, 0] = np.arange(first, end)
    return blocks.tobytes()


def sync(path: Path) -> None:
    """Flush a file, or the renames in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        # Not every file system can flush a folder.
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, buffers: list[Data], offset: int) -> None:
    """`pwritev`, repeated until everything is written: a disk that fills up writes a part first."""
    total = sum(map(len, buffers))
    written = os.pwritev(descriptor, buffers, offset)  # type: ignore[arg-type]
    if written < total:
        rest = memoryview(b"".join(map(bytes, buffers)))[written:]
        while rest:
            written = os.pwrite(descriptor, rest, offset + total - len(rest))
            rest = rest[written:]
    if total >= _FLUSH_BYTES:
        # Told so, Linux starts to write dirty pages out (and keeps them in its cache): the disk
        # works while the next images are prepared, and the last flush finds little left to do.
        os.posix_fadvise(descriptor, offset, total, os.POSIX_FADV_DONTNEED)
