"""Tar files in the WebDataset convention: consecutive files of one key are a sample."""

import os
import tarfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fastprune.base.errors import ConversionError
from fastprune.beton.convert.listing import Listing, SourceFile, on_threads, shards_identity
from fastprune.beton.remote.file import RemoteFile

# In the order in which one is chosen where a sample has several.
_IMAGES = ("jpg", "jpeg", "png", "webp", "ppm", "pgm", "bmp", "tif", "tiff", "gif")
_LABEL = "cls"
_MOST_LABEL_BYTES = 18  # digits that always fit an int64
_BLOCK_BYTES = 512
# Read along between two images: the next one's header, and the class of this one.
_GAP_BYTES = 16 << 10


@dataclass(frozen=True)
class _Member:
    """A file inside a tar."""

    key: str
    extension: str
    offset: int
    size: int


Sample = tuple[str, _Member, int]


@dataclass(frozen=True)
class TarSource:
    """The samples of tar shards, in file order. Names inside are data and never become paths."""

    shards: Sequence[SourceFile]
    unlabeled: bool = False

    @property
    def reader(self) -> "TarSource":
        """The source itself."""
        return self

    def list_images(self) -> Listing:
        """List every sample: its image's place in the tar, and the number in its .cls file.

        Raises:
            ConversionError: a shard is compressed, damaged or cut, or a sample has no image or no
                label.
        """
        names: list[str] = []
        places: list[tuple[int, int, int]] = []
        labels: list[int] = []
        listed = on_threads(lambda shard: list(samples_of(shard, self.unlabeled)), self.shards)
        for number, (shard, samples) in enumerate(zip(self.shards, listed, strict=True)):
            for key, image, label in samples:
                names.append(f"{shard.name}/{key}.{image.extension}")
                places.append((number, image.offset, image.size))
                labels.append(label)
        if not names:
            raise ConversionError(f"{self.shards[0]} and its like hold no samples (jpg and cls).")
        table = np.array(places, np.int64)
        return Listing(
            root=str(self.shards[0].parent),
            names=names,
            labels=np.array(labels, np.int64),
            sizes=table[:, 2],
            class_names=None,
            identity=shards_identity(self.shards),
            places=table,
        )

    def pieces(self, locations: list[Any]) -> list[list[Any]]:
        """Join neighbors, so that a chunk of samples is a request or two."""
        pieces: list[list[Any]] = []
        end = None
        for shard, offset, size in locations:
            if end is not None and end[0] == shard and 0 <= offset - end[1] <= _GAP_BYTES:
                pieces[-1].append((shard, offset, size))
            else:
                pieces.append([(shard, offset, size)])
            end = shard, offset + size
        return pieces

    def fetch(self, piece: list[Any], stop: threading.Event) -> list[bytes]:
        """Read the images of one range."""
        number, start, _ = piece[0]
        size = piece[-1][1] + piece[-1][2] - start
        shard = self.shards[number]
        if isinstance(shard, RemoteFile):
            content = shard.store.read(shard.entry.name, start, size, stop=stop)
        else:
            content = _read_range(shard, start, size)
        return [content[offset - start : offset - start + size] for _, offset, size in piece]


def _read_range(shard: Path, start: int, size: int) -> bytes:
    try:
        with shard.open("rb") as file:
            content = os.pread(file.fileno(), size, start)
    except OSError as error:
        raise ConversionError(f"{shard} cannot be read: {error.strerror or error}") from error
    if len(content) < size:
        raise ConversionError(f"{shard} was cut while it was being read")
    return content


def samples_of(shard: SourceFile, unlabeled: bool) -> Iterator[Sample]:
    """Yield key, image and label of every sample of a shard."""
    with shard.open("rb") as file:
        sample: dict[str, _Member] = {}
        key = None
        for member in _members(shard, file):
            # Files of one sample stand together; another key starts the next sample.
            if member.key != key and sample:
                yield _sample(shard, file, sample, unlabeled)
                sample = {}
            key = member.key
            if member.extension in sample:
                raise ConversionError(
                    f"sample {key!r} of {shard} has two .{member.extension} files. A second copy "
                    "was appended, perhaps: write the tar anew with one of them."
                )
            sample[member.extension] = member
        if sample:
            yield _sample(shard, file, sample, unlabeled)


def _sample(
    shard: SourceFile, file: BinaryIO, sample: dict[str, _Member], unlabeled: bool
) -> Sample:
    """Find the image and the label among the files of one key; 0 where labels are left out."""
    key = next(iter(sample.values())).key
    where = f"sample {key!r} of {shard}"
    image = next((sample[extension] for extension in _IMAGES if extension in sample), None)
    if image is not None and unlabeled:
        return key, image, 0
    if image is None or _LABEL not in sample:
        missing = "image" if image is None else f".{_LABEL} file"
        raise ConversionError(
            f"{where} has no {missing}; it has {', '.join(sample)}. Each sample needs an image "
            f"(.jpg) and its class number (.{_LABEL})."
        )
    label = sample[_LABEL]
    file.seek(label.offset)
    text = file.read(min(label.size, _MOST_LABEL_BYTES))
    # int() would also take b"1_0" and b"+1", which no other reader takes for 10 and 1.
    if not text.strip().isdigit():
        raise ConversionError(
            f"{where} has the class {text!r}, but a .{_LABEL} file holds the number of a class."
        )
    return key, image, int(text)


def _members(shard: SourceFile, file: BinaryIO) -> Iterator[_Member]:
    """Yield the regular files in a tar, each wholly inside it."""
    shard_bytes = shard.stat().st_size
    try:
        # "r:" takes no compressed tar: there is no random access into one.
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for info in archive:
                if not info.isreg() or info.issparse():
                    continue
                if info.offset_data + info.size > shard_bytes:
                    raise ConversionError(
                        f"{shard} is cut: {info.name!r} should end at byte "
                        f"{info.offset_data + info.size:,}, but the file has {shard_bytes:,} "
                        "bytes. Get it again."
                    )
                folder, _, name = info.name.rpartition("/")
                # WebDataset: the key ends at the first dot of the base name.
                stem, _, extension = name.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                yield _Member(key, extension.lower(), info.offset_data, info.size)
                archive.members = []  # type: ignore[attr-defined] # else it keeps every header
            # tarfile takes damage for the end; a whole tar ends with a block of zeros.
            file.seek(archive.offset)
            if file.read(_BLOCK_BYTES) != bytes(_BLOCK_BYTES):
                raise ConversionError(
                    f"{shard} is cut or damaged: byte {archive.offset:,} starts neither a file nor "
                    "the end mark of a tar. Get it again."
                )
    except tarfile.TarError as error:
        raise ConversionError(
            f"{shard} cannot be read as an uncompressed tar file: {error}. Get it again, or "
            "decompress it first."
        ) from error
