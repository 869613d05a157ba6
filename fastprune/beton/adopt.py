"""A manifest for a beton of another writer."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import google_crc32c
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fastprune.base.errors import ArtifactError, ForeignManifestWarning
from fastprune.base.progress import track
from fastprune.base.provenance import Fingerprint, content_digest
from fastprune.beton.beton import Beton
from fastprune.beton.convert.transcode import ACTIONS, FOUND
from fastprune.beton.manifest import SCHEMA, Manifest, manifest_path, write_manifest
from fastprune.beton.opening import open_beton

_MANIFEST_LINES = 1 << 16


def adopt(path: str | Path) -> Manifest:
    """Write a manifest for a beton of another writer, so that its contents have a fingerprint.

    The CRC-32C of the stored bytes stands for the source's, which nobody knows any more.

    Args:
        path: a whole beton without a manifest, or with one that is not its own.

    Returns:
        The manifest, written beside the beton.

    Raises:
        BetonError: the beton is damaged.
        ArtifactError: it has its manifest already, or the manifest cannot be written.
    """
    with warnings.catch_warnings():
        # A manifest of another beton is what this one replaces.
        warnings.simplefilter("ignore", ForeignManifestWarning)
        beton = open_beton(path)
    if beton.manifest is not None:
        raise ArtifactError(
            f"{manifest_path(path)} belongs to {path} already, and knows more than a new one "
            "could. Remove it first if you want it made again."
        )
    rows = np.arange(beton.num_rows)
    crcs = stored_crc32c(beton, rows)
    manifest = Manifest(
        path=manifest_path(path),
        fingerprint=Fingerprint(beton.num_rows, beton.structure, content_digest(crcs)),
        class_names=None,
        counts={ACTIONS[FOUND]: beton.num_rows},
    )
    write_manifest(manifest, found_lines(beton, rows, crcs))
    return manifest


def stored_crc32c(beton: Beton, rows: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Return the CRC-32C of the stored bytes of some rows, (K,) uint32."""
    tracked = track(rows.tolist(), description="crc", total=len(rows), unit="rows")
    return np.array(
        [google_crc32c.value(beton.image_bytes(row).tobytes()) for row in tracked], np.uint32
    )


def found_lines(
    beton: Beton, rows: NDArray[np.int64], crcs: NDArray[np.uint32]
) -> Iterator[pa.RecordBatch]:
    """Yield the manifest's lines of rows of unknown origin.

    Args:
        beton: has the images.
        rows: (K,) int64.
        crcs: (K,) CRC-32C of the stored bytes.
    """
    for start in range(0, len(rows), _MANIFEST_LINES):
        piece = rows[start : start + _MANIFEST_LINES]
        columns = {
            "row": piece,
            "label": beton.labels[piece],
            "bytes": beton.sizes[piece],
            "width": beton.widths[piece].astype(np.int32),
            "height": beton.heights[piece].astype(np.int32),
            "action": [ACTIONS[FOUND]] * len(piece),
            "source_crc32c": crcs[start : start + len(piece)],
            "stored_crc32c": crcs[start : start + len(piece)],
        }
        unknown = [None] * len(piece)
        yield pa.RecordBatch.from_arrays(
            [pa.array(columns.get(entry.name, unknown), entry.type) for entry in SCHEMA],
            schema=SCHEMA,
        )
