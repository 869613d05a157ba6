"""Images in object storage: which source reads what a URL names, and the objects below it."""

import fnmatch
import threading
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

from fastprune.base.errors import ConversionError, StorageError
from fastprune.beton.convert.folders import (
    EXTENSIONS,
    FlatSource,
    FolderSource,
    NamedStatus,
    TreeSource,
)
from fastprune.beton.convert.listing import Source, require_one_set
from fastprune.beton.convert.parquet import ParquetSource
from fastprune.beton.convert.tars import TarSource
from fastprune.beton.remote.file import RemoteFile
from fastprune.beton.remote.store import ListedObject, Store


def bucket_source(url: str, labels: str | Path | None, *, unlabeled: bool) -> Source:
    """Return the source that reads what a URL names; the bucket is listed once.

    Args:
        url: of a folder, of a shard, or of shards by a pattern (s3://bucket/train-*.tar).
        labels: the local file with the classes of a flat folder.
        unlabeled: whether classes are left out.

    Raises:
        InvalidValueError: it is not a URL of object storage.
        ConversionError: a folder holds shards of several splits.
        StorageError: nothing is there, access is denied, or the server does not answer.
    """
    parent, _, last = url.rstrip("/").rpartition("/")
    for suffix, kind in ((".parquet", ParquetSource), (".tar", TarSource)):
        if last.endswith(suffix):
            store = Store(parent)
            found = {entry.name: entry for entry in store.listed(recursive=False)}
            # A name may hold brackets, which are a pattern too.
            names = [last] if last in found else fnmatch.filter(found, last)
            if not names:
                raise StorageError(
                    f"{url} does not exist. Compare the URL with a listing of the bucket."
                )
            return kind([RemoteFile(store, found[name]) for name in sorted(names)], unlabeled)
    objects = Objects(Store(url))
    if labels is not None:
        return FlatSource(objects, Path(labels))
    for suffix, kind in ((".parquet", ParquetSource), (".tar", TarSource)):
        for folder in ("", "data/"):
            if shards := objects.shards_in(folder, suffix):
                return kind(shards, unlabeled)
    return TreeSource(objects) if unlabeled else FolderSource(objects)


@dataclass(frozen=True)
class Objects:
    """The objects below a URL, listed when they are first asked for."""

    store: Store

    @cached_property
    def entries(self) -> list[ListedObject]:
        """All of them, in the order of their names."""
        return self.store.listed(recursive=True)

    def __reduce__(self) -> tuple[Any, ...]:
        # Without the list, which may have millions of entries.
        return Objects, (self.store,)

    @property
    def root(self) -> str:
        """The URL."""
        return self.store.url

    def shards_in(self, folder: str, suffix: str) -> list[RemoteFile]:
        """Return the shards directly in a folder, "" for the root.

        Raises:
            ConversionError: they are of several splits, or stand beside folders.
        """
        inside = [entry for entry in self.entries if entry.name.startswith(folder)]
        shards = [
            entry
            for entry in inside
            if entry.name.endswith(suffix) and "/" not in entry.name[len(folder) :]
        ]
        if shards:
            names = [entry.name.removeprefix(folder) for entry in shards]
            has_folders = not folder and any(
                "/" in entry.name and not entry.name.startswith(".") for entry in inside
            )
            require_one_set(f"{self.root}/{folder}".rstrip("/"), names, suffix, has_folders)
        return [RemoteFile(self.store, entry) for entry in shards]

    def class_folders(self) -> list[str]:
        """List the folders directly below the URL, as `Files`."""
        folders = sorted({entry.name.split("/")[0] for entry in self.entries if "/" in entry.name})
        if not folders:
            raise ConversionError(
                f"{self.root} has objects, but no folders. It must have one for each class, as "
                "torchvision's ImageFolder expects; or name its labels, or leave them out "
                "(--labels, --no-labels)."
            )
        return folders

    def images_below(self, inner: str) -> Iterator[NamedStatus]:
        """Yield the images in a folder, in the order of local files: folder by folder."""
        start = f"{inner}/" if inner else ""
        first = bisect_left(self.entries, start, key=lambda entry: entry.name)
        inside = takewhile(
            lambda entry: entry.name.startswith(start), islice(self.entries, first, None)
        )
        images = [entry for entry in inside if entry.name.lower().endswith(EXTENSIONS)]
        for entry in sorted(images, key=lambda entry: entry.name.rpartition("/")[::2]):
            yield entry.name, entry

    def images_directly_below(self) -> Sequence[NamedStatus]:
        """List the images in no folder, as `Files`."""
        return [(name, entry) for name, entry in self.images_below("") if "/" not in name]

    def pieces(self, locations: list[Any]) -> list[list[Any]]:
        """Divide them all: an image is a request."""
        return [[location] for location in locations]

    def fetch(self, piece: list[Any], stop: threading.Event) -> list[bytes]:
        """Fetch one image."""
        [(name, size)] = piece
        return [self.store.read_once(name, size, stop=stop)]
