"""Subsets in the files that other tools read."""

import json
from pathlib import Path

import numpy as np

from fastprune.artifacts.atomic import atomic_path, write_text
from fastprune.artifacts.fingerprint import Fingerprint, require_same_images
from fastprune.artifacts.scores import ScoreTable
from fastprune.artifacts.subset import Subset, checked_rows
from fastprune.beton.reader import Beton
from fastprune.checks import did_you_mean
from fastprune.errors import InvalidValueError

FORMATS = ("mdslr", "deepcore", "rows", "dropped", "names")


def export_subset(
    subset: Subset,
    out: str | Path,
    file_format: str,
    *,
    beton: Beton | None = None,
    scores: ScoreTable | None = None,
) -> list[Path]:
    """Write a subset for another tool.

    Args:
        subset: the kept rows.
        out: the file to write; for `mdslr` a folder, which is made.
        file_format: `mdslr` for `ratio_<percent>.npy` and `std.npy` as the MDSLR training script
            loads them; `deepcore` for `{"indices", "scores"}` as JSON; `rows` for the rows, one a
            line; `dropped` for the other rows, one a line; `names` for the source files' names, one
            a line.
        beton: the images; needed for `names`.
        scores: the table that the rows were chosen by; needed for `deepcore`.

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
    if file_format == "deepcore":
        text = _deepcore_text(subset, scores)
    elif file_format == "rows":
        text = _lines(subset.rows.tolist())
    elif file_format == "dropped":
        text = _lines(np.setdiff1d(np.arange(_num_rows(subset)), subset.rows).tolist())
    elif file_format == "names":
        text = _lines(_names(subset, beton))
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
    folder.mkdir(parents=True, exist_ok=True)
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


def _names(subset: Subset, beton: Beton | None) -> list[str]:
    """Return the names of the rows' source files."""
    if beton is None or beton.manifest is None:
        raise InvalidValueError(
            "format 'names' needs a beton with a manifest, which knows the files' names (--beton)."
        )
    _require_same(subset, beton.fingerprint, str(beton.path))
    rows = checked_rows(subset.rows, name="the subset", num_rows=beton.num_rows)
    lines = beton.manifest.table(["row", "source"]).to_pydict()
    names = dict(zip(lines["row"], lines["source"], strict=True))
    if None in names.values():
        raise InvalidValueError(
            f"the manifest of {beton.path} has no file names: another writer made the beton. "
            "Export the rows (--format rows)."
        )
    return [names[row] for row in rows.tolist()]


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
