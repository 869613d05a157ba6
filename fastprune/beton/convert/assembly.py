"""A beton in the making: where every image goes, and at the end the frame around the pages."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fastprune.base.checks import MAX_CLASSES
from fastprune.base.errors import ConversionError
from fastprune.base.provenance import Fingerprint, content_digest, structure_digest
from fastprune.beton import layout
from fastprune.beton.convert.journal import RECORD
from fastprune.beton.convert.listing import Listing
from fastprune.beton.convert.transcode import ACTIONS, SKIPPED
from fastprune.beton.manifest import SCHEMA
from fastprune.beton.output import PageCursor, write_frame

FIELDS = (layout.Field("image", "image"), layout.Field("label", "int"))

_MANIFEST_LINES = 1 << 16


@dataclass
class Assembly:
    """The images in the order of their rows, and how far each has come.

    A position is an image's number in that order; skipped images have a position but no row.

    Attributes:
        listing: the images of the source, or of the shard.
        first_page: offset of the first page, in bytes.
        order: (N,) the image of the listing that comes at each position.
        cursor: where the next image goes.
        records: (N,) of dtype `RECORD`, by position.
        offsets: (N,) int64 file offsets, by position; -1 for a skipped image.
        reasons: why an image was transcoded or skipped, or copied though it should have been
            rewritten, by position.
        num_placed: positions that have their offset.
        is_framed: whether the file is whole.
    """

    listing: Listing
    first_page: int
    order: NDArray[np.int64]
    cursor: PageCursor
    records: NDArray[np.void]
    offsets: NDArray[np.int64]
    reasons: dict[int, str] = field(default_factory=dict)
    num_placed: int = 0
    is_framed: bool = False

    @property
    def kept(self) -> NDArray[np.int64]:
        """(rows,) the position of every row."""
        return np.flatnonzero(self.records["action"] != SKIPPED)

    @property
    def num_classes(self) -> int:
        """Classes by name, or one more than the largest label."""
        names = self.listing.class_names
        return len(names) if names else int(self.records["label"][self.kept].max()) + 1


def row_order(count: int, shuffle_seed: int | None) -> NDArray[np.int64]:
    """Return the images in the order of their rows; the listing's order without a seed."""
    order = np.arange(count, dtype=np.int64)
    if shuffle_seed is not None:
        # The bit generator is named, because NumPy may change its default.
        order = np.random.Generator(np.random.PCG64(shuffle_seed)).permutation(order)
    return order


def start_assembly(listing: Listing, order: NDArray[np.int64], page_bytes: int) -> Assembly:
    """Return an assembly without images; its first page leaves room for the metadata."""
    count = len(order)
    # Room for every image: how many will be skipped is known only in the end.
    metadata_bytes = count * layout.metadata_dtype(FIELDS).itemsize
    first_page = layout.align_up(layout.metadata_start(len(FIELDS)) + metadata_bytes, page_bytes)
    return Assembly(
        listing=listing,
        first_page=first_page,
        order=order,
        cursor=PageCursor(first_page, page_bytes),
        records=np.zeros(count, RECORD),
        offsets=np.full(count, -1, np.int64),
    )


def place(assembly: Assembly, records: NDArray[np.void], reasons: dict[int, str]) -> list[int]:
    """Give the next images their offsets in the file.

    Args:
        assembly: takes them in.
        records: (n,) of dtype `RECORD`.
        reasons: by position in `records`.

    Returns:
        n file offsets, -1 for skipped images.

    Raises:
        ConversionError: a label is outside the classes, or an image is too large for a page.
    """
    first = assembly.num_placed
    names = assembly.listing.class_names
    limit = MAX_CLASSES if names is None else len(names)
    offsets = [-1] * len(records)
    columns = zip(*(records[name].tolist() for name in ("action", "label", "size")), strict=True)
    for index, (action, label, size) in enumerate(columns):
        if action == SKIPPED:
            continue
        try:
            if not 0 <= label < limit:
                raise ConversionError(
                    f"its label is {label:,}, but labels must lie in [0, {limit:,}). Number the "
                    "classes from 0"
                )
            offsets[index] = assembly.cursor.place(size)
        except ConversionError as error:
            where = assembly.listing.where(int(assembly.order[first + index]))
            raise ConversionError(f"{where}: {error}.") from error
    positions = slice(first, first + len(records))
    assembly.records[positions], assembly.offsets[positions] = records, offsets
    assembly.reasons.update({first + index: reason for index, reason in reasons.items()})
    assembly.num_placed += len(records)
    return offsets


