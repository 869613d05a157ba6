"""What an engine is, and which one decodes."""

import importlib
import importlib.util
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from fastprune.beton.reader import Beton
from fastprune.errors import InvalidValueError, MissingDependencyError
from fastprune.loading.faults import RowFaults

BACKENDS = ("auto", "ffcv")

_LOG = logging.getLogger(__name__)


class Engine(Protocol):
    """Decodes given rows of one beton with given views."""

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
    if importlib.util.find_spec("ffcv") is None:
        raise MissingDependencyError(
            f'backend="{backend}" needs the package ffcv, which is not installed. Install it with: '
            "pip install fastprune[ffcv]"
        )
    from fastprune.loading._ffcv import FfcvEngine

    engine = FfcvEngine(
        beton,
        image_size=image_size,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        faults=faults,
    )
    _LOG.info("%s: decoding with FFCV on %d CPU threads", beton.path, num_workers)
    return engine
