"""The manifest beside a beton: where every row came from and what was done to it."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fastprune import __version__
from fastprune.artifacts.atomic import atomic_path
from fastprune.artifacts.fingerprint import Fingerprint
from fastprune.errors import ArtifactError
from fastprune.untrusted import member, parquet_metadata

_METADATA_KEY = b"fastprune"

SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("source_index", pa.int64()),
        ("source", pa.string()),
        ("label", pa.int64()),
        ("class_name", pa.string()),
        ("bytes", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("action", pa.string()),
        ("reason", pa.string()),
        ("source_crc32c", pa.uint32()),
        ("stored_crc32c", pa.uint32()),
    ]
)


@dataclass(frozen=True)
class Manifest:
    """A beton's manifest as a whole; `table` has the lines.

    Attributes:
        path: the Parquet file.
        fingerprint: the identity of the images.
        class_names: name of every class in the order of the labels; None where the source had none.
        counts: lines per action: "copied", "rewritten" (the fast layout), "transcoded", "skipped",
            and "found" in a manifest that `fastprune check` made for a beton of another writer.
        settings: how the beton was made: the options that determine its bytes.
        version: the version of fastprune that wrote it.
    """

    path: Path
    fingerprint: Fingerprint
    class_names: tuple[str, ...] | None
    counts: dict[str, int]
    settings: dict[str, Any] = field(default_factory=dict)
    version: str = __version__

    def table(self, columns: list[str] | None = None) -> pa.Table:
        """Read the lines: one per row in row order, then one per skipped image, whose row is null.

        Args:
            columns: the columns to read; all of them by default.

        Returns:
            A table with the columns of `SCHEMA`.

        Raises:
            ArtifactError: the file cannot be read.
        """
        try:
            return pq.read_table(self.path, columns=columns)
        except (OSError, pa.ArrowException) as error:
            raise ArtifactError(
                f"{self.path} cannot be read ({error}). {_cure(self.path)}"
            ) from error


def manifest_path(beton_path: str | Path) -> Path:
    """Return where the manifest of a beton stands."""
    beton_path = Path(beton_path)
    return beton_path.with_name(beton_path.name + ".manifest.parquet")


def write_manifest(manifest: Manifest, batches: Iterable[pa.RecordBatch]) -> None:
    """Write a manifest, whole or not at all.

    Args:
        manifest: what to put into the file's metadata, and where.
        batches: the lines, in pieces; all of `SCHEMA` or all with the same further columns.

    Raises:
        ArtifactError: the file cannot be written.
    """
    with atomic_path(manifest.path) as temporary:
        write_parquet(temporary, manifest, batches)


def write_parquet(path: Path, manifest: Manifest, batches: Iterable[pa.RecordBatch]) -> None:
    """Write a manifest's file under any name, for a caller who renames it."""
    metadata = {
        "fingerprint": manifest.fingerprint.to_dict(),
        "class_names": manifest.class_names,
        "counts": manifest.counts,
        "settings": manifest.settings,
        "version": manifest.version,
    }
    writer = None
    try:
        for batch in batches:
            if writer is None:
                schema = batch.schema.with_metadata({_METADATA_KEY: json.dumps(metadata)})
                writer = pq.ParquetWriter(path, schema, compression="zstd")
            writer.write_batch(batch)
    finally:
        if writer is not None:
            writer.close()


def read_manifest(path: str | Path) -> Manifest:
    """Read what a manifest says of its beton; the lines stay on disk.

    Raises:
        ArtifactError: the file is missing, no Parquet, or no manifest.
    """
    path = Path(path)
    try:
        metadata = parquet_metadata(path, _METADATA_KEY)
        names = member(metadata, "class_names", list, None)
        if names is not None and not all(isinstance(name, str) for name in names):
            raise ValueError("its 'class_names' must be texts")
        return Manifest(
            path=path,
            fingerprint=Fingerprint.from_dict(member(metadata, "fingerprint", dict)),
            class_names=None if names is None else tuple(names),
            counts=member(metadata, "counts", dict),
            settings=member(metadata, "settings", dict),
            version=member(metadata, "version", str),
        )
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} is no manifest of a beton ({error}). {_cure(path)}") from error


def _cure(path: Path) -> str:
    """Say what to run when a manifest is no good."""
    beton = str(path).removesuffix(".manifest.parquet")
    return f"Make it again: fastprune check {beton} --deep --write-manifest"
