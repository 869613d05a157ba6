"""Where images come from: folders, tars, Parquet files, datasets."""

from pathlib import Path
from typing import Any

from fastprune.base.errors import InvalidValueError
from fastprune.beton.convert.bucket import bucket_source
from fastprune.beton.convert.dataset import DatasetSource, without_decoding
from fastprune.beton.convert.folders import FlatSource, FolderSource, LocalFiles, TreeSource
from fastprune.beton.convert.listing import Source, require_one_set
from fastprune.beton.convert.parquet import ParquetSource
from fastprune.beton.convert.tars import TarSource
from fastprune.beton.opening import is_url


def source_for(images: Any, labels: str | Path | None, *, unlabeled: bool = False) -> Source:
    """Return the source that reads what the user named.

    Args:
        images: a folder with class folders, with tar or Parquet shards, or, given `labels`, with
            images; a shard; a pattern of shards; a URL of any of them; or an indexable dataset.
        labels: the file with the classes of a flat folder.
        unlabeled: whether classes are left out: a folder is any tree of images then, and shards
            and datasets need no labels.

    Raises:
        InvalidValueError: it is neither a path nor a dataset, or there are labels to be left out.
        ConversionError: a folder holds shards of several splits.
    """
    if labels is not None and unlabeled:
        raise InvalidValueError(
            f"labels ({labels}) were given for images that shall have none. Leave one of them "
            "out (--labels, --no-labels)."
        )
    if not isinstance(images, str | Path):
        if not (hasattr(images, "__len__") and hasattr(images, "__getitem__")):
            raise InvalidValueError(
                f"images is a {type(images).__name__}, but must be a path or an object with "
                "__len__ and __getitem__ that gives (image, label)."
            )
        return DatasetSource(without_decoding(images), unlabeled)
    if isinstance(images, str) and is_url(images):
        return bucket_source(images, labels, unlabeled=unlabeled)
    path = Path(images)
    if labels is not None:
        return FlatSource(LocalFiles(path), Path(labels))
    if shards := shard_files(path, ".parquet"):
        return ParquetSource(shards, unlabeled)
    if shards := shard_files(path, ".tar"):
        return TarSource(shards, unlabeled)
    files = LocalFiles(path)
    return TreeSource(files) if unlabeled else FolderSource(files)


def shard_files(path: Path, suffix: str) -> list[Path]:
    """Find the shards at a path: a file itself, a pattern with `*`, or all of them in a folder.

    Args:
        path: a file, a pattern, or a folder; its subfolder `data` is looked into as well, where
            Hugging Face's repositories have their files.
        suffix: of the shards, such as ".tar".

    Returns:
        The files in the order of their names; empty where there are none.

    Raises:
        ConversionError: the folder holds the shards of more than one split, or class folders too.
    """
    if path.suffix == suffix and path.is_file():
        return [path]
    if "*" in path.name:
        return sorted(file for file in path.parent.glob(path.name) if file.suffix == suffix)
    for folder in (path, path / "data"):
        files = sorted(folder.glob(f"*{suffix}"))
        if files:
            has_folders = folder == path and any(
                entry.is_dir() and not entry.name.startswith(".") for entry in path.iterdir()
            )
            require_one_set(str(folder), [file.name for file in files], suffix, has_folders)
            return files
    return []
