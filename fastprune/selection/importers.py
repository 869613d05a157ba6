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

from fastprune.base.errors import ArtifactError, InvalidValueError
from fastprune.base.provenance import require_same_images
from fastprune.base.untrusted import open_regular, read_json, read_npy, read_npz_member, read_text
from fastprune.beton.beton import Beton
from fastprune.rows.score_table import ScoreTable, is_score_table
from fastprune.rows.subset import Subset

Rows = NDArray[np.int64]

_TABLE_READERS = {".csv": pyarrow.csv.read_csv, ".parquet": pq.read_table}
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
    columns = _read_columns(path)
    for name, values in columns.items():
        # Dates and records would be cast without a word.
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
    with np.errstate(over="ignore"):  # what becomes infinite is refused by its row
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


# How pandas and others call the column of a table that says which row a line is of.
_ROW_COLUMNS = ("row", "index", "indices", "__index_level_0__", "", "Unnamed: 0")
_ISSUE = "is_label_issue"


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
        ArtifactError: the file cannot be read as what its name says, or has no such column.
        InvalidValueError: it is of another number of rows, or lists names without a beton.
    """
    path = Path(path)
    if path.suffix in _TABLE_READERS:
        listed = _issues(path, num_rows)
    else:
        listed = _read_list(path)
        if isinstance(listed, list) and listed and all(isinstance(e, str) for e in listed):
            if beton is None:
                raise InvalidValueError(
                    f"{path} lists file names, which the manifest of the images knows. Name them "
                    "(--beton), or list rows."
                )
            listed = _rows_of_names(path, listed, beton)
        listed = np.asarray(listed)
        if listed.dtype == bool and listed.ndim == 1:
            _require_lines(path, len(listed), num_rows)
            listed = np.flatnonzero(listed)
    if listed.ndim != 1 or (listed.dtype.kind not in "iu" and len(listed)):
        raise InvalidValueError(
            f"{path} must list rows or mark them, but it holds {listed.dtype} of shape "
            f"{listed.shape}."
        )
    rows = np.unique(listed.astype(np.int64))
    if len(rows) and (rows[0] < 0 or rows[-1] >= num_rows):
        wrong = rows[0] if rows[0] < 0 else rows[-1]
        raise InvalidValueError(
            f"{path} excludes row {wrong:,}, but the scores are of rows 0 to {num_rows - 1:,}. It "
            "was made for other images, or in another order."
        )
    return rows


def _issues(path: Path, num_rows: int) -> NDArray[Any]:
    """Return the rows that a table names, those with an issue where it says which have."""
    table = _read_table(path)
    names = table.column_names
    row_column = next((name for name in _ROW_COLUMNS if name in names), None)
    rows = None if row_column is None else _plain(path, table[row_column], row_column)
    if _ISSUE not in names:
        if rows is None:
            raise ArtifactError(
                f"{path} has neither a column {_ISSUE!r} nor one with rows (found: "
                f"{', '.join(names)}). Save cleanlab's get_label_issues() with its index."
            )
        return rows
    marks = _plain(path, table[_ISSUE], _ISSUE)
    if marks.dtype.kind not in "biu" or not np.isin(marks, (0, 1)).all():
        raise ArtifactError(f"{path}: the column {_ISSUE!r} must hold true and false.")
    if rows is None:
        _require_lines(path, len(marks), num_rows)
        rows = np.arange(num_rows)
    issues: NDArray[Any] = rows[marks.astype(bool)]
    return issues


def _plain(path: Path, column: Any, name: str) -> NDArray[Any]:
    """Return a column as an array, if no line of it is empty."""
    if column.null_count:
        raise ArtifactError(f"{path}: the column {name!r} has {column.null_count:,} empty lines.")
    return column.to_numpy()  # type: ignore[no-any-return]


def _require_lines(path: Path, count: int, num_rows: int) -> None:
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


def _read_columns(path: Path) -> dict[str, NDArray[Any]]:
    """Read metric name -> values in row order."""
    if path.suffix == ".npy":
        return {path.stem: read_array(path)}
    if path.suffix not in _TABLE_READERS:
        raise ArtifactError(f"{path}: scores are read from .npy, .csv or .parquet files alone.")
    table = _read_table(path)
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
