"""The index file with which DALI's native webdataset reader reads rows of a beton."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastprune.base.errors import BetonError
from fastprune.base.files import write_text
from fastprune.beton import layout
from fastprune.beton.beton import Beton, BetonFile, RowsLike, rows_of
from fastprune.beton.opening import open_beton
from fastprune.beton.output import label_blocks_offset
from fastprune.beton.structure import read_tables

# DALI's index version; its lines name every component's file, which we use for the row.
_VERSION = "v1.2"


def write_dali_index(
    beton_path: str | Path,
    index_path: str | Path,
    *,
    subset: RowsLike = None,
) -> int:
    """Write an index that makes DALI read exactly a subset's rows from a beton.

    With it, `nvidia.dali.fn.readers.webdataset(paths=[beton_path], index_paths=[index_path],
    ext=["jpg", "cls"], dtypes=[types.UINT8, types.INT64])` gives every row's JPEG and label, and
    `fn.get_property(jpegs, key="source_info")` the row.

    Args:
        beton_path: a beton that `convert` or `compact` wrote.
        index_path: the file to write; of a sharded beton a folder, which gets an index for each
            shard that has rows of the subset.
        subset: the rows, as a file, a `Subset` or an array; None for all of them.

    Returns:
        The number of rows in the index.

    Raises:
        InvalidValueError: the rows do not index the beton.
        ArtifactMismatch: the subset was made from other images.
        BetonError: the beton is damaged, or has no aligned JPEGs and label blocks.
        ArtifactError: the index cannot be written.
    """
    beton = open_beton(beton_path)
    rows = rows_of(beton, subset)
    raw = beton.modes[rows] != layout.JPG
    if raw.any():
        raise BetonError(
            f"DALI cannot read {beton.path} natively: the image of row {rows[np.argmax(raw)]:,} is "
            "stored raw. Convert the images again: fastprune convert IMAGES train.beton"
        )
    unaligned = beton.offsets[rows] % layout.ALIGNMENT != 0
    if unaligned.any():
        row = rows[np.argmax(unaligned)]
        raise _unfit(
            beton,
            f"the image of row {row:,} starts at byte {beton.offsets[row]:,}, which is not a "
            f"multiple of {layout.ALIGNMENT}",
        )
    out = Path(index_path)
    if len(beton.files) == 1:
        write_text(out, _index(beton, beton.files[0], rows))
        return len(rows)
    out.mkdir(exist_ok=True)
    first_rows = [file.first_row for file in beton.files[1:]]
    for file, in_file in zip(
        beton.files, np.split(rows, np.searchsorted(rows, first_rows)), strict=True
    ):
        # DALI refuses an index without samples; such a shard is left out of its paths.
        if len(in_file):
            write_text(out / f"{file.path.stem}.idx", _index(beton, file, in_file))
    return len(rows)


def _index(beton: Beton, file: BetonFile, rows: NDArray[np.int64]) -> str:
    """Return the index of rows of one file; DALI counts offsets from its start."""
    blocks = _label_blocks(beton, file, rows)
    offsets, sizes = (beton.offsets[rows] - file.start).tolist(), beton.sizes[rows].tolist()
    samples = zip(rows.tolist(), offsets, sizes, blocks.tolist(), strict=True)
    lines = [
        f"jpg {offset} {size} {row} cls {block} 8 {row}\n" for row, offset, size, block in samples
    ]
    return f"{_VERSION} {len(lines)}\n{''.join(lines)}"


def _label_blocks(beton: Beton, file: BetonFile, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the file offset of every row's label block, (K,) int64."""
    tables = read_tables(file.path)
    end = int((tables.allocations["ptr"] + tables.allocations["size"]).max())
    first = label_blocks_offset(end)
    # The last block must end before the table; a label beyond it has none.
    most = (tables.table_offset - 8 - first) // layout.ALIGNMENT
    # The format has no field for where the blocks are: their content proves it.
    for label in np.unique(beton.labels[rows]).tolist():
        block = first + layout.ALIGNMENT * label
        if not 0 <= label <= most or tables.content[block : block + 8].view("<i8")[0] != label:
            raise _unfit(beton, f"it has no label block for class {label:,}")
    return first + layout.ALIGNMENT * beton.labels[rows]


def _unfit(beton: Beton, why: str) -> BetonError:
    """Describe a beton of another writer, and how to get one that DALI reads."""
    return BetonError(
        f"DALI cannot read {beton.path} natively: {why}. Rewrite it aligned, without decoding: "
        f"fastprune compact {beton.path} -o aligned.beton"
    )
