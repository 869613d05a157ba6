"""Scores and subsets that other tools made, in the files that they write.

Nothing is ever unpickled: a pickle can run code when it is read.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fastprune.artifacts.fingerprint import require_same_images
from fastprune.artifacts.scores import ScoreTable, is_score_table
from fastprune.artifacts.subset import Subset
from fastprune.beton.reader import Beton
from fastprune.errors import ArtifactError, InvalidValueError
from fastprune.untrusted import open_regular, read_json, read_npy, read_npz_member, read_text

_UNKNOWN_CLASS = -1  # no teacher predicted anything
_NO_METRICS = ("row", "label", "prediction", "cluster")


def import_scores(path: str | Path, beton: Beton) -> ScoreTable:
    """Read per-row scores of any method, such as forgetting events or AUM.

    Args:
        path: `.npy` with (N,) numbers, one per row, which become the metric that the file is
            named after; or `.csv` or `.parquet` with a numeric column per metric, one line per row
            in row order, or in any order with a column `row`. A score table of fastprune is read
            as what it is.
        beton: the images that were scored.

    Returns:
        A table with those metrics (larger must be harder). It knows no predictions (-1) and no
        class std (NaN), unless it was a score table.

    Raises:
        ArtifactError: the file cannot be read as what its name says.
        ArtifactMismatch: it is a score table of other images.
        InvalidValueError: the scores are not one number per row of the beton.
    """
    path = Path(path)
    if is_score_table(path):
        table = ScoreTable.load(path)
        require_same_images(
            table.fingerprint,
            str(path),
            beton.fingerprint,
            str(beton.path),
            cure=f"Score this beton: fastprune score {beton.path} -o {path} ...",
        )
        return table
    columns = {name: np.asarray(values, np.float32) for name, values in _read_columns(path).items()}
    for name, values in columns.items():
        if values.shape != (beton.num_rows,):
            raise InvalidValueError(
                f"{path} holds scores of shape {values.shape} for {name!r}, but {beton.path} has "
                f"{beton.num_rows:,} rows. Give one score per row."
            )
    counts = np.bincount(beton.labels, minlength=beton.num_classes)
    return ScoreTable(
        labels=np.array(beton.labels, np.int64),
        metrics=columns,
        predictions=np.full(beton.num_rows, _UNKNOWN_CLASS),
        class_std=np.full(len(counts), np.nan),
        class_counts=counts,
        fingerprint=beton.fingerprint,
        teacher={"imported_from": path.name},
    )


def import_subset(
    path: str | Path,
    beton: Beton,
    *,
    drop: bool = False,
    class_std: str | Path | None = None,
    command: str | None = None,
) -> Subset:
    """Read the rows that another tool keeps, or drops.

    Args:
        path: rows in `.npy` (such as MDSLR's `ratio_50.npy`), `.json` or `.txt` (one a line); or
            file names in `.json` or `.txt`, as in the beton's manifest, the last part sufficing
            where it is unique; or DeepCore's `{"indices": ..., "scores": ...}` in `.json` or
            `.npz`. In any order.
        beton: the images.
        drop: whether the file lists what is dropped, as Moderate Coreset's does.
        class_std: MDSLR's `std.npy`, (C,), for logit reshaping.
        command: the command line, for the record.

    Returns:
        The subset, with the beton's fingerprint.

    Raises:
        ArtifactError: a file cannot be read as what its name says.
        InvalidValueError: rows are repeated or not in the beton, names are unknown or ambiguous,
            nothing is left, or there is not one class std per class.
    """
    path = Path(path)
    listed = _listed_rows(path, beton)
    rows = np.setdiff1d(np.arange(beton.num_rows), listed) if drop else listed
    if len(rows) == 0:
        raise InvalidValueError(f"{path} leaves no rows of {beton.path}; keep at least one.")
    counts = np.bincount(beton.labels[rows], minlength=beton.num_classes)
    std = None
    if class_std is not None:
        std = read_array(Path(class_std))
        if std.shape != (beton.num_classes,) or std.dtype.kind not in "fiu":
            raise InvalidValueError(
                f"{class_std} must hold {beton.num_classes:,} numbers, one per class of "
                f"{beton.path}, but it holds {std.dtype} of shape {std.shape}."
            )
        std = std.astype(np.float64)
    return Subset(
        rows=rows,
        fingerprint=beton.fingerprint,
        keep_ratio=len(rows) / beton.num_rows,
        strategy="imported",
        parameters={"imported_from": path.name, "drop": drop},
        class_counts=counts.tolist(),
        class_std=std,
        command=command,
    )


def _read_columns(path: Path) -> dict[str, NDArray[Any]]:
    """Read metric name -> values in row order."""
    if path.suffix == ".npy":
        return {path.stem: read_array(path)}
    readers = {".csv": pyarrow.csv.read_csv, ".parquet": pq.read_table}
    if path.suffix not in readers:
        raise ArtifactError(f"{path}: scores are read from .npy, .csv or .parquet files alone.")
    try:
        open_regular(path).close()
        table = readers[path.suffix](path)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ArtifactError(f"{path} cannot be read as {path.suffix[1:]} ({error}).") from error
    columns = {
        name: table[name].to_numpy()
        for name in table.column_names
        if pa.types.is_integer(table.schema.field(name).type)
        or pa.types.is_floating(table.schema.field(name).type)
    }
    metrics = {name: values for name, values in columns.items() if name not in _NO_METRICS}
    if not metrics:
        raise ArtifactError(
            f"{path} has no column of numbers to rank rows by (found: "
            f"{', '.join(table.column_names)})."
        )
    if "row" not in columns:
        return metrics
    # The column decides, whatever order a tool wrote its lines in.
    order = np.argsort(columns["row"], kind="stable")
    if not np.array_equal(columns["row"][order], np.arange(len(order))):
        raise InvalidValueError(
            f"{path}: the column row must hold 0 to {len(order) - 1:,}, each once."
        )
    return {name: values[order] for name, values in metrics.items()}


def _listed_rows(path: Path, beton: Beton) -> NDArray[np.int64]:
    """Return the rows that a file lists, sorted."""
    listed = _read_list(path)
    are_names = isinstance(listed, list) and all(isinstance(entry, str) for entry in listed)
    rows = _rows_of_names(path, listed, beton) if are_names else np.asarray(listed)
    if rows.ndim != 1 or (rows.dtype.kind not in "iu" and len(rows)):
        raise InvalidValueError(
            f"{path} must list rows or file names, but it lists {rows.dtype} of shape {rows.shape}."
        )
    unique, counts = np.unique(rows.astype(np.int64), return_counts=True)
    if len(unique) < len(rows):
        raise InvalidValueError(
            f"{path} lists row {unique[np.argmax(counts > 1)]:,} more than once. Remove the others."
        )
    if len(unique) and (unique[0] < 0 or unique[-1] >= beton.num_rows):
        wrong = unique[0] if unique[0] < 0 else unique[-1]
        raise InvalidValueError(
            f"{path} lists row {wrong:,}, but {beton.path} has rows 0 to {beton.num_rows - 1:,}. "
            "It was made for other images, or in another order."
        )
    return unique


def _read_list(path: Path) -> Any:
    """Read rows or names, from any of the formats."""
    if path.suffix == ".npy":
        return read_array(path)
    try:
        if path.suffix == ".npz":
            return read_npz_member(path, "indices")
        if path.suffix == ".json":
            content = read_json(path)
            listed = content["indices"] if isinstance(content, dict) else content
            are_names = isinstance(listed, list) and all(isinstance(e, str) for e in listed)
            return listed if are_names else np.asarray(listed)  # ragged lists are refused here
        if path.suffix == ".txt":
            lines = [line.strip() for line in read_text(path).splitlines()]
            entries = [line for line in lines if line]
            are_rows = all(line.lstrip("-").isdigit() for line in entries)
            return [int(line) for line in entries] if are_rows else entries
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise ArtifactError(
            f"{path} cannot be read as a list of rows or names ({error!r})."
        ) from error
    raise ArtifactError(
        f"{path}: lists are read from .npy, .npz, .json or .txt files; pickles and PyTorch files "
        "are not, because they can run code. Save the rows with np.save('rows.npy', rows)."
    )


def _rows_of_names(path: Path, names: list[str], beton: Beton) -> NDArray[np.int64]:
    """Look up the rows of the manifest's source files with these names."""
    if beton.manifest is None:
        raise InvalidValueError(
            f"{path} lists file names, but {beton.path} has no manifest that knows them. Convert "
            "the images with fastprune, or list rows."
        )
    lines = beton.manifest.table(["row", "source"]).to_pydict()
    rows = {
        source: row
        for row, source in zip(lines["row"], lines["source"], strict=True)
        if row is not None and source is not None
    }
    if not rows:
        raise InvalidValueError(
            f"{path} lists file names, but the manifest of {beton.path} has none: another writer "
            "made the beton. List rows."
        )
    # A last part names an image where it is unique; whole names win over last parts.
    last_parts = Counter(source.rpartition("/")[2] for source in rows)
    rows |= {s.rpartition("/")[2]: row for s, row in rows.items() if "/" in s}
    for name in names:
        if last_parts[name] > 1:
            raise InvalidValueError(
                f"{path}: {last_parts[name]} images are called {name!r}. Add their folder."
            )
        if name not in rows:
            raise InvalidValueError(
                f"{path}: no image of {beton.path} is called {name!r}. Write names as in the "
                f"manifest, such as {next(iter(rows))!r}."
            )
    return np.array([rows[name] for name in names], np.int64)


def read_array(path: Path) -> NDArray[Any]:
    """Read a .npy file without pickles.

    Raises:
        ArtifactError: the file is missing or no .npy file.
    """
    try:
        return read_npy(path)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read as a .npy file ({error}).") from error
