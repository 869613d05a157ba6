"""Any indexable dataset of (image, label), such as torchvision's and Hugging Face's."""

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastprune.base.errors import ConversionError
from fastprune.beton.convert.listing import Listing
from fastprune.beton.convert.transcode import Content


@dataclass(frozen=True)
class DatasetSource:
    """The samples of an object with `__len__` and `__getitem__`, read on the worker threads."""

    dataset: Any
    unlabeled: bool = False

    @property
    def reader(self) -> "DatasetSource":
        """The source itself."""
        return self

    def list_images(self) -> Listing:
        """Number the samples; their labels are not known before they are read.

        Raises:
            ConversionError: the dataset is empty.
        """
        count = len(self.dataset)
        name = type(self.dataset).__name__
        if count == 0:
            raise ConversionError(f"the dataset {name} is empty. Give one that has samples.")
        class_names = None if self.unlabeled else _class_names(self.dataset)
        return Listing(
            root=name,
            names=_Numbers(count),
            labels=None,
            sizes=np.zeros(count, np.int64),
            class_names=class_names,
            # Nothing cheap changes with the content of an object that may be anything.
            identity=f"{name} of {count:,} samples",
        )

    def read(self, location: tuple[str, int]) -> tuple[Content, int]:
        """Take one sample: a pair, a longer tuple, or a dict with "image" and "label".

        Without labels it may also be the image alone.
        """
        sample = self.dataset[int(location[0])]
        label: Any = 0
        if isinstance(sample, Mapping):
            content = sample["image"]
            label = 0 if self.unlabeled else sample["label"]
        elif self.unlabeled:
            content = sample[0] if isinstance(sample, tuple | list) else sample
        else:
            content, label = sample[0], sample[1]
        if isinstance(content, Mapping):
            content = _file_bytes(content)
        try:
            # NumPy's integers and one-element tensors are labels too; floats are not.
            return content, operator.index(label)
        except TypeError:
            raise ConversionError(f"its label is {label!r}, but must be an integer") from None


def without_decoding(dataset: Any) -> Any:
    """Let a `datasets.Dataset` give the files of its images, not their pixels: nothing is lost."""
    feature: Any = (getattr(dataset, "features", None) or {}).get("image")
    if getattr(feature, "decode", False) and hasattr(dataset, "cast_column"):
        return dataset.cast_column("image", type(feature)(decode=False))
    return dataset


def _file_bytes(image: Mapping[str, Any]) -> bytes:
    """Read an image that a `datasets.Dataset` did not decode: bytes, or the path of a file."""
    if image.get("bytes") is not None:
        return bytes(image["bytes"])
    if not image.get("path"):
        raise ConversionError("it has neither bytes nor a path")
    return Path(image["path"]).read_bytes()


def _class_names(dataset: Any) -> tuple[str, ...] | None:
    """Find the class names of torchvision's datasets, or of Hugging Face's."""
    names = getattr(dataset, "classes", None)
    if names is None:
        label = (getattr(dataset, "features", None) or {}).get("label")
        names = getattr(label, "names", None)
    return None if names is None else tuple(map(str, names))


class _Numbers:
    """The names of samples that have none: their numbers, of which no list is kept."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> str:
        return str(index)
