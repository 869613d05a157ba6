"""Folders of image files: an ImageFolder tree, a tree without classes, or a folder and a list."""

import logging
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastprune.base.errors import ConversionError
from fastprune.base.untrusted import read_text
from fastprune.beton.convert.sources.listing import FilesIdentity, FileStatus, Listing

_log = logging.getLogger(__name__)

# torchvision.datasets.folder.IMG_EXTENSIONS: rows must be ImageFolder's samples.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class FolderSource:
    """The images below `root`, whose folders are the classes."""

    root: Path | str

    def list_images(self) -> Listing:
        """List the images in the order of torchvision's `ImageFolder(root).samples`.

        Raises:
            ConversionError: no class folders, a class without images, or a symbolic link that
                leads back to a folder above it.
        """
        class_names = self._class_folders()
        names: list[str] = []
        labels: list[int] = []
        sizes: list[int] = []
        identity = FilesIdentity()
        for label, class_name in enumerate(class_names):
            before = len(names)
            for name, status in self._images_below(class_name):
                names.append(name)
                labels.append(label)
                sizes.append(status.st_size)
                identity.add(name, status)
            # ImageFolder refuses such a tree too: leaving the class out would renumber the others.
            if len(names) == before:
                raise ConversionError(
                    f"the class folder {self.root}/{class_name} holds no images "
                    f"({', '.join(EXTENSIONS)}). Remove the folder, or put the images there."
                )
        return Listing(
            root=str(self.root),
            names=names,
            labels=np.array(labels, np.int64),
            source_bytes=np.array(sizes, np.int64),
            locate=names.__getitem__,
            class_names=tuple(class_names),
            identity=identity.hexdigest(),
        )

    def read(self, location: str) -> tuple[bytes, None]:
        """Read one file."""
        return read_file(f"{self.root}/{location}"), None

    def _class_folders(self) -> list[str]:
        return _class_folders(Path(self.root))

    def _images_below(self, class_name: str) -> Iterator[tuple[str, FileStatus]]:
        return _images_below(Path(self.root), class_name)


@dataclass(frozen=True)
class TreeSource:
    """All images below `root`, in folders of any depth or in none; they have no classes."""

    root: Path | str

    def list_images(self) -> Listing:
        """List the images, folder by folder in sorted order.

        Raises:
            ConversionError: the folder cannot be listed or holds no images, or a symbolic link
                leads back to a folder above it.
        """
        names: list[str] = []
        sizes: list[int] = []
        identity = FilesIdentity()
        for path, status in self._images_below():
            names.append(path)
            sizes.append(status.st_size)
            identity.add(path, status)
        if not names:
            raise ConversionError(
                f"the image folder {self.root} holds no images ({', '.join(EXTENSIONS)}), nor do "
                "the folders in it. Name a folder that does."
            )
        return Listing(
            root=str(self.root),
            names=names,
            labels=np.zeros(len(names), np.int64),
            source_bytes=np.array(sizes, np.int64),
            locate=names.__getitem__,
            class_names=None,
            identity=identity.hexdigest(),
        )

    def read(self, location: str) -> tuple[bytes, None]:
        """Read one file."""
        return read_file(f"{self.root}/{location}"), None

    def _images_below(self) -> Iterator[tuple[str, FileStatus]]:
        return _images_below(Path(self.root), "")


@dataclass(frozen=True)
class FlatSource:
    """The images directly in `root`; `labels` has the class of each.

    The label file has a line per image: its name, with or without the suffix, and its class, with
    a comma or blanks between; what follows is passed over, and so is a heading. Classes are
    numbers from 0, or names, which are numbered in sorted order as ImageFolder numbers its folders.
    Lines with a number alone are the classes of the images in sorted order.
    """

    root: Path | str
    labels: Path

    def list_images(self) -> Listing:
        """List the images in the order of their names.

        Raises:
            ConversionError: the folder or the file cannot be read, or they do not fit each other.
        """
        files = self._files()
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
            root=str(self.root),
            names=[name for name, _ in files],
            labels=np.array(values, np.int64),
            source_bytes=np.array([status.st_size for _, status in files], np.int64),
            locate=lambda index: files[index][0],
            class_names=class_names,
            identity=identity.hexdigest(),
        )

    def read(self, location: str) -> tuple[bytes, None]:
        """Read one file."""
        return read_file(f"{self.root}/{location}"), None

    def _files(self) -> Sequence[tuple[str, FileStatus]]:
        try:
            with os.scandir(self.root) as entries:
                files = [
                    (entry.name, file_status(entry.path))
                    for entry in entries
                    if entry.name.lower().endswith(EXTENSIONS)
                ]
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise ConversionError(
                f"cannot list the image folder {self.root}: {reason}. Name an existing folder."
            ) from error
        if not files:
            raise ConversionError(
                f"the image folder {self.root} holds no images ({', '.join(EXTENSIONS)}). With "
                "--labels the images stand directly in the folder."
            )
        return sorted(files)

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
                    f"{self.labels} has {len(lines):,} classes, but {self.root} has "
                    f"{len(names):,} images. Give one line per image."
                )
            return [line[0] for line in lines]
        classes = {line[0]: line[1] for line in lines if len(line) > 1}
        found = [classes.get(name, classes.get(name.rsplit(".", 1)[0])) for name in names]
        if None in found:
            raise ConversionError(
                f"{self.labels} has no line for {self.root}/{names[found.index(None)]}. Add it, "
                "or remove the image."
            )
        return [text for text in found if text is not None]


def file_status(path: str) -> os.stat_result:
    """Return the status of what must be a regular file.

    Raises:
        ConversionError: it is a link to nowhere, or no file but, say, a pipe, which may never end.
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
    """List the folders directly below the root, sorted; there must be one."""
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


def _images_below(root: Path, inner: str) -> Iterator[tuple[str, FileStatus]]:
    """Yield names relative to the root and their status, in torchvision's `make_dataset` order.

    Args:
        root: the folder that names are relative to.
        inner: the folder in it to look into, such as a class; "" for the root itself.
    """
    ignored = 0
    for folder, files in sorted(_walk(root, inner, ())):
        for name in sorted(files):
            if not name.lower().endswith(EXTENSIONS):
                ignored += 1
                continue
            path = f"{folder}/{name}" if folder else name
            yield path, file_status(f"{root}/{path}")
    if ignored:
        _log.info("%s: left out %d files that are no images", root / inner, ignored)


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
