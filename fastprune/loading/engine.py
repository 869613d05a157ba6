"""What an engine is, and which one decodes."""

import importlib.util
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from fastprune.beton.reader import Beton
from fastprune.errors import InvalidValueError, MissingDependencyError
from fastprune.loading.augment import Recipe
from fastprune.loading.faults import RowFaults

if TYPE_CHECKING:
    from fastprune.loading._dali_native import NativeReader

BACKENDS = ("auto", "ffcv", "dali")

_LOG = logging.getLogger(__name__)


class Engine(Protocol):
    """Decodes given rows of one beton with given views.

    Attributes:
        name: the backend it is.
    """

    name: str

    def decode(
        self,
        batches: Sequence[NDArray[np.int64]],
        draw_views: Callable[[NDArray[np.int64]], NDArray[np.int32]],
    ) -> Iterator[tuple[torch.Tensor, NDArray[np.int64]]]:
        """Decode batches in order, a few ahead of the caller.

        Args:
            batches: the rows of each batch, int64, each in the beton.
            draw_views: from rows (n,) to views (n, 7), see `augment.Recipe.views`.

        Yields:
            (n, S, S, 3) uint8 pixels that belong to the caller, and their (n,) rows.

        Raises:
            LoadingError: a row cannot be decoded, a decoding thread died, or the file changed.
        """
        ...


def make_engine(
    backend: str,
    beton: Beton,
    *,
    image_size: int,
    num_workers: int,
    device: torch.device,
    faults: RowFaults,
) -> Engine:
    """Start the engine of that name.

    Raises:
        InvalidValueError: there is no such engine.
        MissingDependencyError: its package is not installed.
    """
    if backend not in BACKENDS:
        raise InvalidValueError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}.")
    chosen = _choose(device) if backend == "auto" else backend
    if chosen == "dali":
        from fastprune.loading.dali import DaliEngine

        decoder = "the GPU" if device.type == "cuda" else f"{num_workers} CPU threads"
        _LOG.info("%s: decoding with DALI on %s", beton.path, decoder)
        return DaliEngine(
            beton, image_size=image_size, num_workers=num_workers, device=device, faults=faults
        )
    from fastprune.loading._ffcv import FfcvEngine

    _LOG.info("%s: decoding with FFCV on %d CPU threads", beton.path, num_workers)
    return FfcvEngine(
        beton,
        image_size=image_size,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        faults=faults,
    )


def make_native_reader(
    beton: Beton, *, recipe: Recipe, image_size: int, num_workers: int, device: torch.device
) -> "NativeReader":
    """Prepare DALI's own reader.

    Raises:
        MissingDependencyError: DALI is not installed.
    """
    if not _is_installed("nvidia.dali"):
        raise MissingDependencyError(
            'order="buffered" needs NVIDIA DALI. Install it with: '
            "pip install fastprune[dali-cuda13]"
        )
    from fastprune.loading._dali_native import NativeReader

    return NativeReader(
        beton, recipe=recipe, image_size=image_size, num_workers=num_workers, device=device
    )


def _choose(device: torch.device) -> str:
    """DALI where it can decode on a GPU, else FFCV; what is there where only one is."""
    has_dali, has_ffcv = _is_installed("nvidia.dali"), _is_installed("ffcv")
    if not has_dali and not has_ffcv:
        raise MissingDependencyError(
            "no engine is installed. Install one with: pip install fastprune[ffcv] or "
            "fastprune[dali-cuda13]"
        )
    return "dali" if has_dali and (device.type == "cuda" or not has_ffcv) else "ffcv"


def _is_installed(package: str) -> bool:
    """Whether a package can be found, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # its parent is missing
        return False
