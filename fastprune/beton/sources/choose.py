"""Which kind of source it is that the user named."""

from pathlib import Path
from typing import Any

from fastprune.beton.sources import Source
from fastprune.beton.sources.dataset import DatasetSource
from fastprune.beton.sources.files import shard_files
from fastprune.beton.sources.flat import FlatSource
from fastprune.beton.sources.folder import FolderSource
from fastprune.beton.sources.parquet import ParquetSource
from fastprune.beton.sources.tars import TarSource
from fastprune.errors import InvalidValueError


def source_for(images: Any, labels: str | Path | None) -> Source:
    """The source that reads what the user named.

    Args:
        images: a folder with class folders, with tar or Parquet shards, or, given `labels`, with
            images; a shard; a pattern of shards; or an indexable dataset.
        labels: the file with the classes of a flat folder.

    Raises:
        InvalidValueError: it is neither a path nor a dataset.
        ConversionError: a folder holds shards of several splits.
    """
    if not isinstance(images, str | Path):
        if not (hasattr(images, "__len__") and hasattr(images, "__getitem__")):
            raise InvalidValueError(
                f"images is a {type(images).__name__}, but must be a path or an object with "
                "__len__ and __getitem__ that gives (image, label)."
            )
        return DatasetSource(images)
    path = Path(images)
    if labels is not None:
        return FlatSource(path, Path(labels))
    if shards := shard_files(path, ".parquet"):
        return ParquetSource(shards)
    if shards := shard_files(path, ".tar"):
        return TarSource(shards)
    return FolderSource(path)
