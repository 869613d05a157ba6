"""Images in object storage: folders, tars and Parquet files, listed and fetched on threads."""

import fnmatch
import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import pyarrow as pa

from fastprune.base.errors import ConversionError, StorageError
from fastprune.beton.convert.sources.folder import EXTENSIONS, FlatSource, FolderSource, TreeSource
from fastprune.beton.convert.sources.listing import (
    FetchedSource,
    FileStatus,
    Listing,
    Source,
    require_one_set,
)
from fastprune.beton.convert.sources.parquet import (
    ParquetSource,
    Rows,
    bytes_in,
    images_of_group,
    rows_of_file,
)
from fastprune.beton.convert.sources.tars import Sample, TarSource, samples_of
from fastprune.beton.remote.file import RemoteFile
from fastprune.beton.remote.store import ListedObject, Store

Result = TypeVar("Result")

# The SDK keeps 25 connections; more threads would wait for one.
NUM_THREADS = 24
# Chunks of at most 4 MiB (or one image) that are fetched or wait for a worker.
_CHUNKS_AHEAD = 16
# A neighbor's header, and the class between two images, come along.
_GAP_BYTES = 16 << 10


def bucket_source(url: str, labels: str | Path | None, *, unlabeled: bool) -> Source:
    """Return the source that reads what a URL names; the bucket is listed once.

    Args:
        url: of a folder, of a shard, or of shards by a pattern (s3://bucket/train-*.tar).
        labels: the local file with the classes of a flat folder.
        unlabeled: whether classes are left out.

    Raises:
        InvalidValueError: it is no URL of object storage.
        ConversionError: a folder holds shards of several splits.
        StorageError: nothing is there, access is denied, or the server does not answer.
    """
    parent, _, last = url.rstrip("/").rpartition("/")
    for suffix, kind in ((".parquet", BucketParquet), (".tar", BucketTars)):
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
    store = Store(url)
    objects = Objects(store)
    if labels is not None:
        return BucketFlat(store.url, Path(labels), objects)
    for suffix, kind in ((".parquet", BucketParquet), (".tar", BucketTars)):
        for folder in ("", "data/"):
            inside = [entry for entry in objects.entries if entry.name.startswith(folder)]
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
                where = f"{store.url}/{folder}".rstrip("/")
                require_one_set(where, names, suffix, has_folders)
                return kind([RemoteFile(store, entry) for entry in shards], unlabeled)
    return (BucketTree if unlabeled else BucketFolder)(store.url, objects)


def fetched_ahead(
    source: FetchedSource, chunks: Iterable[list[Any]]
) -> Generator[list[bytes | None]]:
    """Yield the images of each chunk of locations, fetched while earlier ones are in work."""
    stop = threading.Event()
    waiting: deque[list[Future[list[bytes | None]]]] = deque()
    with ThreadPoolExecutor(NUM_THREADS, "fastprune-source") as pool:
        try:
            for locations in chunks:
                waiting.append(
                    [pool.submit(source.fetch, piece, stop) for piece in source.pieces(locations)]
                )
                if len(waiting) == _CHUNKS_AHEAD:
                    yield [image for piece in waiting.popleft() for image in piece.result()]
            while waiting:
                yield [image for piece in waiting.popleft() for image in piece.result()]
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True)
class BucketTars(TarSource):
    """Tars in object storage: a chunk of samples is a request."""

    shards: Sequence[RemoteFile]

    def pieces(self, locations: list[Any]) -> list[list[Any]]:
        """Join neighbors."""
        pieces: list[list[Any]] = []
        end = None
        for shard, offset, size in locations:
            if end is not None and end[0] == shard and 0 <= offset - end[1] <= _GAP_BYTES:
                pieces[-1].append((shard, offset, size))
            else:
                pieces.append([(shard, offset, size)])
            end = shard, offset + size
        return pieces

    def fetch(self, piece: list[Any], stop: threading.Event) -> list[bytes | None]:
        """Fetch the images of one range."""
        shard, start, _ = piece[0]
        end = piece[-1][1] + piece[-1][2]
        file = self.shards[shard]
        content = file.store.read(file.entry.name, start, end - start, stop=stop)
        return [content[offset - start : offset - start + size] for _, offset, size in piece]

    def _samples(self) -> Iterator[Iterable[Sample]]:
        return _on_threads(lambda shard: list(samples_of(shard, self.unlabeled)), self.shards)


