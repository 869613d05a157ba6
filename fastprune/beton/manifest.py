"""The manifest beside a beton: where every row came from and what was done to it."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fastprune import __version__
from fastprune.base.errors import ArtifactError
from fastprune.base.files import atomic_path, sync
from fastprune.base.headers import Header, read_parquet_header
from fastprune.base.provenance import Fingerprint
from fastprune.beton.row_check import per_row
from fastprune.beton.structure import Fault

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


class ManifestHeader(Header):
    """The metadata of a manifest's Parquet file; see `Manifest`."""

    fingerprint: Fingerprint
    class_names: tuple[str, ...] | None = None
    counts: dict[str, int]
    settings: dict[str, Any]
    version: str


@dataclass(frozen=True)
class Part:
    """The manifest of one shard, whose row 0 is row `first_row` of the whole."""

    path: Path
    first_row: int


@dataclass(frozen=True)
class Manifest:
    """A beton's manifest as a whole; `table` has the lines.

    Attributes:
        path: the Parquet file; of a sharded beton, manifest.json.
        class_names: name of every class in the order of the labels; None where the source had none.
        counts: lines per action: "copied", "rewritten" (the fast layout), "transcoded", "skipped",
            and "found" in a manifest that `fastprune check` made for a beton of another writer.
        settings: how the beton was made: the options that determine its bytes.
        version: of the fastprune that wrote it.
        parts: where the lines of a sharded beton are; empty for a single file.
    """

    path: Path
    fingerprint: Fingerprint
    class_names: tuple[str, ...] | None
    counts: dict[str, int]
    settings: dict[str, Any] = field(default_factory=dict)
    version: str = __version__
    parts: tuple[Part, ...] = ()

    def table(self, columns: list[str] | None = None) -> pa.Table:
        """Read the lines: one per row in row order, then one per skipped image, whose row is null.

        The table has the columns of `SCHEMA`, or the asked ones.

        Raises:
            ArtifactError: the file cannot be read.
        """
        if not self.parts:
            return _read_lines(self.path, columns)
        kept, skipped = [], []
        for part in self.parts:
            table = _read_lines(part.path, columns)
            rows = _read_lines(part.path, ["row"])["row"]
            if "row" in table.column_names:
                at = table.column_names.index("row")
                table = table.set_column(at, "row", pc.add(rows, part.first_row))
            # Skipped images come behind the rows of all shards, as in one file.
            kept.append(table.filter(rows.is_valid()))
            skipped.append(table.filter(rows.is_null()))
        return pa.concat_tables([*kept, *skipped])

    def column(self, name: str) -> pa.ChunkedArray:
        """Read a column: one entry per row, in row order, without skipped images.

        Raises:
            ArtifactError: the file cannot be read.
        """
        lines = self.table(["row", name])
        return lines.filter(pc.is_valid(lines["row"])).sort_by("row")[name]


def manifest_path(beton_path: str | Path) -> Path:
    """Return where the manifest of a beton stands: beside it, or beside the file it links to."""
    beton_path = Path(beton_path)
    beside = beton_path.with_name(f"{beton_path.name}.manifest.parquet")
    if beton_path.is_symlink():
        real = Path(os.path.realpath(beton_path))
        beside_real = real.with_name(f"{real.name}.manifest.parquet")
        # Where every file is a link of its own, as in a cache of blobs, only the names belong
        # together.
        if beside_real.exists() or not beside.exists():
            return beside_real
    return beside


def replace_pair(new_beton: Path, new_manifest: Path, path: Path) -> None:
    """Give a whole beton and its manifest their names; bring an older pair back if that fails.

    The older pair is set aside first, and the new beton gets its name last, so no beton is ever
    beside the manifest of another. A process that is killed here leaves the older pair as
    `<path>.replaced`, and the next one that ends well removes it.

    Args:
        new_beton: flushed to the disk, in the folder of `path`.
        new_manifest: likewise.
        path: the beton's name; no link.

    Raises:
        OSError: a file cannot be renamed; all of them have the names that they had before.
    """
    aside = path.with_name(f"{path.name}.replaced")
    if path.is_file():
        # Left by a process that was killed after its new pair had both names.
        _remove_pair(aside)
    moves = [
        (path, aside),
        (manifest_path(path), manifest_path(aside)),
        (new_manifest, manifest_path(path)),
        (new_beton, path),
    ]
    if manifest_path(aside).is_file():
        # A process was killed between its renames: the older pair is aside, and the manifest here
        # belongs to a beton that never got its name.
        del moves[1]
    # A folder in the way is not set aside but makes the renames below fail.
    moves = [move for move in moves if move[0].is_file()]
    try:
        for source, target in moves:
            source.replace(target)
    except BaseException:
        # Ctrl-C can come right after a rename, so look at the files instead of counting renames.
        for source, target in reversed(moves):
            if target.is_file() and not source.exists():
                target.replace(source)
        raise
    sync(path.parent)
    _remove_pair(aside)


