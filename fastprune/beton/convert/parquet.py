"""Parquet files as Hugging Face writes image sets: a struct with the bytes, and a label."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fastprune.base.errors import ConversionError
from fastprune.base.files import open_regular
from fastprune.base.headers import parse_json
from fastprune.beton.convert.listing import Listing, SourceFile, on_threads, shards_identity

# As the image sets on Hugging Face call them; the first that fits is taken.
_IMAGE_NAMES = ("image", "img", "jpg", "png")
_LABEL_NAMES = ("label", "fine_label", "labels", "cls")


@dataclass(frozen=True, eq=False)
class Rows:
    """What is known of a file's rows.

    Attributes:
        labels: (n,) int64.
        groups: of each row group its rows and their mean size in bytes.
    """

    labels: NDArray[np.int64]
    groups: list[tuple[int, int]]


@dataclass(frozen=True)
class ParquetSource:
    """The rows of Parquet files, in file order."""

    files: Sequence[SourceFile]
    unlabeled: bool = False
    _groups: "_RowGroups" = field(default_factory=lambda: _RowGroups(), compare=False)

    @property
    def reader(self) -> "ParquetSource":
        """The source itself."""
        return self

    def list_images(self) -> Listing:
        """Read every row's label; the images stay on disk.

        Raises:
            ConversionError: a file is not Parquet, or has no image or label column.
        """
        schema = _opened(self.files[0]).schema_arrow
        column = None if self.unlabeled else _label_column(schema, self.files[0])
        names: list[str] = []
        labels: list[Any] = []
        places: list[NDArray[np.int64]] = []
        sizes: list[NDArray[np.int64]] = []
        listed = on_threads(partial(rows_of_file, column=column), self.files)
        for number, (path, rows) in enumerate(zip(self.files, listed, strict=True)):
            labels.append(rows.labels)
            for group, (num_rows, mean_bytes) in enumerate(rows.groups):
                place = np.full((num_rows, 3), (number, group, 0), np.int64)
                place[:, 2] = np.arange(num_rows)
                places.append(place)
                sizes.append(np.full(num_rows, mean_bytes, np.int64))
            names += [f"{path.name}#{row}" for row in range(len(rows.labels))]
        if not names:
            raise ConversionError(f"{self.files[0]} and its like hold no rows.")
        return Listing(
            root=str(self.files[0].parent),
            names=names,
            labels=np.concatenate(labels),
            sizes=np.concatenate(sizes),
            places=np.concatenate(places),
            class_names=None if column is None else _class_names(schema, column),
            identity=shards_identity(self.files),
        )

    def pieces(self, locations: list[Any]) -> list[list[Any]]:
        """Keep a chunk together; each image with the row group that it is in."""
        return [
            [(self._groups.get(self.files[number], group), row) for number, group, row in locations]
        ]

    def fetch(self, piece: list[Any], stop: threading.Event) -> list[bytes | ConversionError]:
        """Take the images out of their row groups."""
        del stop
        images = (group.images[row].as_py() for group, row in piece)
        contents = (value.get("bytes") if isinstance(value, dict) else value for value in images)
        missing = ConversionError(
            "it has no bytes in the Parquet file. If the images stand beside it as files, convert "
            "their folder"
        )
        return [missing if content is None else content for content in contents]


class _RowGroup:
    """The images of a row group, read by the first thread that wants them."""

    def __init__(self, file: SourceFile, number: int):
        self._file, self._number = file, number
        self._lock = threading.Lock()
        self._images: pa.Array | None = None

    @property
    def images(self) -> pa.Array:
        with self._lock:
            if self._images is None:
                file = _opened(self._file)
                column = _image_column(file.schema_arrow, self._file)
                table = file.read_row_group(self._number, columns=[column], use_threads=False)
                self._images = table[column].combine_chunks()
            return self._images


class _RowGroups:
    """Row groups that are in use, and the last one, which the next chunk may begin with."""

    def __init__(self) -> None:
        self._in_use: WeakValueDictionary[tuple[SourceFile, int], _RowGroup] = WeakValueDictionary()
        self._last: _RowGroup | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _RowGroups, ()

    def get(self, file: SourceFile, number: int) -> _RowGroup:
        group = self._in_use.get((file, number))
        if group is None:
            group = self._in_use[file, number] = _RowGroup(file, number)
        self._last = group
        return group


def rows_of_file(path: SourceFile, column: str | None) -> Rows:
    """Read what is known of a file's rows without reading images; no column means no labels."""
    file = _opened(path)
    _image_column(file.schema_arrow, path)
    if column is None:
        labels = np.zeros(file.metadata.num_rows, np.int64)
    else:
        _label_column(file.schema_arrow, path)
        labels = _labels(file, column, path)
    facts = [file.metadata.row_group(group) for group in range(file.num_row_groups)]
    # A row group is not read for its rows' sizes: their mean cuts the work well enough.
    groups = [(one.num_rows, one.total_byte_size // max(1, one.num_rows)) for one in facts]
    return Rows(labels, groups)


def _opened(path: SourceFile) -> pq.ParquetFile:
    """Open a Parquet file and read its metadata."""
    try:
        if not isinstance(path, Path):
            return pq.ParquetFile(path.open("rb"))
        open_regular(path).close()
        return pq.ParquetFile(path, memory_map=True)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ConversionError(
            f"{path} cannot be read as Parquet: {error}. Get it again."
        ) from error


def _labels(file: pq.ParquetFile, column: str, path: SourceFile) -> Any:
    """Read one file's labels, (n,) int64."""
    values = file.read(columns=[column], use_threads=False)[column]
    if values.null_count:
        raise ConversionError(f"{path} has {values.null_count:,} rows without a {column}.")
    return values.to_numpy().astype(np.int64)


def _image_column(schema: pa.Schema, path: SourceFile) -> str:
    """Name the column with the images: a struct with bytes, or the bytes themselves."""

    def fits(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind):
            index = kind.get_field_index("bytes")
            return index >= 0 and _is_binary(kind.field(index).type)
        return _is_binary(kind)

    return _pick(schema, _IMAGE_NAMES, fits, f"{path} has no image column (struct with bytes)")


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _label_column(schema: pa.Schema, path: SourceFile) -> str:
    """Name the column with the class numbers."""
    return _pick(
        schema, _LABEL_NAMES, pa.types.is_integer, f"{path} has no label column (integers)"
    )


def _pick(schema: pa.Schema, names: tuple[str, ...], fits: Any, missing: str) -> str:
    """Name the column of a fitting type with the first of the usual names, or the only one."""
    fitting = [field.name for field in schema if fits(field.type)]
    usual = [name for name in names if name in fitting]
    if usual:
        return usual[0]
    if len(fitting) == 1:
        return str(fitting[0])
    columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
    raise ConversionError(f"{missing} named {' or '.join(names)}; its columns are {columns}.")


def _class_names(schema: pa.Schema, column: str) -> tuple[str, ...] | None:
    """Read the class names from Hugging Face's description of the label column."""
    try:
        described = parse_json((schema.metadata or {})[b"huggingface"])
        names = described["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    are_names = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return tuple(names) if are_names else None
