"""The engine "ffcv": our decoder inside a stock `ffcv.Loader`.

Rows, order, views and pixels are those of the CPU engine; the rest is FFCV's. It sets torch's and
Numba's thread counts of the whole process, an error in its thread hangs the consumer, its thread
outlives a loop that was left by up to half a second, and it makes Python objects of every row.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from fastprune.adapters.ffcv import ViewDecoder
from fastprune.base.errors import InvalidValueError
from fastprune.beton.beton import Beton
from fastprune.beton.opening import image_and_label
from fastprune.decoding.faults import ALTERED, FileWatch, RowFaults

# After `fastprune.adapters.ffcv`, which says what to do where ffcv is missing.
import ffcv  # isort: skip
from ffcv.transforms import ToTensor  # isort: skip
from ffcv.traversal_order.base import TraversalOrder  # isort: skip


class GivenOrder(TraversalOrder):
    """An order that is set from outside before each epoch."""

    def __init__(self) -> None:
        self.rows = np.empty(0, np.int64)

    def __call__(self, loader: Any) -> "GivenOrder":  # noqa: ARG002
        """Bind nothing: FFCV makes an order from what it was given by calling it."""
        return self

    def sample_order(self, epoch: int) -> NDArray[np.int64]:  # noqa: ARG002 - FFCV's counter
        """Return the order that was set."""
        return self.rows


class FfcvGuest:
    """Decodes given rows of one beton with given views inside FFCV; see `engine.Engine`."""

    name = "ffcv"

    def __init__(self, beton: Beton, *, image_size: int, num_workers: int, faults: RowFaults):
        if len(beton.files) > 1:
            raise InvalidValueError(
                f"backend 'ffcv' reads one file, but {beton.path} has {len(beton.files):,} shards. "
                "Take backend='cpu', or compact the shards into one beton."
            )
        self._beton = beton
        # Numba refuses more threads than it was started with.
        self._num_workers = min(num_workers, numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
        self._faults = faults
        self._file = FileWatch(beton)
        self._decoder = ViewDecoder(image_size)
        self._order = GivenOrder()
        self._loader: Any = None

    def decode(
        self,
        batches: Sequence[NDArray[np.int64]],
        draw_views: Callable[[NDArray[np.int64]], NDArray[np.int32]],
    ) -> Iterator[tuple[torch.Tensor, NDArray[np.int64]]]:
        """See `engine.Engine.decode`; all batches but the last are of one size."""
        if not batches:
            return
        order = np.concatenate(batches)
        reasons = self._decoder.remember(order, draw_views)
        with contextlib.closing(self._epoch(order, len(batches[0]))) as decoded:
            for rows, (pixels,) in zip(batches, decoded, strict=True):
                self._file.check()
                self._faults.num_decoded_whole = self._decoder.num_decoded_whole
                altered = self._faults.altered(rows)
                faults = dict.fromkeys(np.flatnonzero(altered).tolist(), ALTERED)
                faults |= {i: reasons[row] for i, row in enumerate(rows.tolist()) if row in reasons}
                # A clone, because FFCV decodes into the same few buffers again and again.
                yield self._faults.without_failed(pixels.clone(), rows, faults)

    def _epoch(self, order: NDArray[np.int64], batch_size: int) -> Any:
        """Start FFCV's iterator over an order."""
        self._order.rows = order
        if self._loader is None or self._loader.batch_size != batch_size:
            self._loader = self._make_loader(batch_size)
        # FFCV counts batches by the order it was made with, and leaves out what goes beyond.
        self._loader.first_traversal_order = order
        return iter(self._loader)

    def _make_loader(self, batch_size: int) -> Any:
        """Make a stock loader whose only pipeline is the decoder's."""
        image, _ = image_and_label(self._beton.fields, self._beton.path)
        pipelines: dict[str, Any] = {field.name: None for field in self._beton.fields}
        pipelines[self._beton.fields[image].name] = [self._decoder, ToTensor()]
        return ffcv.Loader(
            str(self._beton.path),
            batch_size,
            num_workers=self._num_workers,
            order=self._order,
            pipelines=pipelines,
            drop_last=False,
        )