def _remove_pair(path: Path) -> None:
    path.unlink(missing_ok=True)
    manifest_path(path).unlink(missing_ok=True)


def manifest_of(
    path: Path, columns: Mapping[str, NDArray[Any]], structure: str
) -> tuple[Manifest | None, list[Fault]]:
    """Find the manifest of a beton.

    Args:
        path: the beton.
        columns: (N,) arrays label, width, height and bytes (the size of the image's data).
        structure: the digest of the first three.

    Returns:
        The manifest, None if this beton has none; and the faults: of kind "manifest" if the
        manifest is damaged or of another beton, of other kinds, with the row, if the beton is.
    """
    beside = manifest_path(path)
    if not beside.exists():
        return None, []
    try:
        manifest = read_manifest(beside)
        if manifest.fingerprint.structure == structure:
            return manifest, []
        table = manifest.table(["row", *columns])
    except ArtifactError as error:
        return None, [Fault("manifest", str(error))]
    table = table.filter(table["row"].is_valid())
    if table.num_rows == len(columns["label"]):
        lines = {name: table[name].to_numpy() for name in columns}
        differs = {name: lines[name] != columns[name] for name in columns}
        is_equal = ~np.logical_or.reduce(list(differs.values()))
        # A flipped bit changes one value, while another beton has other sizes in bytes and differs
        # in most rows. If the beton is damaged, its manifest must not be written again.
        if not differs["bytes"].any() or 2 * is_equal.sum() >= len(is_equal):
            return None, _differences(columns, lines, differs)
    return None, [
        Fault(
            "manifest",
            f"{beside} was made for another beton ({manifest.fingerprint}) and is not used: its "
            f"structure is {manifest.fingerprint.structure}, this one's is {structure}. Remove "
            f"it, or make it again: fastprune check {path} --deep --write-manifest",
        )
    ]


def _differences(
    columns: Mapping[str, NDArray[Any]],
    lines: Mapping[str, NDArray[Any]],
    differs: Mapping[str, NDArray[np.bool_]],
) -> list[Fault]:
    """Name every value of the beton that is not the manifest's."""
    kinds = {"label": "label", "width": "extent", "height": "extent", "bytes": "size"}
    return [
        fault
        for name, kind in kinds.items()
        for fault in per_row(
            kind,
            np.flatnonzero(differs[name]),
            lambda row, name=name: (  # type: ignore[misc]
                f"its {name} is {columns[name][row]:,}, but in the manifest it is "
                f"{lines[name][row]:,}: one of them is damaged"
            ),
        )
    ]


def write_manifest(manifest: Manifest, batches: Iterable[pa.RecordBatch]) -> None:
    """Write a manifest, whole or not at all.

    All batches have the columns of `SCHEMA`, or all have the same further ones.

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
    """Read the header of a manifest; the lines stay on disk.

    Raises:
        ArtifactError: the file is missing, or not a manifest.
    """
    path = Path(path)
    header = read_parquet_header(path, _METADATA_KEY, ManifestHeader, cure=_cure(path))
    return Manifest(path, **dict(header))


def _read_lines(path: Path, columns: list[str] | None) -> pa.Table:
    try:
        # Not `read_table`, which imports pyarrow.dataset: an eighth of a second.
        with pq.ParquetFile(path) as file:
            return file.read(columns)
    except (OSError, pa.ArrowException) as error:
        raise ArtifactError(f"{path} cannot be read ({error}). {_cure(path)}") from error


def _cure(path: Path) -> str:
    """The command that writes a damaged manifest again."""
    beton = str(path).removesuffix(".manifest.parquet")
    return f"Make it again: fastprune check {beton} --deep --write-manifest"
