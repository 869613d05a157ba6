"""Subsets in the files that other tools read."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fastprune.base.checks import did_you_mean
from fastprune.base.errors import ArtifactError, InvalidValueError
from fastprune.base.files import atomic_path, write_text
from fastprune.base.provenance import Fingerprint, require_same_images
from fastprune.beton.beton import Beton
from fastprune.rows.score_table import ScoreTable
from fastprune.rows.subset import Subset, checked_rows
from fastprune.selection.huggingface import write_parquet_shards

FORMATS = (
    "mdslr",
    "deepcore",
    "rows",
    "dropped",
    "names",
    "indices",
    "symlinks",
    "webdataset",
    "huggingface",
)


def export_subset(
    subset: Subset,
    out: str | Path,
    file_format: str,
    *,
    beton: Beton | None = None,
    scores: ScoreTable | None = None,
    images: str | Path | None = None,
) -> list[Path]:
    """Write a subset for another tool.

    Args:
        subset: the kept rows.
        out: the file to write; for `mdslr`, `symlinks` and `huggingface` a folder, which is made.
        file_format: `mdslr` for `ratio_<percent>.npy` and `std.npy` as the MDSLR training script
            loads them; `deepcore` for `{"indices", "scores"}` as JSON; `rows` for the rows, one a
            line; `dropped` for the other rows, one a line; `names` for the source files' names, one
            a line; `indices` for positions in the source (`.npy`), such as in `ImageFolder`'s
            samples, for `torch.utils.data.Subset`; `symlinks` for a folder with a link to each
            kept image file, in its class folder; `webdataset` for the kept samples' keys of each
            tar shard, as JSON; `huggingface` for Parquet files with the images, labels and scores,
            which `datasets` loads.
        beton: the images; needed for the formats from `names` on.
        scores: the table that the rows were chosen by; needed for `deepcore`, and put into
            `huggingface` where it is given.
        images: for `symlinks`, the folder that was converted.

    Returns:
        The files that were written.

    Raises:
        InvalidValueError: the format is not known, or needs what is not given.
        ArtifactMismatch: the beton or the table is of other images than the subset.
        ArtifactError: a file cannot be written.
    """
    out = Path(out)
    if file_format == "mdslr":
        return _export_mdslr(subset, out)
    if file_format == "indices":
        positions = np.sort(_column(subset, beton, "source_index", file_format).to_numpy())
        with atomic_path(out) as temporary, temporary.open("wb") as file:
            np.save(file, positions, allow_pickle=False)
        return [out]
    if file_format == "symlinks":
        return _export_links(_names(subset, beton, file_format), images, out)
    if file_format == "huggingface":
        if scores is not None:
            _require_same(subset, scores.fingerprint, "the score table")
        return write_parquet_shards(*_opened(subset, beton, file_format), out, scores=scores)
    if file_format == "deepcore":
        text = _deepcore_text(subset, scores)
    elif file_format == "rows":
        text = _lines(subset.rows.tolist())
    elif file_format == "dropped":
        text = _lines(np.setdiff1d(np.arange(_num_rows(subset)), subset.rows).tolist())
    elif file_format == "names":
        text = _lines(_names(subset, beton, file_format))
    elif file_format == "webdataset":
        text = _shards_text(_names(subset, beton, file_format))
    else:
        raise InvalidValueError(
            f"format {file_format!r} is not known.{did_you_mean(file_format, FORMATS)}"
        )
    write_text(out, text)
    return [out]


def _export_mdslr(subset: Subset, folder: Path) -> list[Path]:
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
            f"cannot make the folder {folder}: {error.strerror}. Name one that may be made."
        ) from error
    # round() first: 100 * 0.29 is 28.999999999999996.
    files = {
        folder / f"ratio_{round(100 * subset.keep_ratio, 6):g}.npy": subset.rows,
        folder / "std.npy": subset.class_std,
    }
    for path, array in files.items():
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.save(file, array, allow_pickle=False)
    return list(files)


def _deepcore_text(subset: Subset, scores: ScoreTable | None) -> str:
    """Write both lists as JSON; the scores are of the metric that the rows were chosen by."""
    if scores is None or subset.metric not in scores.metrics:
        raise InvalidValueError(
            f"format 'deepcore' needs the score table with the metric {subset.metric!r} that the "
            "rows were chosen by (--scores)."
        )
    _require_same(subset, scores.fingerprint, "the score table")
    values = scores.metric(subset.metric)[subset.rows]
    return json.dumps({"indices": subset.rows.tolist(), "scores": values.tolist()}) + "\n"


def _opened(
    subset: Subset, beton: Beton | None, file_format: str
) -> tuple[NDArray[np.int64], Beton]:
    """Return the rows and the beton, if they belong together."""
    if beton is None or beton.manifest is None:
        raise InvalidValueError(
            f"format {file_format!r} needs a beton with a manifest, which knows the files' names "
            "(--beton)."
        )
    _require_same(subset, beton.fingerprint, str(beton.path))
    return checked_rows(subset.rows, name="the subset", num_rows=beton.num_rows), beton


def _column(subset: Subset, beton: Beton | None, name: str, file_format: str) -> pa.Array:
    """Return a column of the manifest, of the kept rows."""
    rows, beton = _opened(subset, beton, file_format)
    assert beton.manifest is not None
    # Lines are in row order, behind them come skipped images, which have no row.
    return beton.manifest.table([name])[name].combine_chunks().take(pa.array(rows))


def _names(subset: Subset, beton: Beton | None, file_format: str) -> list[str]:
    """Return the names of the rows' source files."""
    names: list[str | None] = _column(subset, beton, "source", file_format).to_pylist()
    known = [name for name in names if name is not None]
    if len(known) < len(names):
        assert beton is not None
        raise InvalidValueError(
            f"the manifest of {beton.path} has no file names: another writer made the beton. "
            "Export the rows (--format rows)."
        )
    return known


