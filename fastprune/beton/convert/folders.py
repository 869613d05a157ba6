"""Folders of image files: an ImageFolder tree, a tree without classes, or a folder and a list."""

import logging
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import numpy as np

from fastprune.base.errors import ConversionError
from fastprune.base.files import read_text
from fastprune.beton.convert.listing import Fetcher, FilesIdentity, FileStatus, Listing, Reader

_log = logging.getLogger(__name__)

# torchvision.datasets.folder.IMG_EXTENSIONS: rows must be ImageFolder's samples.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

NamedStatus = tuple[str, FileStatus]


class Files(Protocol):
    """The files below a folder or a URL, with names relative to it; also their reader."""

    @property
    def root(self) -> str:
        """The folder or URL."""
        ...

    def class_folders(self) -> list[str]:
        """List the folders directly below, sorted; there must be one."""
        ...

    def images_below(self, inner: str) -> Iterator[NamedStatus]:
        """Yield the images in a folder and its subfolders, in torchvision's order; "" for all."""
        ...

    def images_directly_below(self) -> Sequence[NamedStatus]:
        """List the images that are in no subfolder, sorted by name."""
        ...


@dataclass(frozen=True)
class FolderSource:
    """The images below a root whose folders are the classes."""

    files: Files

    @property
    def reader(self) -> Reader | Fetcher:
        """Reads the files."""
        return cast("Reader | Fetcher", self.files)

    def list_images(self) -> Listing:
        """List the images in the order of torchvision's `ImageFolder(root).samples`.

        Raises:
            ConversionError: no class folders, a class without images, or a symbolic link that
                leads back to a folder above it.
        """
        class_names = self.files.class_folders()
        names: list[str] = []
        labels: list[int] = []
        sizes: list[int] = []
        identity = FilesIdentity()
        for label, class_name in enumerate(class_names):
            before = len(names)
            for name, status in self.files.images_below(class_name):
                names.append(name)
                labels.append(label)
                sizes.append(status.st_size)
                identity.add(name, status)
            # ImageFolder refuses such a tree too: leaving the class out would renumber the others.
            if len(names) == before:
                raise ConversionError(
                    f"the class folder {self.files.root}/{class_name} holds no images "
                    f"({', '.join(EXTENSIONS)}). Remove the folder, or put the images there."
                )
        return Listing(
            root=self.files.root,
            names=names,
            labels=np.array(labels, np.int64),
            sizes=np.array(sizes, np.int64),
            class_names=tuple(class_names),
            identity=identity.hexdigest(),
        )


@dataclass(frozen=True)
class TreeSource:
    """All images below a root, in folders of any depth or in none; they have no classes."""

    files: Files

    @property
    def reader(self) -> Reader | Fetcher:
        """Reads the files."""
        return cast("Reader | Fetcher", self.files)

    def list_images(self) -> Listing:
        """List the images, folder by folder in sorted order.

        Raises:
            ConversionError: the folder cannot be listed or holds no images, or a symbolic link
                leads back to a folder above it.
        """
        names: list[str] = []
        sizes: list[int] = []
        identity = FilesIdentity()
        for path, status in self.files.images_below(""):
            names.append(path)
            sizes.append(status.st_size)
            identity.add(path, status)
        if not names:
            raise ConversionError(
                f"the image folder {self.files.root} holds no images ({', '.join(EXTENSIONS)}), "
                "nor do the folders in it. Name a folder that does."
            )
        return Listing(
            root=self.files.root,
            names=names,
            labels=np.zeros(len(names), np.int64),
            sizes=np.array(sizes, np.int64),
            class_names=None,
            identity=identity.hexdigest(),
        )


