"""Open a beton: its columns as arrays, its images as views into the mapped file."""

import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastprune.base.errors import BetonError, InvalidValueError, warn_user
from fastprune.base.provenance import Fingerprint, structure_digest
from fastprune.beton import layout
from fastprune.beton.manifest import Manifest, manifest_of
from fastprune.beton.mapping import map_side_by_side
from fastprune.beton.remote.presence import rows_present
from fastprune.beton.row_check import Placement, check_rows, label_faults
from fastprune.beton.shards import SET_NAME, Shard, read_set
from fastprune.beton.structure import Fault, Tables, read_tables


class ForeignManifestWarning(UserWarning):
    """The manifest beside a beton is damaged or belongs to another beton, and is not used."""


@dataclass(frozen=True)
class BetonFile:
    """One file of a beton.

    Attributes:
        path: the file.
        first_row: the beton's row that is the file's row 0.
        start: where the file starts in the beton's content, in bytes.
        mapped: its status when it was mapped, from the very descriptor.
        is_filled: whether processes write rows into it while it is open: a mirror's.
    """

    path: Path
    first_row: int
    start: int
    mapped: os.stat_result
    is_filled: bool = False

    @property
    def num_bytes(self) -> int:
        """The size of the file."""
        return self.mapped.st_size


@dataclass(frozen=True, eq=False, repr=False)
class Beton:
    """An open beton whose structure was found sound.

    The file stays mapped as long as this object or an array from `image_bytes` lives. A file that
    is cut short by another process meanwhile ends this one with SIGBUS: replace betons by renaming,
    never in place.

    Attributes:
        path: the file, or the folder of a sharded beton.
        labels: (N,) int64, label of every row.
        widths: (N,) uint16, in pixels.
        heights: (N,) uint16, in pixels.
        modes: (N,) uint8, 0 for JPEG bytes, 1 for raw RGB pixels.
        offsets: (N,) int64, offset of every row's image data in `content`, in bytes.
        sizes: (N,) int64, size of every row's image data, in bytes.
        fields: the columns of the file, in order.
        page_bytes: the page size.
        content: (file size,) uint8, the whole file, not writable. Of a sharded beton, its files
            side by side; bytes between them must not be touched.
        files: the file, or the shards in the order of their rows.
        structure: digest of labels, widths and heights.
        manifest: the manifest beside the file; None where there is none of this beton.
        present: (N,) uint8 of a mirror, 1 for rows that are there; it changes as processes fetch
            more. None for a beton that is no mirror: all rows are there.
    """

    path: Path
    labels: NDArray[np.int64]
    widths: NDArray[np.uint16]
    heights: NDArray[np.uint16]
    modes: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    fields: tuple[layout.Field, ...]
    page_bytes: int
    content: NDArray[np.uint8]
    files: tuple[BetonFile, ...]
    structure: str
    manifest: Manifest | None
    present: NDArray[np.uint8] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # By path: the mapped file may be larger than the memory that a copy of it would take.
        return open_beton, (self.path.absolute(),)

    def __repr__(self) -> str:
        return f"<Beton {self.path}, {self.num_rows:,} rows>"

    @property
    def num_rows(self) -> int:
        """Rows in the beton, N."""
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Classes the manifest names, or one more than the largest label without a manifest."""
        names = self.class_names
        return int(self.labels.max()) + 1 if names is None else len(names)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Name of every class, in the order of the labels; None without a manifest."""
        return None if self.manifest is None else self.manifest.class_names

    @property
    def has_labels(self) -> bool:
        """Whether the labels are classes: False where the images were converted without any."""
        return self.manifest is None or self.manifest.settings.get("labels") is not False

    @property
    def fingerprint(self) -> Fingerprint:
        """The identity of the images; with the content where the beton's own manifest is there."""
        content = None if self.manifest is None else self.manifest.fingerprint.content
        return Fingerprint(self.num_rows, self.structure, content)

    def image_bytes(self, row: int) -> NDArray[np.uint8]:
        """Return the stored bytes of one image, without a copy.

        Args:
            row: in [0, N).

        Returns:
            (n,) uint8, a JPEG file or height x width x 3 RGB pixels (see `modes`); not writable.

        Raises:
            InvalidValueError: the row is outside [0, N).
        """
        if not 0 <= row < self.num_rows:
            raise InvalidValueError(
                f"row {row:,} is outside {self.path}, whose rows are [0, {self.num_rows:,})."
            )
        offset = self.offsets[row]
        return self.content[offset : offset + self.sizes[row]]


