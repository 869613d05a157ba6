"""Rows of a beton in object storage, fetched ahead of the engine that decodes them."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from fastprune.base.errors import InvalidValueError
from fastprune.beton.reader import Beton, open_beton
from fastprune.beton.remote.fetch import Fetch
from fastprune.beton.remote.mirror import Mirror, open_mirror
from fastprune.beton.remote.store import RETRY_SECONDS, is_url
from fastprune.service.address import names_remote_beton
from fastprune.service.served_beton import open_remote_beton

if TYPE_CHECKING:
    from fastprune.decoding.engine import Engine


def open_source(
    beton: str | Path, cache: str | Path | None, service_token: str | None = None
) -> tuple[Beton, Mirror | None]:
    """Open a loader's beton: a local one, one at a URL by its mirror in `cache`, or a service's.

    Raises:
        InvalidValueError: a URL of object storage without a cache, or a cache without one.
        BetonError: the beton is missing or damaged.
        StorageError: the beton cannot be fetched.
        LoadingError: no service gives it.
    """
    if names_remote_beton(beton) and cache is None:
        return open_remote_beton(str(beton), service_token), None
    if names_remote_beton(beton) or not is_url(beton):
        if cache is not None:
            raise InvalidValueError(
                f"cache is for betons in object storage, but {beton} is none. Leave it out."
            )
        # Its file is looked at again later, when the working folder may be another one.
        return open_beton(Path(beton).absolute()), None
    if cache is None:
        raise InvalidValueError(
            f"cache must be a folder on a local disk, which gets the rows of {beton}."
        )
    mirror = open_mirror(str(beton), cache, retry_seconds=RETRY_SECONDS)
    return mirror.beton, mirror


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