def frame_pages(assembly: Assembly, path: Path) -> Fingerprint:
    """Write metadata, label blocks and table around the pages, and the header last.

    Returns:
        The fingerprint of the finished beton, which has been flushed to the disk.
    """
    kept = assembly.kept
    records, offsets = assembly.records[kept], assembly.offsets[kept]
    metadata = np.zeros(len(kept), layout.metadata_dtype(FIELDS))
    metadata["f0"]["mode"] = layout.JPG
    metadata["f0"]["width"], metadata["f0"]["height"] = records["width"], records["height"]
    metadata["f0"]["data_ptr"] = offsets
    metadata["f1"] = records["label"]
    table = np.zeros(len(kept), layout.ALLOCATION)
    table["sample_id"], table["ptr"] = np.arange(len(kept)), offsets
    table["size"] = records["size"]
    write_frame(path, FIELDS, metadata, table, assembly.cursor, assembly.num_classes)
    assembly.is_framed = True
    structure = structure_digest(records["label"], records["width"], records["height"])
    return Fingerprint(len(kept), structure, content_digest(records["source_crc32c"]))


def manifest_lines(assembly: Assembly) -> Iterator[pa.RecordBatch]:
    """Yield one line per row in row order, then one per skipped image."""
    kept = assembly.kept
    skipped = np.flatnonzero(assembly.records["action"] == SKIPPED)
    positions = np.concatenate([kept, skipped])
    for start in range(0, len(positions), _MANIFEST_LINES):
        yield _lines(assembly, positions[start : start + _MANIFEST_LINES], start, len(kept))


def _lines(
    assembly: Assembly, positions: NDArray[np.int64], first_row: int, num_rows: int
) -> pa.RecordBatch:
    """Make the lines of some positions; from `num_rows` on they are of skipped images."""
    records, listing = assembly.records[positions], assembly.listing
    indices, names = assembly.order[positions], listing.class_names
    sources = indices if listing.source_indices is None else listing.source_indices[indices]
    labels = records["label"].tolist()
    rows = np.arange(first_row, first_row + len(positions))
    no_row = rows >= num_rows
    reasons = [assembly.reasons.get(position) for position in positions.tolist()]

    def known(values: NDArray[np.generic]) -> pa.Array:
        return pa.array(values, mask=no_row)

    columns = {
        "row": known(rows),
        "source_index": sources,
        "source": [_utf8(listing.names[index]) for index in indices],
        "label": labels,
        # A skipped image's label may be no class at all.
        "class_name": [
            _utf8(names[label]) if names and 0 <= label < len(names) else None for label in labels
        ],
        "bytes": known(records["size"]),
        "width": known(records["width"].astype(np.int32)),
        "height": known(records["height"].astype(np.int32)),
        "action": [ACTIONS[action] for action in records["action"]],
        # An error's text may quote a file name that is no UTF-8.
        "reason": [
            None if reason is None else reason.encode("utf-8", "backslashreplace").decode()
            for reason in reasons
        ],
        "source_crc32c": known(records["source_crc32c"]),
        "stored_crc32c": known(records["stored_crc32c"]),
    }
    return pa.RecordBatch.from_arrays(
        [pa.array(columns[entry.name], entry.type) for entry in SCHEMA], schema=SCHEMA
    )


def _utf8(name: str) -> str:
    """Return a file name as text; bytes that are no UTF-8 are escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
