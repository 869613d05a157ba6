"""Scores and lists of rows that other tools made, in the files that they write.

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

from fastprune.base.errors import ArtifactError, InvalidValueError
from fastprune.base.files import open_regular, read_text
from fastprune.base.headers import parse_json, read_npy, read_npz_member
from fastprune.base.provenance import require_same_images
from fastprune.beton.beton import Beton
from fastprune.rows.score_table import ScoreTable, is_score_table
from fastprune.rows.subset import Subset

Rows = NDArray[np.int64]

_TABLE_READERS = {".csv": pyarrow.csv.read_csv, ".parquet": pq.read_table}
_UNKNOWN_CLASS = -1  # no teacher predicted anything
_NOT_METRICS = ("row", "label", "prediction", "cluster")
# Names that pandas and others give to the column with a line's row.
_ROW_COLUMNS = ("row", "index", "indices", "__index_level_0__", "", "Unnamed: 0")
_ISSUE = "is_label_issue"


def import_scores(path: str | Path, beton: Beton) -> ScoreTable:
    """Read per-row scores of any method, such as forgetting events or AUM.

    Args:
        path: `.npy` with (N,) numbers, one per row, which become the metric that the file is
            named after; or `.csv` or `.parquet` with a numeric column per metric, one line per row
            in row order, or in any order with a column `row`. A score table of fastprune is
            returned as it is.
        beton: the images that were scored.

    Returns:
        A table with those metrics (larger must be harder), without predictions (-1) and class std
        (NaN), unless it was a score table.

    Raises:
        ArtifactError: the file cannot be read as its suffix promises.
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
    columns = _read_metrics(path)
    for name, values in columns.items():
        # Dates and records would be cast silently.
        if values.dtype.kind not in "biuf":
            raise InvalidValueError(
                f"{path} holds {values.dtype} for {name!r}, but scores are numbers. Give one real "
                "number per row."
            )
        if values.shape != (beton.num_rows,):
            raise InvalidValueError(
                f"{path} holds scores of shape {values.shape} for {name!r}, but {beton.path} has "
                f"{beton.num_rows:,} rows. Give one score per row."
            )
    counts = np.bincount(beton.labels, minlength=beton.num_classes)
    with np.errstate(over="ignore"):  # what becomes infinite is refused with its row
        metrics = {name: values.astype(np.float32) for name, values in columns.items()}
    return ScoreTable(
        labels=np.array(beton.labels, np.int64),
        metrics=metrics,
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
            file names in `.json` or `.txt`, as in the beton's manifest, the last part being enough
            if it is unique; or DeepCore's `{"indices": ..., "scores": ...}` in `.json` or `.npz`.
            In any order.
        beton: the images.
        drop: the file lists rows to drop, as Moderate Coreset's does.
        class_std: MDSLR's `std.npy`, (C,), for logit reshaping.
        command: the command line, for the record.

    Returns:
        The subset, with the beton's fingerprint.

    Raises:
        ArtifactError: a file cannot be read as its suffix promises.
        InvalidValueError: rows are repeated or not in the beton, names are unknown or ambiguous,
            nothing is left, or there is not one class std per class.
    """
    path = Path(path)
    listed = _read_list(path, beton)
    unique, counts = np.unique(listed, return_counts=True)
    if len(unique) < len(listed):
        raise InvalidValueError(
            f"{path} lists row {unique[np.argmax(counts > 1)]:,} more than once. Remove the others."
        )
    _require_rows(path, unique, beton.num_rows, str(beton.path))
    rows = np.setdiff1d(np.arange(beton.num_rows), unique) if drop else unique
    if len(rows) == 0:
        raise InvalidValueError(f"{path} leaves no rows of {beton.path}; keep at least one.")
    return Subset(
        rows=rows,
        fingerprint=beton.fingerprint,
        keep_ratio=len(rows) / beton.num_rows,
        strategy="imported",
        parameters={"imported_from": path.name, "drop": drop},
        class_counts=np.bincount(beton.labels[rows], minlength=beton.num_classes).tolist(),
        class_std=None if class_std is None else _read_class_std(Path(class_std), beton),
        command=command,
    )


def read_excluded(path: str | Path, num_rows: int, *, beton: Beton | None = None) -> Rows:
    """Read the rows that are never to be kept.

    Args:
        path: cleanlab's table of issues, `.csv` or `.parquet`, with a column `is_label_issue` and
            a line per row, or fewer lines with the table's index; a table with a column `row` or
            `index` alone, whose lines are all meant; `.npy` with rows in any order, or (N,) bool;
            rows in `.txt`, `.json` or `.npz`; or, with the beton, file names in `.txt` or `.json`.
        num_rows: N, of the scores.
        beton: the images, to look file names up.

    Returns:
        (K,) int64, sorted and unique; K may be 0.

    Raises:
        ArtifactError: the file cannot be read as its suffix promises, or has no such column.
        InvalidValueError: it marks another number of rows, or lists names without a beton.
    """
    path = Path(path)
    if path.suffix in _TABLE_READERS:
        rows = _read_issues(path, num_rows)
    else:
        rows = _read_list(path, beton, num_marks=num_rows)
    rows = np.unique(rows)
    _require_rows(path, rows, num_rows, "the score table")
    return rows


def _require_rows(path: Path, rows: Rows, num_rows: int, owner: str) -> None:
    """Refuse sorted rows that are not in [0, num_rows)."""
    if len(rows) and (rows[0] < 0 or rows[-1] >= num_rows):
        wrong = rows[0] if rows[0] < 0 else rows[-1]
        raise InvalidValueError(
            f"{path} lists row {wrong:,}, but {owner} has rows 0 to {num_rows - 1:,}. The list "
            "was made for other images, or in another order."
        )


def _as_rows(path: Path, listed: NDArray[Any]) -> Rows:
    if listed.ndim != 1 or (listed.dtype.kind not in "iu" and len(listed)):
        raise InvalidValueError(
            f"{path} must list rows or file names, but it lists {listed.dtype} of shape "
            f"{listed.shape}."
        )
    return listed.astype(np.int64)


def _read_list(path: Path, beton: Beton | None, *, num_marks: int | None = None) -> Rows:
    """Read rows in any order; with `num_marks`, a mark per row is accepted too."""
    entries = _read_entries(path)
    if isinstance(entries, list) and entries:
        return _rows_of_names(path, entries, beton)
    listed = np.asarray(entries)
    if num_marks is not None and listed.dtype == bool and listed.ndim == 1:
        _require_marks(path, len(listed), num_marks)
        listed = np.flatnonzero(listed)
    return _as_rows(path, listed)


def _read_entries(path: Path) -> list[str] | NDArray[Any]:
    """Read the numbers or names of a list."""
    if path.suffix == ".npy":
        return _read_array(path)
    try:
        if path.suffix == ".npz":
            return read_npz_member(path, "indices")
        if path.suffix == ".json":
            content = parse_json(read_text(path))
            listed = content["indices"] if isinstance(content, dict) else content
            are_names = isinstance(listed, list) and all(isinstance(e, str) for e in listed)
            return listed if are_names else np.asarray(listed)  # ragged lists are refused here
        if path.suffix == ".txt":
            lines = [line.strip() for line in read_text(path).splitlines()]
            names = [line for line in lines if line]
            are_rows = all(name.lstrip("-").isdigit() for name in names)
            return np.array([int(name) for name in names]) if are_rows else names
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise ArtifactError(
            f"{path} cannot be read as a list of rows or names ({error!r})."
        ) from error
    raise ArtifactError(
        f"{path}: lists are read from .npy, .npz, .json or .txt files; pickles and PyTorch files "
        "are not, because they can run code. Save the rows with np.save('rows.npy', rows)."
    )


def _rows_of_names(path: Path, names: list[str], beton: Beton | None) -> Rows:
    """Look up the rows of the manifest's source files with these names."""
    if beton is None or beton.manifest is None:
        raise InvalidValueError(
            f"{path} lists file names, but without a manifest they cannot be looked up. Name "
            "images that fastprune converted (--beton), or list rows."
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
    # A last part names an image if it is unique; whole names win over last parts.
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


def _read_issues(path: Path, num_rows: int) -> Rows:
    """Return the rows that a table lists: if it has a column of issues, those marked in it."""
    table = _read_table(path)
    row_column = next((name for name in _ROW_COLUMNS if name in table.column_names), None)
    rows = None if row_column is None else _as_rows(path, _filled(path, table, row_column))
    if _ISSUE not in table.column_names:
        if rows is None:
            raise ArtifactError(
                f"{path} has neither a column {_ISSUE!r} nor one with rows (found: "
                f"{', '.join(table.column_names)}). Save cleanlab's get_label_issues() with its "
                "index."
            )
        return rows
    marks = _filled(path, table, _ISSUE)
    if marks.dtype.kind not in "biu" or not np.isin(marks, (0, 1)).all():
        raise ArtifactError(f"{path}: the column {_ISSUE!r} must hold true and false.")
    if rows is None:
        _require_marks(path, len(marks), num_rows)
        return np.flatnonzero(marks)
    marked: Rows = rows[marks.astype(bool)]
    return marked


def _filled(path: Path, table: pa.Table, name: str) -> NDArray[Any]:
    """Return a column as an array, if no line of it is empty."""
    column = table[name]
    if column.null_count:
        raise ArtifactError(f"{path}: the column {name!r} has {column.null_count:,} empty lines.")
    values: NDArray[Any] = column.to_numpy()
    return values


def _require_marks(path: Path, count: int, num_rows: int) -> None:
    if count != num_rows:
        raise InvalidValueError(
            f"{path} marks {count:,} rows, but the scores are of {num_rows:,}. Give one mark per "
            "row, or the rows themselves (in a table, a column row or index)."
        )


def _read_table(path: Path) -> pa.Table:
    """Read a .csv or .parquet file."""
    try:
        open_regular(path).close()
        table = _TABLE_READERS[path.suffix](path)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ArtifactError(f"{path} cannot be read as {path.suffix[1:]} ({error}).") from error
    twice = [name for name, count in Counter(table.column_names).items() if count > 1]
    if twice:
        raise ArtifactError(
            f"{path} has several columns called {twice[0]!r}. Rename or remove some."
        )
    return table


def _read_metrics(path: Path) -> dict[str, NDArray[Any]]:
    """Read metric name -> values in row order."""
    if path.suffix == ".npy":
        return {path.stem: _read_array(path)}
    if path.suffix not in _TABLE_READERS:
        raise ArtifactError(f"{path}: scores are read from .npy, .csv or .parquet files alone.")
    table = _read_table(path)
    columns = {
        field.name: table[field.name].to_numpy()
        for field in table.schema
        if pa.types.is_integer(field.type) or pa.types.is_floating(field.type)
    }
    metrics = {name: values for name, values in columns.items() if name not in _NOT_METRICS}
    if not metrics:
        raise ArtifactError(
            f"{path} has no column of numbers to rank rows by (found: "
            f"{', '.join(table.column_names)})."
        )
    if "row" not in columns:
        return metrics
    # Tools write their lines in any order, so the column decides.
    order = np.argsort(columns["row"], kind="stable")
    if not np.array_equal(columns["row"][order], np.arange(len(order))):
        raise InvalidValueError(
            f"{path}: the column row must hold 0 to {len(order) - 1:,}, each once."
        )
    return {name: values[order] for name, values in metrics.items()}


def _read_class_std(path: Path, beton: Beton) -> NDArray[np.float64]:
    std = _read_array(path)
    if std.shape != (beton.num_classes,) or std.dtype.kind not in "fiu":
        raise InvalidValueError(
            f"{path} must hold {beton.num_classes:,} numbers, one per class of {beton.path}, but "
            f"it holds {std.dtype} of shape {std.shape}."
        )
    return std.astype(np.float64)


def _read_array(path: Path) -> NDArray[Any]:
    """Read a .npy file without pickles."""
    try:
        return read_npy(path)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read as a .npy file ({error}).") from error