@dataclass(frozen=True)
class BucketParquet(ParquetSource):
    """Parquet files in object storage: the images of a row group are a request."""

    files: Sequence[RemoteFile]
    _groups: "_RowGroups" = field(default_factory=lambda: _RowGroups(), compare=False)

    def pieces(self, locations: list[Any]) -> list[list[Any]]:
        """Keep a chunk together; each image with the row group that it is in."""
        return [
            [(self._groups.get(self.files[number], group), row) for number, group, row in locations]
        ]

    def fetch(self, piece: list[Any], stop: threading.Event) -> list[bytes | None]:
        """Take the images out of their row groups."""
        del stop
        return [bytes_in(group.images, row) for group, row in piece]

    def _rows(self, column: str | None) -> Iterator[Rows]:
        return _on_threads(partial(rows_of_file, column=column), self.files)


class _RowGroup:
    """The images of a row group, fetched by the first thread that wants them."""

    def __init__(self, file: RemoteFile, number: int):
        self._file, self._number = file, number
        self._lock = threading.Lock()
        self._images: pa.Array | None = None

    @property
    def images(self) -> pa.Array:
        with self._lock:
            if self._images is None:
                self._images = images_of_group(self._file, self._number)
            return self._images


class _RowGroups:
    """Row groups that are in use, and the last one, which the next chunk may begin with."""

    def __init__(self) -> None:
        self._in_use: WeakValueDictionary[tuple[RemoteFile, int], _RowGroup] = WeakValueDictionary()
        self._last: _RowGroup | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _RowGroups, ()

    def get(self, file: RemoteFile, number: int) -> _RowGroup:
        group = self._in_use.get((file, number))
        if group is None:
            group = self._in_use[file, number] = _RowGroup(file, number)
        self._last = group
        return group


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

    def folders(self) -> list[str]:
        """Return the folders directly below the URL, in the order of their names."""
        return sorted({entry.name.split("/")[0] for entry in self.entries if "/" in entry.name})

    def images_below(self, inner: str) -> list[ListedObject]:
        """Return the images in a folder, "" for all, in the order in which local ones are listed.

        Their folders come in sorted order, and each folder's images together.
        """
        start = f"{inner}/" if inner else ""
        first = bisect_left(self.entries, start, key=lambda entry: entry.name)
        inside = takewhile(
            lambda entry: entry.name.startswith(start), islice(self.entries, first, None)
        )
        images = [entry for entry in inside if entry.name.lower().endswith(EXTENSIONS)]
        return sorted(images, key=lambda entry: entry.name.rpartition("/")[::2])


class _ByObject:
    """What folders of images in object storage have in common: an image is a request."""

    objects: Objects

    def pieces(self, locations: list[Any]) -> list[list[Any]]:
        """Divide them all."""
        return [[location] for location in locations]

    def fetch(self, piece: list[Any], stop: threading.Event) -> list[bytes | None]:
        """Fetch one image."""
        [(name, size)] = piece
        return [self.objects.store.read_once(name, size, stop=stop)]


@dataclass(frozen=True)
class BucketFolder(_ByObject, FolderSource):
    """Folders of images in object storage, which are the classes."""

    objects: Objects

    def list_images(self) -> Listing:
        """List the images in the order in which a local folder's are."""
        return _with_sizes(super().list_images())

    def _class_folders(self) -> list[str]:
        if folders := self.objects.folders():
            return folders
        raise ConversionError(
            f"{self.root} has objects, but no folders. It must have one for each class, as "
            "torchvision's ImageFolder expects; or name its labels, or leave them out (--labels, "
            "--no-labels)."
        )

    def _images_below(self, class_name: str) -> Iterator[tuple[str, FileStatus]]:
        return ((entry.name, entry) for entry in self.objects.images_below(class_name))


@dataclass(frozen=True)
class BucketTree(_ByObject, TreeSource):
    """All images below a URL, without classes."""

    objects: Objects

    def list_images(self) -> Listing:
        """List the images in the order in which a local folder's are."""
        return _with_sizes(super().list_images())

    def _images_below(self) -> Iterator[tuple[str, FileStatus]]:
        return ((entry.name, entry) for entry in self.objects.images_below(""))


@dataclass(frozen=True)
class BucketFlat(_ByObject, FlatSource):
    """The images directly below a URL; a local file has their classes."""

    objects: Objects

    def list_images(self) -> Listing:
        """List the images in the order in which a local folder's are."""
        return _with_sizes(super().list_images())

    def _files(self) -> Sequence[tuple[str, FileStatus]]:
        images = self.objects.images_below("")
        return [(entry.name, entry) for entry in images if "/" not in entry.name]


def _with_sizes(listing: Listing) -> Listing:
    """Let an image be located by its name and size."""
    names, sizes = listing.names, listing.source_bytes
    return replace(listing, locate=lambda index: (names[index], int(sizes[index])))


def _on_threads(
    function: Callable[[RemoteFile], Result], files: Sequence[RemoteFile]
) -> Iterator[Result]:
    """Yield what a function returns of each file, in their order."""
    with ThreadPoolExecutor(NUM_THREADS, "fastprune-listing") as pool:
        yield from pool.map(function, files)
