"""Subsets in the files that other tools read."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastprune.base.checks import did_you_mean
from fastprune.base.errors import ArtifactError, InvalidValueError
from fastprune.base.files import atomic_path, write_text
from fastprune.base.provenance import require_same_images
from fastprune.beton.beton import Beton
from fastprune.rows.subset import Subset, checked_rows
from fastprune.settings.select import EXPORT_FORMATS


def export_subset(
    subset: Subset, out: str | Path, file_format: str, *, beton: Beton | None = None
) -> list[Path]:
    """Write a subset for another tool.

    Args:
        subset: the kept rows.
        out: the file to write; for `mdslr` a folder, which is created.
        file_format: `mdslr` for `ratio_<percent>.npy` and `std.npy` as the MDSLR training script
            loads them; `rows` for the rows, one a line; `dropped` for the other rows, one a line;
            `names` for the source files' names, one a line; `indices` for positions in the source
            (`.npy`), such as in `ImageFolder`'s samples, for `torch.utils.data.Subset`. For
            `huggingface` see `fastprune.adapters.huggingface`.
        beton: the images; needed for `names` and `indices`.

    Returns:
        The files that were written.

    Raises:
        InvalidValueError: the format is not known, or needs more than is given.
        ArtifactMismatch: the beton holds other images than the subset was made from.
        ArtifactError: a file cannot be written.
    """
    out = Path(out)
    match file_format:
        case "mdslr":
            return _write_mdslr(subset, out)
        case "indices":
            _save(out, np.sort(np.array(_column(subset, beton, "source_index", file_format))))
            return [out]
        case "rows":
            entries = subset.rows.tolist()
        case "dropped":
            entries = np.setdiff1d(np.arange(_num_rows(subset)), subset.rows).tolist()
        case "names":
            entries = _column(subset, beton, "source", file_format)
        case _:
            raise InvalidValueError(
                f"format {file_format!r} is not known.{did_you_mean(file_format, EXPORT_FORMATS)}"
            )
    write_text(out, "".join(f"{entry}\n" for entry in entries))
    return [out]


def kept_rows_of(subset: Subset, beton: Beton | None, file_format: str) -> NDArray[np.int64]:
    """Return a subset's rows of a beton that has a manifest.

    Raises:
        InvalidValueError: the beton is missing, it has no manifest, or a row is beyond its end.
        ArtifactMismatch: the beton holds other images than the subset was made from.
    """
    if beton is None or beton.manifest is None:
        raise InvalidValueError(
            f"format {file_format!r} needs a beton with a manifest, which has the files' names "
            "(--beton)."
        )
    # A bare index file does not tell what it was made from.
    if subset.fingerprint is not None:
        require_same_images(
            subset.fingerprint,
            "the subset",
            beton.fingerprint,
            str(beton.path),
            cure="Give the beton that the subset was made from.",
        )
    return checked_rows(subset.rows, name="the subset", num_rows=beton.num_rows)


def _write_mdslr(subset: Subset, folder: Path) -> list[Path]:
    """Write `ratio_50.npy` and `std.npy`, the names that the training script looks for."""
    if subset.keep_ratio is None or subset.class_std is None:
        raise InvalidValueError(
            "format 'mdslr' needs the keep ratio and the class std, which stand in the .json "
            "beside the subset. Make the subset with fastprune select."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(
            f"cannot make the folder {folder}: {error.strerror}. Name one that can be made."
        ) from error
    # round() first: 100 * 0.29 is 28.999999999999996.
    index = folder / f"ratio_{round(100 * subset.keep_ratio, 6):g}.npy"
    _save(index, subset.rows)
    _save(folder / "std.npy", subset.class_std)
    return [index, folder / "std.npy"]


def _save(path: Path, array: NDArray[np.int64] | NDArray[np.float64]) -> None:
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def _column(
    subset: Subset, beton: Beton | None, name: str, file_format: str
) -> list[str] | list[int]:
    """Return a column of the manifest, for the kept rows."""
    rows = kept_rows_of(subset, beton, file_format)
    assert beton is not None
    assert beton.manifest is not None
    # Lines are in row order; skipped images follow, which have no row.
    values: list[str | None] = beton.manifest.table([name])[name].take(rows).to_pylist()
    if None in values:
        raise InvalidValueError(
            f"the manifest of {beton.path} has no file names: another writer made the beton. "
            "Export the rows (--format rows)."
        )
    return values  # type: ignore[return-value]


def _num_rows(subset: Subset) -> int:
    """Return N, which a bare index file does not hold."""
    if subset.fingerprint is None:
        raise InvalidValueError(
            "format 'dropped' needs the number of rows, which stands in the .json beside the "
            "subset. Make the subset with fastprune select."
        )
    return subset.fingerprint.num_rows
