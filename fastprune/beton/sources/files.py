"""Shard files of one split: which they are, and what tells that one has changed."""

import hashlib
import re
from pathlib import Path

from fastprune.errors import ConversionError

# train-00003-of-00014.parquet, imagenet-train-000012.tar: what stands before is the split's name.
_NUMBER = re.compile(r"[-_.]?\d+(-of-\d+.*)?$")


def shard_files(path: Path, suffix: str) -> list[Path]:
    """The shards at a path: a file itself, a pattern with `*`, or all of them in a folder.

    Args:
        path: a file, a pattern, or a folder; its subfolder `data` is looked into as well.
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
        splits = sorted({_NUMBER.sub("", file.stem) for file in files})
        if len(splits) > 1:
            raise ConversionError(
                f"{folder} holds the shards of several splits ({', '.join(splits)}). Name those of "
                f"one: '{folder / splits[-1]}-*{suffix}'"
            )
        if files and folder == path and any(_is_class_folder(entry) for entry in path.iterdir()):
            raise ConversionError(
                f"{path} holds both folders and {suffix} files. Name the files by a pattern, "
                f"'{path}/*{suffix}', or move them away to convert the folders."
            )
        if files:
            return files
    return []


def _is_class_folder(entry: Path) -> bool:
    return entry.is_dir() and not entry.name.startswith(".")


def files_identity(files: list[Path]) -> str:
    """A digest that changes when a file is added, removed or replaced."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        status = file.stat()
        text = f"{file.name}\0{status.st_size}\0{status.st_mtime_ns}\0"
        digest.update(text.encode(errors="surrogateescape"))
    return digest.hexdigest()
