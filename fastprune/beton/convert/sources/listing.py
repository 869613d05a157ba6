"""A source of images: a listing made once, and a way for every worker to read one image."""

import hashlib
import os
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

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


class Names(Protocol):
    """A name per image: a list, or something that makes the names up when asked."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> str: ...


@dataclass(frozen=True)
class Listing:
    """The images of a source, in row order.

    Attributes:
        root: the folder or dataset, for messages.
        names: (N,) where each image is below the root, for the manifest and for messages.
        labels: (N,) int64; None where a label is known only when its image is read.
        source_bytes: (N,) int64, size of each image in bytes, to cut the work by; a mean where only
            that is known, 0 where nothing is.
        locate: index -> what `Source.read` needs, small and picklable.
        class_names: name of every class in the order of the labels; None where there are none.
        identity: changes when an image is added, removed or replaced; for `--resume`.
        source_indices: (N,) where the images are in the listing that they were taken from; None
            for a listing of a whole source.
    """

    root: str
    names: Names
    labels: NDArray[np.int64] | None
    source_bytes: NDArray[np.int64]
    locate: Callable[[int], Any]
    class_names: tuple[str, ...] | None
    identity: str
    source_indices: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def take(self, indices: NDArray[np.int64]) -> "Listing":
        """Return some of the images, in this order; it holds no more than theirs and is picklable.

        Args:
            indices: (n,) of images in the listing of a whole source.
        """
        assert self.source_indices is None, "taken from a part"
        taken = indices.tolist()
        return replace(
            self,
            names=[self.names[index] for index in taken],
            labels=None if self.labels is None else self.labels[indices],
            source_bytes=self.source_bytes[indices],
            locate=[self.locate(index) for index in taken].__getitem__,
            source_indices=indices,
        )

    def where(self, index: int) -> str:
        """Return where an image is, fit for a line of text whatever its name holds."""
        place = f"{self.root}/{self.names[index]}"
        return place if place.isprintable() else repr(place)


class Source(Protocol):
    """A place with images. It is handed to the workers before it is listed, so keep it light."""

    def list_images(self) -> Listing:
        """List every image without reading it."""
        ...

    def read(self, location: Any) -> tuple[Content, int | None]:
        """Read one image; also its label where the listing has none."""
        ...


@runtime_checkable
class FetchedSource(Source, Protocol):
    """A source that is read by the process that converts, on threads.

    Its workers get bytes: the client of a store must not be used behind a fork.
    """

    def pieces(self, locations: list[Any]) -> list[list[Any]]:
        """Divide locations, in their order, into what one request brings."""
        ...

    def fetch(self, piece: list[Any], stop: threading.Event) -> list[bytes | None]:
        """Fetch the images of a piece, None for one without bytes; `stop` is set to give up."""
        ...


class FilesIdentity:
    """A digest that changes when a file is added, removed, renamed or replaced.

    It is fed file by file, because the status of a million files takes half a gigabyte.
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


def require_one_set(folder: str, names: list[str], suffix: str, has_folders: bool) -> None:
    """Refuse a folder that can be read in two ways: either would leave images out without a word.

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
