"""An open beton: its columns as arrays, its images as views into mapped files, and rows of it."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastprune.base.errors import (
    ArtifactError,
    ContentNotComparedWarning,
    InvalidValueError,
    warn_user,
)
from fastprune.base.provenance import (
    Fingerprint,
    require_same_images,
)
from fastprune.beton import layout
from fastprune.beton.manifest import Manifest
from fastprune.rows.subset import Subset, checked_rows

RowsLike = str | Path | Subset | ArrayLike | None


@dataclass(frozen=True)
class BetonFile:
    """One file of a beton.

    Attributes:
        first_row: the beton's row that is the file's row 0.
        start: where the file starts in the beton's content, in bytes.
        mapped: its status when it was mapped, taken from the mapped descriptor.
        is_filled: whether processes write rows into it while it is open, as into a mirror's.
    """

    path: Path
    first_row: int
    start: int
    mapped: os.stat_result
    is_filled: bool = False

    @property
    def num_bytes(self) -> int:
        """Size when mapped; the file may have been cut since."""
        return self.mapped.st_size


@dataclass(frozen=True, eq=False, repr=False)
class Beton:
    """An open beton with a sound structure; local file, shards, mirror and served beton alike.

    The files stay mapped as long as this object or an array from `image_bytes` lives. If another
    process truncates a mapped file, this one ends with SIGBUS: replace betons by renaming, never
    in place. A pickled beton is opened again where it is loaded, with the token of that process's
    environment: secrets are never pickled.

    Attributes:
        path: the file, or the folder of a sharded beton.
        labels: (N,) int64, label of every row.
        widths: (N,) uint16, in pixels.
        heights: (N,) uint16, in pixels.
        modes: (N,) uint8, 0 for JPEG bytes, 1 for raw RGB pixels.
        offsets: (N,) int64, offset of every row's image data in `content`, in bytes.
        sizes: (N,) int64, size of every row's image data, in bytes.
        content: (file size,) uint8, the whole file, not writable. Of a sharded beton, its files
            one after the other; the bytes between them must not be touched.
        files: the file, or the shards in the order of their rows.
        structure: digest of labels, widths and heights.
        manifest: the manifest beside the file; None if this beton has none.
        present: (N,) bool of a mirror opened by its folder, True for rows that are there; it
            changes as processes fetch more. None where all rows are there or come when asked for.
        service: addresses of the loading service that decodes views; "" for none.
        token: for the service; None for the environment's.
        reopen: opens the same beton in another process.
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
    present: NDArray[np.bool_] | None = None
    service: str = ""
    token: str | None = None
    reopen: Callable[[], "Beton"] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # By its source: the mapped files may be larger than the memory that a copy would take.
        assert self.reopen is not None, "open_beton made it"
        return self.reopen, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # it never changes

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
        """The identity of the images; with the content if the beton's own manifest is there."""
        content = None if self.manifest is None else self.manifest.fingerprint.content
        return Fingerprint(self.num_rows, self.structure, content)

    def image_bytes(self, row: int) -> NDArray[np.uint8]:
        """Return the stored bytes of one image, without a copy.

        Returns:
            (n,) uint8, a JPEG file or height x width x 3 RGB pixels (see `modes`); not writable.

        Raises:
            InvalidValueError: the row is outside [0, N).
        """
        if not 0 <= row < self.num_rows:
            raise InvalidValueError(
                f"row {row:,} is outside {self.path}, whose rows are [0, {self.num_rows:,})."
            )
        # Opening the beton checked that the data of every row lies inside the file.
        offset = self.offsets[row]
        return self.content[offset : offset + self.sizes[row]]

    def arriving(self, batches: Iterable[NDArray[np.int64]]) -> Iterator[NDArray[np.int64]]:
        """Yield each batch of rows once its bytes are in `content`, in order.

        Local files have them all; a beton in object storage fetches them ahead of the caller.
        """
        return iter(batches)


def rows_of(beton: Beton, subset: RowsLike) -> NDArray[np.int64]:
    """Return the rows that a subset names in this beton: (K,) int64, sorted, unique, in [0, N).

    The subset is a file, a `Subset`, an array of rows, or None for all rows.

    Raises:
        InvalidValueError: the rows do not index the beton.
        ArtifactError: the file is missing or not a subset, or a mirror lacks some of its rows.
        ArtifactMismatch: the subset was made from other images.
    """
    rows = _named_rows(beton, subset)
    _require_present(beton, rows)
    return rows


def _named_rows(beton: Beton, subset: RowsLike) -> NDArray[np.int64]:
    if subset is None:
        return np.arange(beton.num_rows)
    name = str(subset) if isinstance(subset, str | Path) else "subset"
    if isinstance(subset, str | Path):
        subset = Subset.load(subset)
    if not isinstance(subset, Subset):
        return checked_rows(subset, name=name, num_rows=beton.num_rows)
    # Compared before the rows: rows beyond the beton are a symptom, other images are the cause.
    if subset.fingerprint is not None:
        require_same_images(
            subset.fingerprint,
            name,
            beton.fingerprint,
            str(beton.path),
            cure=f"Make a subset for this beton: fastprune score {beton.path} ... && "
            "fastprune select ...",
        )
    return checked_rows(subset.rows, name=name, num_rows=beton.num_rows)


def _require_present(beton: Beton, rows: NDArray[np.int64]) -> None:
    """Refuse rows that a mirror lacks."""
    present = beton.present
    if present is None or (is_there := present[rows]).all():
        return
    first = rows[np.argmin(is_there)]  # argmin of bools: the first False
    raise ArtifactError(
        f"{beton.path} is a mirror that holds {int(present.sum()):,} of {len(present):,} rows, and "
        f"row {first:,} is not among them ({int((~is_there).sum()):,} of {len(rows):,} rows are "
        "missing). Fetch them: fastprune stage URL SUBSET FOLDER, or open the URL as the beton "
        "with this folder as the cache."
    )


def kept_rows(beton: Beton, subset: RowsLike) -> NDArray[np.int64]:
    """Return what `rows_of` does, and warn of a file or `Subset` that names no images.

    An array of rows never warns: the caller has just made it.

    Warns:
        ContentNotComparedWarning: nothing, or the structure alone, ties the subset to the beton.
    """
    rows = rows_of(beton, subset)
    # `fastprune select` writes the fingerprint into the .json; a bare .npy names no images.
    if isinstance(subset, str | Path):
        is_unbound = not Path(subset).with_suffix(".json").exists()
    else:
        is_unbound = isinstance(subset, Subset) and subset.fingerprint is None
    if is_unbound:
        name = subset if isinstance(subset, str | Path) else "subset"
        warn_user(
            f"{name} does not name the images it was made from, so nothing was compared with "
            f"{beton.path}. Keep the .json that `fastprune select` writes beside the .npy.",
            ContentNotComparedWarning,
        )
    return rows
