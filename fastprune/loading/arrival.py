"""Rows of a beton in object storage, fetched ahead of the engine that decodes them."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from fastprune.beton.remote.fetch import Fetch
from fastprune.beton.remote.mirror import Mirror

if TYPE_CHECKING:
    from fastprune.decoding.engine import Engine


class FetchingEngine:
    """An engine whose rows are fetched into a mirror, in the order in which it needs them."""

    def __init__(self, engine: "Engine", mirror: Mirror):
        self.name = engine.name
        self._engine = engine
        self._mirror = mirror

    def decode(
        self,
        batches: Sequence[NDArray[np.int64]],
        draw_views: Callable[[NDArray[np.int64]], NDArray[np.int32]],
    ) -> Iterator[tuple[torch.Tensor, NDArray[np.int64]]]:
        """See `engine.Engine.decode`; where all rows are there, nothing is asked of the server."""
        rows = np.concatenate(batches) if batches else np.empty(0, np.int64)
        _, first = np.unique(rows, return_index=True)
        with Fetch(self._mirror, rows[np.sort(first)]) as fetch:
            yield from self._engine.decode(_Arriving(batches, fetch), draw_views)


class _Arriving(Sequence[NDArray[np.int64]]):
    """Batches that are given when their rows are there."""

    def __init__(self, batches: Sequence[NDArray[np.int64]], fetch: Fetch):
        self._batches = batches
        self._fetch = fetch

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index):  # type: ignore[no-untyped-def] # int or slice, as of a list
        if isinstance(index, slice):
            return _Arriving(self._batches[index], self._fetch)
        self._fetch.wait(self._batches[index])
        return self._batches[index]
