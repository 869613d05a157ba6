"""A listing: the table of the images of a source; and how a source gives them."""

import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fastprune.base.errors import ConversionError, InvalidValueError
from fastprune.beton.convert.transcode import Content
from fastprune.beton.remote.file import RemoteFile
from fastprune.beton.remote.store import ListedObject

# train-00003-of-00014.parquet, imagenet-train-000012.tar: what stands before is the split's name.
_NUMBER = re.compile(r"[-_.]?\d+(-of-\d+.*)?$")


# A file of a source, and what is compared of its status.
SourceFile = Path | RemoteFile
FileStatus = os.stat_result | ListedObject

Result = TypeVar("Result")

_LISTING_THREADS = 24


class Names(Protocol):
    """A name per image: a list, or something that makes the names up when asked."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> str: ...


@dataclass(frozen=True)
class Listing:
    """The images of a source, in row order: a table whose parts shards and tasks take.

    Attributes:
        root: the folder or dataset, for messages.
        names: (N,) where each image is below the root, for the manifest and for messages.
        labels: (N,) int64; None if a label is known only when its image is read.
        sizes: (N,) int64, size of each image in bytes, to cut the work by; a mean if only that is
            known, 0 if nothing is.
        class_names: name of every class in the order of the labels; None if there are none.
        identity: changes when an image is added, removed or replaced; for `--resume`.
        places: (N, 3) int64, where each image is inside the source's files; None if an image is a
            file of its own.
        source_indices: (N,) where the images are in the listing that they were taken from; None
            for a listing of a whole source.
    """

    root: str
    names: Names
    labels: NDArray[np.int64] | None
    sizes: NDArray[np.int64]
    class_names: tuple[str, ...] | None
    identity: str
    places: NDArray[np.int64] | None = None
    source_indices: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def take(self, indices: NDArray[np.int64]) -> "Listing":
        """Return some of the images, in this order, as a table of their own.

        Args:
            indices: (n,) of images in the listing of a whole source.
        """
        assert self.source_indices is None, "taken from a part"
        return replace(
            self,
            names=[self.names[index] for index in indices.tolist()],
            labels=None if self.labels is None else self.labels[indices],
            sizes=self.sizes[indices],
            places=None if self.places is None else self.places[indices],
            source_indices=indices,
        )

    def location(self, index: int) -> tuple[Any, ...]:
        """Return what the source needs to read an image: its name and size, or its place."""
        if self.places is None:
            return self.names[index], int(self.sizes[index])
        return tuple(self.places[index].tolist())

    def where(self, index: int) -> str:
        """Return where an image is, escaped if its name does not fit into a line of text."""
        place = f"{self.root}/{self.names[index]}"
        return place if place.isprintable() else repr(place)


class Reader(Protocol):
    """Reads images one by one, on the threads that prepare them."""

    def read(self, location: Any) -> tuple[Content, int | None]:
        """Read one image; also its label if the listing has none. Several threads call it."""
        ...


@runtime_checkable
class Fetcher(Protocol):
    """Fetches images ahead, several in a request, on threads of its own."""

    def pieces(self, locations: list[Any]) -> list[list[Any]]:
        """Divide locations, in their order, into what one request brings."""
        ...

    def fetch(self, piece: list[Any], stop: threading.Event) -> Sequence[bytes | ConversionError]:
        """Fetch the images of a piece, or say why one cannot be; `stop` is set to give up."""
        ...


class Source(Protocol):
    """A place with images."""

    @property
    def reader(self) -> Reader | Fetcher:
        """Gives the images by their location in the listing."""
        ...

    def list_images(self) -> Listing:
        """List every image without reading it."""
        ...


class FilesIdentity:
    """A digest that changes when a file is added, removed, renamed or replaced.

    Files are added one by one, because the status of a million takes half a gigabyte.
    """

    def __init__(self, start: bytes = b"") -> None:
        self._digest = hashlib.blake2b(start, digest_size=16)

    def add(self, name: str, status: FileStatus) -> None:
        """Take in the next file."""
        # Size and time of change stand for the content, which would take a read of everything.
        text = f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0"
        self._digest.update(text.encode(errors="surrogateescape"))

    def hexdigest(self) -> str:
        """Return 32 hex digits of BLAKE2b-128."""
        return self._digest.hexdigest()


def shards_identity(files: Sequence[SourceFile]) -> str:
    """Return the identity of a few files, such as a source's shards."""
    identity = FilesIdentity()
    for file in files:
        identity.add(file.name, file.stat())
    return identity.hexdigest()


def on_threads(
    function: Callable[[SourceFile], Result], files: Sequence[SourceFile]
) -> Iterator[Result]:
    """Yield a function's result for each file, in order; files of a store at the same time."""
    if all(isinstance(file, Path) for file in files):
        yield from map(function, files)
        return
    with ThreadPoolExecutor(_LISTING_THREADS, "fastprune-listing") as pool:
        yield from pool.map(function, files)


def require_one_set(folder: str, names: list[str], suffix: str, has_folders: bool) -> None:
    """Refuse a folder that can be read in two ways: either would silently leave images out.

    Args:
        folder: with shards.
        names: of the shards.
        suffix: of the shards.
        has_folders: whether there are folders too.

    Raises:
        ConversionError: the shards are of more than one split, or there are class folders too.
    """
    splits = sorted({_NUMBER.sub("", name.removesuffix(suffix)) for name in names})
    if len(splits) > 1:
        raise ConversionError(
            f"{folder} holds the shards of several splits ({', '.join(splits)}). Name one "
            f"split's: '{folder}/{splits[-1]}-*{suffix}'"
        )
    if has_folders:
        raise ConversionError(
            f"{folder} holds both folders and {suffix} files. Name the files by a pattern, "
            f"'{folder}/*{suffix}', or move them away to convert the folders."
        )


def renumbered(listing: Listing, names: tuple[str, ...]) -> Listing:
    """Return the same images, their classes numbered by the position of their names in `names`.

    Raises:
        InvalidValueError: the images' classes have no names, or are not known before reading.
        ConversionError: a class is not among the names, or a label is no class.
    """
    if listing.labels is None:
        raise InvalidValueError(
            f"classes_from needs labels that are known before images are read, but {listing.root} "
            "is a dataset, which has them with its images. Number them there, and leave it out."
        )
    if listing.class_names is None:
        raise InvalidValueError(
            f"classes_from numbers named classes, but {listing.root} has numbers. Leave it out."
        )
    numbers = {name: number for number, name in enumerate(names)}
    unknown = [name for name in listing.class_names if name not in numbers]
    if unknown:
        raise ConversionError(
            f"{listing.root} has the class {unknown[0]} (and {len(unknown) - 1:,} more) that "
            f"classes_from does not name among its {len(names):,}. Name the beton of the same "
            "classes, or leave it out."
        )
    outside = (listing.labels < 0) | (listing.labels >= len(listing.class_names))
    if outside.any():
        first = int(outside.argmax())
        raise ConversionError(
            f"{listing.where(first)}: its label is {listing.labels[first]:,}, but labels must lie "
            f"in [0, {len(listing.class_names):,}). Name images that have classes, or leave "
            "classes_from out."
        )
    lookup = np.array([numbers[name] for name in listing.class_names], np.int64)
    # Other names are another job: a partial file must not be resumed with them.
    digest = hashlib.blake2b(repr((listing.identity, names)).encode(), digest_size=16)
    return replace(
        listing,
        labels=lookup[listing.labels],
        class_names=names,
        identity=digest.hexdigest(),
    )