def open_beton(path: str | Path) -> Beton:
    """Open a beton and check its structure: header, fields, metadata, allocation table.

    Reads any beton of format version 2, stock FFCV's too, that has an image field and an int field.
    The image is the field named "image", else the first image field; the label is the int field
    named "label", else the first int field. No image is decoded: `fastprune check --deep` does.

    Args:
        path: the file, or the folder of a sharded beton.

    Returns:
        The open beton.

    Raises:
        BetonError: the file is missing, unfinished, cut or damaged, or differs from its manifest in
            some rows; the text names the first fault.

    Warns:
        ForeignManifestWarning: the manifest is damaged or was made for another beton.
    """
    path = Path(path)
    records = read_records(path)
    image, label = image_and_label(records.fields, path)
    columns = records.metadata[f"f{image}"]
    # Copied out of the records: strided reads of the mapping would touch every page of it.
    labels = np.ascontiguousarray(records.metadata[f"f{label}"])
    widths = np.ascontiguousarray(columns["width"])
    heights = np.ascontiguousarray(columns["height"])
    sizes = records.placements[image].sizes
    structure = structure_digest(labels, widths, heights)
    if faults := label_faults(labels):
        raise damaged(path, faults)
    known = {"label": labels, "width": widths, "height": heights, "bytes": sizes}
    if records.shards:
        manifest = records.manifest
        _require_listed_shards(records, known, structure)
    else:
        manifest, faults = manifest_of(path, known, structure)
        for fault in [fault for fault in faults if fault.kind == "manifest"]:
            faults.remove(fault)
            warn_user(fault.message, ForeignManifestWarning)
        if faults:
            raise damaged(path, faults)
    mirrored = rows_present(path)
    return Beton(
        path=path,
        labels=labels,
        widths=widths,
        heights=heights,
        modes=np.ascontiguousarray(columns["mode"]),
        offsets=records.placements[image].offsets,
        sizes=sizes,
        fields=records.fields,
        page_bytes=records.page_bytes,
        content=records.content,
        files=tuple(replace(file, is_filled=mirrored is not None) for file in records.files),
        structure=structure,
        manifest=manifest,
        present=None if mirrored is None else mirrored[1],
    )


@dataclass(frozen=True)
class Records:
    """The records of all rows of a beton, of one file or several.

    Attributes:
        fields: the columns, in order.
        page_bytes: the largest page size.
        metadata: (N,) records; pointers in them are offsets in the row's file.
        placements: where the data of each field lies in `content`, by the field's index.
        content: the bytes of all files.
        files: the files.
        manifest: of a sharded beton.
        shards: of a sharded beton, as its manifest lists them.
    """

    fields: tuple[layout.Field, ...]
    page_bytes: int
    metadata: NDArray[np.void]
    placements: dict[int, Placement]
    content: NDArray[np.uint8]
    files: tuple[BetonFile, ...]
    manifest: Manifest | None = None
    shards: tuple[Shard, ...] = ()


