"""Where images come from: a listing made once, and a way for every worker to read one image."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fastprune.beton.transcode import Content


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
        labels: (N,) int64; None where only reading an image tells its label.
        source_bytes: (N,) int64, size of each image in bytes, to cut the work by; a mean where only
            that is known, 0 where nothing is.
        locate: index -> what `Source.read` needs, small and picklable.
        class_names: name of every class in the order of the labels; None where there are none.
        identity: changes when an image is added, removed or replaced; for `--resume`.
    """

    root: str
    names: Names
    labels: NDArray[np.int64] | None
    source_bytes: NDArray[np.int64]
    locate: Callable[[int], Any]
    class_names: tuple[str, ...] | None
    identity: str

    def __len__(self) -> int:
        return len(self.names)

    def where(self, index: int) -> str:
        """Where an image is, fit for a line of text whatever its name holds."""
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
