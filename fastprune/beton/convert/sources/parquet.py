"""Parquet files as Hugging Face writes image sets: a struct with the bytes, and a label."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fastprune.base.errors import ConversionError
from fastprune.base.untrusted import open_regular, parse_json
from fastprune.beton.convert.sources.listing import Listing, SourceFile, shards_identity

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

    def list_images(self) -> Listing:
        """Read every row's label; the images stay on disk.

        Raises:
            ConversionError: a file is no Parquet, or has no image or label column.
        """
        schema = _opened(self.files[0]).schema_arrow
        column = None if self.unlabeled else _label_column(schema, self.files[0])
        names: list[str] = []
        labels: list[Any] = []
        places: list[NDArray[np.int32]] = []
        sizes: list[NDArray[np.int64]] = []
        for number, (path, rows) in enumerate(zip(self.files, self._rows(column), strict=True)):
            labels.append(rows.labels)
            for group, (num_rows, mean_bytes) in enumerate(rows.groups):
                place = np.full((num_rows, 3), (number, group, 0), np.int32)
                place[:, 2] = np.arange(num_rows)
                places.append(place)
                sizes.append(np.full(num_rows, mean_bytes, np.int64))
            names += [f"{path.name}#{row}" for row in range(len(rows.labels))]
        if not names:
            raise ConversionError(f"{self.files[0]} and its like hold no rows.")
        table = np.concatenate(places)
        return Listing(
            root=str(self.files[0].parent),
            names=names,
            labels=np.concatenate(labels),
            source_bytes=np.concatenate(sizes),
            locate=lambda index: tuple(table[index].tolist()),
            class_names=None if column is None else _class_names(schema, column),
            identity=shards_identity(self.files),
        )

    def read(self, location: tuple[int, int, int]) -> tuple[bytes, None]:
        """Take one image out of its row group, which stays in memory for the next ones."""
        number, group, row = location
        content = bytes_in(_images(self.files[number], group), row)
        if content is None:
            raise without_bytes()
        return content, None

    def _rows(self, column: str | None) -> Iterator[Rows]:
        """Yield what is known of each file's rows."""
        for path in self.files:
            yield rows_of_file(path, column)


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


def without_bytes() -> ConversionError:
    """Return the error of a row that has no image in it."""
    return ConversionError(
        "it has no bytes in the Parquet file. If the images stand beside it as files, convert "
        "their folder"
    )


def bytes_in(images: pa.Array, row: int) -> bytes | None:
    """Take an image out of its column; None where it has no bytes."""
    value = images[row].as_py()
    content: bytes | None = value.get("bytes") if isinstance(value, dict) else value
    return content


# Neighboring rows go to one worker, so one row group is enough; more would cost its memory again.
@lru_cache(maxsize=1)
def _images(path: SourceFile, group: int) -> pa.Array:
    return images_of_group(path, group)


def images_of_group(path: SourceFile, group: int) -> pa.Array:
    """Read the image column of one row group."""
    file = _opened(path)
    column = _image_column(file.schema_arrow, path)
    table = file.read_row_group(group, columns=[column], use_threads=False)
    return table[column].combine_chunks()


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