def _export_links(names: list[str], images: str | Path | None, out: Path) -> list[Path]:
    """Make a folder with a link to each file, whole or not at all."""
    if images is None:
        raise InvalidValueError(
            "format 'symlinks' needs the folder that was converted, to link to its files "
            "(--images)."
        )
    root = Path(images).absolute()
    if out.exists() or out.is_symlink():
        raise ArtifactError(f"{out} exists. Name a folder that does not, or remove it.")
    partial = out.with_name(f"{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for name in names:
            # A manifest may come from anywhere: no name of it leads out of either folder.
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ArtifactError(f"the manifest has the name {name!r}, which leads elsewhere.")
            if not (root / name).is_file():
                raise ArtifactError(
                    f"{root / name} does not exist. Name the folder that was converted (--images)."
                )
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).symlink_to(root / name)
        partial.rename(out)
    except OSError as error:
        raise ArtifactError(
            f"cannot write {out}: {os.strerror(error.errno or 0)}. Name a folder whose parent "
            "exists and that you may write to."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [out]


def _shards_text(names: list[str]) -> str:
    """List the kept keys of each tar shard, from names such as `train-0001.tar/key.jpg`."""
    shards: dict[str, list[str]] = {}
    for name in names:
        shard, separator, member = name.partition(".tar/")
        if not separator:
            raise InvalidValueError(
                f"format 'webdataset' is for betons that were made of tars, but {name!r} is in "
                "none. Export symlinks or names."
            )
        folder, _, file = member.rpartition("/")
        # WebDataset: the key ends at the first dot of the base name.
        key = file.partition(".")[0]
        shards.setdefault(f"{shard}.tar", []).append(f"{folder}/{key}" if folder else key)
    return json.dumps(shards, indent=1) + "\n"


def _require_same(subset: Subset, fingerprint: Fingerprint, name: str) -> None:
    """Refuse what is of other images; of a bare index file nothing is known."""
    if subset.fingerprint is not None:
        require_same_images(
            subset.fingerprint,
            "the subset",
            fingerprint,
            name,
            cure="Give the beton, or the scores, that the subset was made from.",
        )


def _num_rows(subset: Subset) -> int:
    """Return N, which a bare index file does not hold."""
    if subset.fingerprint is None:
        raise InvalidValueError(
            "format 'dropped' needs the number of rows, which stands in the .json beside the "
            "subset. Make the subset with fastprune select."
        )
    return subset.fingerprint.num_rows


def _lines(entries: list[int] | list[str]) -> str:
    return "".join(f"{entry}\n" for entry in entries)
