"""Open a beton: its columns as arrays, its images as views into the mapped file."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastprune.artifacts.fingerprint import Fingerprint, structure_digest
from fastprune.beton import layout
from fastprune.beton.manifest import Manifest, manifest_of
from fastprune.beton.row_check import check_rows, label_faults
from fastprune.beton.structure import read_tables
from fastprune.errors import BetonError, InvalidValueError, warn_user


class ForeignManifestWarning(UserWarning):
    """The manifest beside a beton is damaged or belongs to another beton, and is not used."""


@dataclass(frozen=True, eq=False, repr=False)
class Beton:
    """An open beton whose structure was found sound.

    The file stays mapped as long as this object or an array from `image_bytes` lives. A file that
    is cut short by another process meanwhile ends this one with SIGBUS: replace betons by renaming,
    never in place.

    Attributes:
        path: the file.
        labels: (N,) int64, label of every row.
        widths: (N,) uint16, in pixels.
        heights: (N,) uint16, in pixels.
        modes: (N,) uint8, 0 for JPEG bytes, 1 for raw RGB pixels.
        offsets: (N,) int64, file offset of every row's image data, in bytes.
        sizes: (N,) int64, size of every row's image data, in bytes.
        fields: the columns of the file, in order.
        page_bytes: the page size.
        content: (file size,) uint8, the whole file, not writable.
        structure: digest of labels, widths and heights.
        manifest: the manifest beside the file; None where there is none of this beton.
        mapped: the file's status when it was mapped.
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
    structure: str
    manifest: Manifest | None
    mapped: os.stat_result

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
        path: the file.

    Returns:
        The open beton.

    Raises:
        BetonError: the file is missing, unfinished, cut or damaged, or differs from its manifest in
            some rows; the text names the first fault.

    Warns:
        ForeignManifestWarning: the manifest is damaged or was made for another beton.
    """
    path = Path(path)
    tables = read_tables(path)
    image, label = image_and_label(tables.fields, path)
    placements, faults = check_rows(tables)
    columns = tables.metadata[f"f{image}"]
    # Copied out of the records: strided reads of the mapping would touch every page of it.
    labels = np.ascontiguousarray(tables.metadata[f"f{label}"])
    widths = np.ascontiguousarray(columns["width"])
    heights = np.ascontiguousarray(columns["height"])
    structure = structure_digest(labels, widths, heights)
    faults += label_faults(labels)
    manifest = None
    if not faults:
        known = {"label": labels, "width": widths, "height": heights}
        known["bytes"] = placements[image].sizes
        manifest, faults = manifest_of(path, known, structure)
    for fault in [fault for fault in faults if fault.kind == "manifest"]:
        faults.remove(fault)
        warn_user(fault.message, ForeignManifestWarning)
    if faults:
        more = f", and {len(faults) - 1:,} more faults" if len(faults) > 1 else ""
        raise BetonError(
            f"{path} is damaged: {faults[0]}{more}. See all: fastprune check {path}; then convert "
            "the images again or get a whole copy of the file."
        )
    return Beton(
        path=path,
        labels=labels,
        widths=widths,
        heights=heights,
        modes=np.ascontiguousarray(columns["mode"]),
        offsets=placements[image].offsets,
        sizes=placements[image].sizes,
        fields=tables.fields,
        page_bytes=tables.page_bytes,
        content=tables.content,
        structure=structure,
        manifest=manifest,
        mapped=tables.mapped,
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
