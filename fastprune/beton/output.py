"""Writing a beton: where images go, the images into the pages, and the frame around them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastprune.base.errors import ConversionError
from fastprune.base.files import write_all
from fastprune.beton import layout

# pwritev takes at most 1,024 buffers (IOV_MAX), and a gap takes one beside its image.
_MOST_BUFFERS = 512
# Smaller writes would ask the disk to work on pieces that the next write belongs to.
_FLUSH_BYTES = 1 << 20
_BLOCKS_PER_WRITE = 8192

Data = bytes | NDArray[np.uint8]


@dataclass(slots=True)
class PageCursor:
    """The end of what has been placed, and the page size so far.

    Offsets depend on the sizes and their order alone. When an image is larger than the page, the
    page doubles until it fits: what was placed before crosses no boundary of the larger pages
    either, because these are boundaries of the smaller ones too.
    """

    offset: int
    page_bytes: int

    def place(self, num_bytes: int) -> int:
        """Return the file offset for the next allocation and move behind it.

        Raises:
            ConversionError: no page can hold so much.
        """
        while num_bytes > self.page_bytes:
            self.page_bytes *= 2
        if self.page_bytes > layout.MAX_PAGE_BYTES:
            raise ConversionError(
                f"an image of {num_bytes:,} bytes is too large: a beton's page holds at most "
                f"{layout.MAX_PAGE_BYTES:,} bytes. Shrink it with --max-side"
            )
        start = layout.align_up(self.offset, layout.ALIGNMENT)
        # Stock FFCV reads a whole page and looks for the image in it.
        if start // self.page_bytes != (start + num_bytes - 1) // self.page_bytes:
            start = layout.align_up(start, self.page_bytes)
        self.offset = start + num_bytes
        return start


def write_images(descriptor: int, data: Sequence[Data], offsets: Sequence[int]) -> None:
    """Write images to their file offsets, which ascend; neighbors go out in one call.

    Raises:
        OSError: the disk is full, or the write fails otherwise.
    """
    buffers: list[Data] = []
    start = end = 0
    for image, offset in zip(data, offsets, strict=True):
        if not len(image):
            continue
        gap = offset - end
        # A gap below the alignment is padding; a longer one leads to another page.
        if buffers and not (0 <= gap < layout.ALIGNMENT and len(buffers) < _MOST_BUFFERS):
            _write_through(descriptor, buffers, start)
            buffers = []
        if not buffers:
            start = offset
        elif gap:
            # Zeros, so that the same images give the same file even over older bytes.
            buffers.append(bytes(gap))
        buffers.append(image)
        end = offset + len(image)
    if buffers:
        _write_through(descriptor, buffers, start)


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
        path: of a file that exists.
        fields: in the order of the columns.
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
            labels = np.arange(first, min(first + _BLOCKS_PER_WRITE, num_classes))
            blocks = np.zeros((len(labels), layout.ALIGNMENT // 8), "<i8")
            blocks[:, 0] = labels
            file.write(blocks.tobytes())
        file.seek(table_offset)
        file.write(table.tobytes())
        # Readers take everything up to the end of the file for the table.
        file.truncate()
        file.flush()
        os.fsync(file.fileno())
        # Write the header last: without it, readers treat the file as incomplete.
        file.seek(0)
        file.write(header)
        file.flush()
        os.fsync(file.fileno())


def label_blocks_offset(end_of_data: int) -> int:
    """Return where the label blocks start: one per class, 512 bytes apart, the label as <i8."""
    return layout.align_up(end_of_data, layout.ALIGNMENT)


def _write_through(descriptor: int, buffers: list[Data], offset: int) -> None:
    """Write all buffers, and have the disk begin with them."""
    write_all(descriptor, buffers, offset)
    total = sum(map(len, buffers))
    if total >= _FLUSH_BYTES:
        # Linux answers by starting to write dirty pages out (and keeps them in its cache): the
        # disk works while the next images are prepared, and the last flush finds little to do.
        os.posix_fadvise(descriptor, offset, total, os.POSIX_FADV_DONTNEED)
