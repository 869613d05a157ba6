"""An ImageFolder tree: one folder per class, in torchvision's order."""

import hashlib
import logging
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastprune.beton.sources import Listing
from fastprune.errors import ConversionError

_log = logging.getLogger(__name__)

# torchvision.datasets.folder.IMG_EXTENSIONS: rows must be ImageFolder's samples.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class FolderSource:
    """The images below `root`, whose folders are the classes."""

    root: Path

    def list_images(self) -> Listing:
        """List the images in the order of torchvision's `ImageFolder(root).samples`.

        Raises:
            ConversionError: no class folders, a class without images, or a symbolic link that
                leads back to a folder above it.
        """
        class_names = _class_folders(self.root)
        names: list[str] = []
        labels: list[int] = []
        sizes: list[int] = []
        digest = hashlib.blake2b(digest_size=16)
        for label, class_name in enumerate(class_names):
            before = len(names)
            for name, status in _images_below(self.root, class_name):
                names.append(name)
                labels.append(label)
                sizes.append(status.st_size)
                digest.update(
                    f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode(
                        errors="surrogateescape"
                    )
                )
            if len(names) == before:
                raise ConversionError(
                    f"the class folder {self.root / class_name} holds no images "
                    f"({', '.join(EXTENSIONS)}). Remove the folder, or put the images there."
                )
        return Listing(
            root=str(self.root),
            names=names,
            labels=np.array(labels, np.int64),
            source_bytes=np.array(sizes, np.int64),
            locate=names.__getitem__,
            class_names=tuple(class_names),
            identity=digest.hexdigest(),
        )

    def read(self, location: str) -> tuple[bytes, None]:
        """Read one file."""
        return read_file(f"{self.root}/{location}"), None


def file_status(path: str) -> os.stat_result:
    """The status of what must be a file.

    Raises:
        ConversionError: it is a link to nowhere, or no file but a pipe, say, that would never end.
    """
    try:
        status = os.stat(path)  # noqa: PTH116 - a million times
    except OSError as error:
        raise ConversionError(
            f"cannot read {path}: {os.strerror(error.errno or 0)}. Remove the entry, or repair "
            "what it links to."
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise ConversionError(f"{path} is no file. Remove the entry.")
    return status


def read_file(path: str) -> bytes:
    """Read a whole file."""
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - a million times
        return file.read()


def _class_folders(root: Path) -> list[str]:
    """The folders directly below the root, sorted; there must be one."""
    try:
        entries = list(os.scandir(root))
    except OSError as error:
        raise ConversionError(
            f"cannot list the image folder {root}: {os.strerror(error.errno or 0)}. Name an "
            "existing folder with one subfolder per class."
        ) from error
    class_names = sorted(entry.name for entry in entries if _is_folder(entry))
    if not class_names:
        what = "is empty" if not entries else "has files, but no folders"
        raise ConversionError(
            f"the image folder {root} {what}. It must have one subfolder per class, as "
            "torchvision's ImageFolder expects."
        )
    return class_names


def _images_below(root: Path, class_name: str) -> Iterator[tuple[str, os.stat_result]]:
    """Names relative to the root, in the order of torchvision's `make_dataset`, with their stat."""
    ignored = 0
    for folder, files in sorted(_walk(root, class_name, ())):
        for name in sorted(files):
            if not name.lower().endswith(EXTENSIONS):
                ignored += 1
                continue
            path = f"{folder}/{name}"
            yield path, file_status(f"{root}/{path}")
    if ignored:
        _log.info("%s: left out %d files that are no images", root / class_name, ignored)


def _walk(
    root: Path, folder: str, above: tuple[tuple[int, int], ...]
) -> Iterator[tuple[str, list[str]]]:
    """Every folder with its files, links followed; a link to a folder above it is refused."""
    path = f"{root}/{folder}"
    try:
        status = os.stat(path)  # noqa: PTH116
        with os.scandir(path) as entries:
            is_folder = {entry.name: _is_folder(entry) for entry in entries}
    except OSError as error:
        raise ConversionError(
            f"cannot list {path}: {os.strerror(error.errno or 0)}. Make it readable, or remove it."
        ) from error
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        raise ConversionError(
            f"the symbolic link {path} leads back to a folder above it, which never ends. Remove "
            "the link."
        )
    yield folder, [name for name, inner in is_folder.items() if not inner]
    for name, inner in is_folder.items():
        if inner:
            yield from _walk(root, f"{folder}/{name}", (*above, identity))


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    """Whether an entry is or links to a folder; a link to itself is none, as for os.walk."""
    try:
        return entry.is_dir()
    except OSError:
        return False