@dataclass(frozen=True)
class FlatSource:
    """The images directly below a root; `labels` has the class of each.

    The label file has a line per image: its name, with or without the suffix, and its class, with
    a comma or blanks between; the rest of the line is ignored, and so is a heading. Classes are
    numbers from 0, or names, which are numbered in sorted order as ImageFolder numbers its folders.
    Lines with a number alone are the classes of the images in sorted order.
    """

    files: Files
    labels: Path

    @property
    def reader(self) -> Reader | Fetcher:
        """Reads the files."""
        return cast("Reader | Fetcher", self.files)

    def list_images(self) -> Listing:
        """List the images in the order of their names.

        Raises:
            ConversionError: the folder or the file cannot be read, or they do not fit each other.
        """
        files = self.files.images_directly_below()
        if not files:
            raise ConversionError(
                f"the image folder {self.files.root} holds no images ({', '.join(EXTENSIONS)}). "
                "With --labels the images stand directly in the folder."
            )
        classes = self._classes([name for name, _ in files])
        class_names = None
        if not all(text.isdecimal() for text in classes):
            class_names = tuple(sorted(set(classes)))
            numbers = {name: number for number, name in enumerate(class_names)}
            values = [numbers[text] for text in classes]
        else:
            values = [int(text) for text in classes]
            # ImageNet's kit numbers its classes from 1, in an order of its own.
            if min(values) > 0:
                raise ConversionError(
                    f"the classes in {self.labels} start at {min(values)}, but must start at 0 and "
                    "follow the order of the class folders. The numbers in ImageNet's development "
                    "kit do neither: use a file with the image's name and its class name "
                    "(n01440764)."
                )
        identity = FilesIdentity(repr(values).encode())
        for name, status in files:
            identity.add(name, status)
        return Listing(
            root=self.files.root,
            names=[name for name, _ in files],
            labels=np.array(values, np.int64),
            sizes=np.array([status.st_size for _, status in files], np.int64),
            class_names=class_names,
            identity=identity.hexdigest(),
        )

    def _classes(self, names: list[str]) -> list[str]:
        """Return the class of every image, as text."""
        try:
            text = read_text(self.labels)
        except (OSError, ValueError) as error:
            raise ConversionError(f"cannot read the label file {self.labels}: {error}.") from error
        lines = [line.replace(",", " ").split() for line in text.splitlines() if line.strip()]
        if all(len(line) == 1 for line in lines):
            if len(lines) != len(names):
                raise ConversionError(
                    f"{self.labels} has {len(lines):,} classes, but {self.files.root} has "
                    f"{len(names):,} images. Give one line per image."
                )
            return [line[0] for line in lines]
        classes = {line[0]: line[1] for line in lines if len(line) > 1}
        found = [classes.get(name, classes.get(name.rsplit(".", 1)[0])) for name in names]
        if None in found:
            raise ConversionError(
                f"{self.labels} has no line for {self.files.root}/{names[found.index(None)]}. Add "
                "it, or remove the image."
            )
        return [text for text in found if text is not None]


@dataclass(frozen=True)
class LocalFiles:
    """The files below a local folder."""

    folder: Path

    @property
    def root(self) -> str:
        """The folder as text."""
        return str(self.folder)

    def class_folders(self) -> list[str]:
        """List the class folders, as `Files`."""
        try:
            entries = list(os.scandir(self.folder))
        except OSError as error:
            raise ConversionError(
                f"cannot list the image folder {self.folder}: {os.strerror(error.errno or 0)}. "
                "Name an existing folder with one subfolder per class."
            ) from error
        class_names = sorted(entry.name for entry in entries if _is_folder(entry))
        if not class_names:
            fault = "is empty" if not entries else "has files, but no folders"
            raise ConversionError(
                f"the image folder {self.folder} {fault}. It must have one subfolder per class, as "
                "torchvision's ImageFolder expects."
            )
        return class_names

    def images_below(self, inner: str) -> Iterator[NamedStatus]:
        """Yield the images in a folder, as `Files`."""
        ignored = 0
        for folder, files in sorted(_walk(self.folder, inner, ())):
            for name in sorted(files):
                if not name.lower().endswith(EXTENSIONS):
                    ignored += 1
                    continue
                path = f"{folder}/{name}" if folder else name
                yield path, file_status(f"{self.folder}/{path}")
        if ignored:
            _log.info("%s: left out %d files that are not images", self.folder / inner, ignored)

    def images_directly_below(self) -> Sequence[NamedStatus]:
        """List the images in the folder itself, as `Files`."""
        try:
            with os.scandir(self.folder) as entries:
                return sorted(
                    (entry.name, file_status(entry.path))
                    for entry in entries
                    if entry.name.lower().endswith(EXTENSIONS)
                )
        except OSError as error:
            raise ConversionError(
                f"cannot list the image folder {self.folder}: {os.strerror(error.errno or 0)}. "
                "Name an existing folder."
            ) from error

    def read(self, location: tuple[str, int]) -> tuple[bytes, None]:
        """Read one whole file."""
        path = f"{self.folder}/{location[0]}"
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - a million times
            return file.read(), None


def file_status(path: str) -> os.stat_result:
    """Return the status of a regular file.

    Raises:
        ConversionError: it is a broken link, or a pipe or device, which may never end.
    """
    try:
        status = os.stat(path)  # noqa: PTH116 - a million times
    except OSError as error:
        raise ConversionError(
            f"cannot read {path}: {os.strerror(error.errno or 0)}. Remove the entry, or repair "
            "what it links to."
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise ConversionError(f"{path} is not a regular file. Remove the entry.")
    return status


def _walk(
    root: Path, folder: str, above: tuple[tuple[int, int], ...]
) -> Iterator[tuple[str, list[str]]]:
    """Yield every folder with its files, links followed; refuse a link to a folder above it."""
    path = f"{root}/{folder}".rstrip("/")
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
            yield from _walk(root, f"{folder}/{name}" if folder else name, (*above, identity))


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    """Whether an entry is or links to a folder; a link to itself is none, as for os.walk."""
    try:
        return entry.is_dir()
    except OSError:
        return False
