"""The protocol of decoders, and what decides the pixels that they make."""

from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import distributions
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

# Raised whenever a pixel of any view changes: logits of other pixels are another cache's.
_VIEW_DECODER_VERSION = 1

#: From rows (n,) to views (n, 7), see `decoding.views`.
DrawViews: TypeAlias = Callable[[NDArray[np.int64]], NDArray[np.int32]]
#: (n, S, S, 3) uint8 pixels that belong to the caller, and their (n,) rows.
Decoded: TypeAlias = tuple[torch.Tensor, NDArray[np.int64]]


class Decoder(Protocol):
    """Decodes rows of one beton.

    Attributes:
        name: the backend it is.
    """

    name: str

    def decode(
        self, batches: Sequence[NDArray[np.int64]], draw_views: DrawViews
    ) -> Iterator[Decoded]:
        """Decode batches in order, a few ahead of the caller.

        Args:
            batches: the rows of each batch, int64, each in the beton.
            draw_views: how each row is looked at.

        Yields:
            Of each batch, pixels and rows; without the rows that are skipped because they cannot
            be decoded, which may be all of them.

        Raises:
            LoadingError: a row cannot be decoded, a decoding thread died, or the file changed.
        """
        ...


def decoder_identity(backend: str, device: torch.device) -> dict[str, Any]:
    """Return what decides the pixels that a backend makes of the same bytes and boxes."""
    if backend == "dali":
        kind = "GPU" if device.type == "cuda" else "CPU"
        # The package's name has CUDA's version in it.
        packages = [p for p in distributions() if p.name.startswith("nvidia-dali-cuda")]
        return {"engine": f"dali ({kind})", "version": packages[0].version if packages else None}
    return {"engine": "cpu", "version": _VIEW_DECODER_VERSION}
