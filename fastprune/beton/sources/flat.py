"""One folder of images and a text file with their classes, as ImageNet's validation set comes."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastprune.beton.sources import Listing
from fastprune.beton.sources.folder import EXTENSIONS, file_status, read_file
from fastprune.errors import ConversionError


@dataclass(frozen=True)
class FlatSource:
    """The images directly in `root`; `labels` tells the class of each.

    The label file has a line per image: its name, with or without the suffix, and its class, with
    a comma or blanks between; what follows is passed over, and so is a heading. Classes are
    numbers from 0, or names, which are numbered in sorted order as ImageFolder numbers its folders.
    Lines with a number alone are the classes of the images in sorted order.
    """

    root: Path
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
            self._require_zero(values)
        digest = hashlib.blake2b(repr(values).encode(), digest_size=16)
        for name, status in files:
            text = f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0"
            digest.update(text.encode(errors="surrogateescape"))
        return Listing(
            root=str(self.root),
            names=[name for name, _ in files],
            labels=np.array(values, np.int64),
            source_bytes=np.array([status.st_size for _, status in files], np.int64),
            locate=lambda index: files[index][0],
            class_names=class_names,
            identity=digest.hexdigest(),
        )

    def read(self, location: str) -> tuple[bytes, None]:
        """Read one file."""
        return read_file(f"{self.root}/{location}"), None

    def _files(self) -> list[tuple[str, os.stat_result]]:
        """The image files, sorted by name."""
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
        """The class of every image, as text."""
        try:
            text = self.labels.read_text(encoding="utf-8-sig")  # spreadsheets put a mark first
        except (OSError, UnicodeDecodeError) as error:
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

    def _require_zero(self, values: list[int]) -> None:
        """Refuse numbers from 1: ImageNet's kit numbers its classes in an order of its own."""
        if min(values) > 0:
            raise ConversionError(
                f"the classes in {self.labels} start at {min(values)}, but must start at 0 and "
                "follow the order of the class folders. The numbers in ImageNet's development kit "
                "do neither: use a file with the image's name and its class name (n01440764)."
            )
