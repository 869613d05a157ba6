"""Rows of a beton in object storage, fetched ahead of the engine that decodes them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from fastprune.beton.beton import Beton

if TYPE_CHECKING:
    from fastprune.decoding.engine import Engine


class FetchingEngine:
    """An engine whose rows are fetched into a mirror, in the order in which it needs them."""

    def __init__(self, engine: "Engine", beton: Beton):
        self.name = engine.name
        self._engine = engine
        self._beton = beton

    def decode(
        self,
        batches: Sequence[NDArray[np.int64]],
        draw_views: Callable[[NDArray[np.int64]], NDArray[np.int32]],
    ) -> Iterator[tuple[torch.Tensor, NDArray[np.int64]]]:
        """See `engine.Engine.decode`; where all rows are there, nothing is asked of the server."""
        arriving = self._beton.arriving(batches)
        with closing(arriving):  # type: ignore[type-var] # a generator, of a mirror
            yield from self._engine.decode(_Arriving(batches, arriving, []), draw_views)


class _Arriving(Sequence[NDArray[np.int64]]):
    """Batches that are given when their rows are there; `arrived` counts all of them."""

    def __init__(
        self,
        batches: Sequence[NDArray[np.int64]],
        arriving: Iterator[NDArray[np.int64]],
        arrived: list[bool],
        first: int = 0,
    ):
        self._batches, self._arriving, self._arrived = batches, arriving, arrived
        self._first = first

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index):  # type: ignore[no-untyped-def] # int or slice, as of a list
        if isinstance(index, slice):
            rest = self._batches[index]
            return _Arriving(rest, self._arriving, self._arrived, self._first + (index.start or 0))
        rows = self._batches[index]
        while len(self._arrived) <= self._first + index:
            next(self._arriving)
            self._arrived.append(True)
        return rows