def read_records(path: Path) -> Records:
    """Read the records of a beton, of one file or a folder of shards.

    Raises:
        BetonError: a file is missing, unfinished, cut or damaged, or the shards do not belong
            together.
    """
    if not path.is_dir():
        tables = read_tables(path)
        placements = _sound_placements(path, tables)
        return Records(
            tables.fields,
            tables.page_bytes,
            tables.metadata,
            placements,
            tables.content,
            (BetonFile(path, 0, 0, tables.mapped),),
        )
    manifest, shards = read_set(path)
    content, starts, statuses = map_side_by_side([shard.path for shard in shards])
    parts: list[tuple[Tables, dict[int, Placement]]] = []
    files: list[BetonFile] = []
    for shard, start, mapped in zip(shards, starts, statuses, strict=True):
        tables = read_tables(shard.path, (content[start : start + mapped.st_size], mapped))
        placements = _sound_placements(shard.path, tables)
        if parts and tables.fields != parts[0][0].fields:
            raise _foreign(shard, "it has other fields than the first shard")
        if len(tables.metadata) != shard.fingerprint.num_rows:
            raise _foreign(shard, f"it has {len(tables.metadata):,} rows")
        parts.append((tables, placements))
        files.append(BetonFile(shard.path, shard.first_row, start, mapped))
    fields = parts[0][0].fields
    return Records(
        fields,
        max(tables.page_bytes for tables, _ in parts),
        np.concatenate([tables.metadata for tables, _ in parts]),
        {
            index: Placement(
                np.concatenate(
                    [p[index].offsets + f.start for (_, p), f in zip(parts, files, strict=True)]
                ),
                np.concatenate([p[index].sizes for _, p in parts]),
            )
            for index in parts[0][1]
        },
        content,
        tuple(files),
        manifest,
        tuple(shards),
    )


def _sound_placements(path: Path, tables: Tables) -> dict[int, Placement]:
    placements, faults = check_rows(tables)
    if faults:
        raise damaged(path, faults)
    return placements


def damaged(path: Path, faults: list[Fault]) -> BetonError:
    """Describe a beton by its first fault."""
    more = f", and {len(faults) - 1:,} more faults" if len(faults) > 1 else ""
    return BetonError(
        f"{path} is damaged: {faults[0]}{more}. See all: fastprune check {path}; then convert "
        "the images again or get a whole copy of the file."
    )


def _require_listed_shards(
    records: Records, columns: dict[str, NDArray[Any]], structure: str
) -> None:
    """Refuse shards that are not the ones that manifest.json lists, in their order."""
    assert records.manifest is not None
    listed = Counter(shard.fingerprint.structure for shard in records.shards)
    # One digest over all rows says that every shard is right. Only where it differs is the
    # culprit looked for; and shards of one class and one size have one structure, so that their
    # own manifests must tell them apart.
    is_whole = structure == records.manifest.fingerprint.structure
    for shard in records.shards:
        if is_whole and listed[shard.fingerprint.structure] == 1:
            continue
        rows = slice(shard.first_row, shard.first_row + shard.fingerprint.num_rows)
        own = {name: values[rows] for name, values in columns.items()}
        own_structure = structure_digest(own["label"], own["width"], own["height"])
        manifest, faults = manifest_of(shard.path, own, own_structure)
        if faults := [fault for fault in faults if fault.kind != "manifest"]:
            raise damaged(shard.path, faults)
        if own_structure != shard.fingerprint.structure:
            raise _foreign(shard, "its labels or sizes are others")
        if manifest is not None and manifest.fingerprint != shard.fingerprint:
            raise _foreign(shard, f"it is {manifest.fingerprint}")
    if not is_whole:
        raise BetonError(
            f"{records.manifest.path} does not list the shards in the order of their rows. Remove "
            "it, and make it again: fastprune convert IMAGES FOLDER --shards N --resume"
        )


def _foreign(shard: Shard, why: str) -> BetonError:
    return BetonError(
        f"{shard.path} is not the shard {shard.fingerprint} that {SET_NAME} lists: {why}. It was "
        "mixed up with another one, or is of another conversion: get the right one."
    )


def image_and_label(fields: tuple[layout.Field, ...], path: Path) -> tuple[int, int]:
    """Return the indices of the image field and the label field.

    Raises:
        BetonError: there is no such field.
    """
    return _pick(fields, "image", "image", path), _pick(fields, "label", "int", path)


def _pick(fields: tuple[layout.Field, ...], name: str, kind: str, path: Path) -> int:
    """Return the field of that kind and name, or else the first of that kind."""
    candidates = [index for index, field in enumerate(fields) if field.kind == kind]
    if not candidates:
        have = ", ".join(f"{field.name} ({field.kind})" for field in fields)
        raise BetonError(
            f"{path} has no {kind} field for the {name}; its fields are {have}. Write it again "
            f"with one: fastprune convert IMAGES {path}"
        )
    named = [index for index in candidates if fields[index].name == name]
    return (named or candidates)[0]
