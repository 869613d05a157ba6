"""The protocol of engines, and which one decodes."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import distributions
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from fastprune.base.errors import InvalidValueError
from fastprune.beton.beton import Beton
from fastprune.decoding.faults import RowFaults
from fastprune.loading.arrival import FetchingEngine
from fastprune.service.served_beton import RemoteBeton

BACKENDS = ("auto", "cpu", "dali")

# Raised whenever a pixel of any view changes: logits of other pixels are another cache's.
_VIEW_DECODER_VERSION = 1

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
            draw_views: from rows (n,) to views (n, 7), see `crops.CropPolicy.views`.

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
    service: str | None = None,
    service_token: str | None = None,
    is_mirrored: bool = False,
) -> Engine:
    """Start the engine of that name, as a client of a loading service where one is named.

    "auto" is "cpu". With a mirror, rows are fetched into it ahead of the engine.

    Raises:
        InvalidValueError: there is no such engine, or a service cannot stand in for it.
        MissingDependencyError: its package is not installed, or does not work here.
    """
    if backend not in BACKENDS:
        raise InvalidValueError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}.")
    service = choose_service(service, backend, beton)

    engine: Engine
    # Imported only here: DALI need not be installed, and takes seconds to import.
    if backend == "dali":
        from fastprune.decoding.dali import DaliDecoder

        engine = DaliDecoder(
            beton, image_size=image_size, num_workers=num_workers, device=device, faults=faults
        )
    else:
        from fastprune.decoding.cpu import CpuDecoder

        engine = CpuDecoder(
            beton,
            image_size=image_size,
            num_workers=num_workers,
            pin_memory=device.type == "cuda",
            faults=faults,
        )
    if service:
        from fastprune.decoding.cpu import CpuDecoder
        from fastprune.service.address import find_credentials, parse_addresses
        from fastprune.service.client import ServiceEngine

        assert isinstance(engine, CpuDecoder), "choose_service refuses the others"
        engine = ServiceEngine(
            parse_addresses(service),
            beton,
            credentials=find_credentials(service_token),
            image_size=image_size,
            local=engine,
            faults=faults,
        )
    return FetchingEngine(engine, beton) if is_mirrored else engine


def choose_service(service: str | None, backend: str, beton: Beton) -> str | None:
    """Choose the service that alone has the beton, that was named, or that of FASTPRUNE_SERVICE.

    Args:
        service: addresses; an empty one for none whatever the environment says.
        backend: as the loader was given it.
        beton: the open beton.

    Raises:
        InvalidValueError: a service was named for an engine other than ours, or for a beton that
            another one has.
    """
    if isinstance(beton, RemoteBeton):
        if service:
            raise InvalidValueError(
                f"service={service!r} does not have {beton.url}, which names its own. Leave out "
                "`service`."
            )
        service = beton.service
    if service and backend not in ("auto", "cpu"):
        raise InvalidValueError(
            f"service={service!r} gives what backend='cpu' gives, not {backend!r}. Leave out one "
            "of the two."
        )
    if service is None and backend in ("auto", "cpu"):
        return os.environ.get("FASTPRUNE_SERVICE")
    return service


def decoder_identity(backend: str, device: torch.device) -> dict[str, Any]:
    """Return what decides the pixels that an engine makes of the same bytes and boxes."""
    if backend == "dali":
        kind = "GPU" if device.type == "cuda" else "CPU"
        # The package's name has CUDA's version in it.
        packages = [p for p in distributions() if p.name.startswith("nvidia-dali-cuda")]
        return {"engine": f"dali ({kind})", "version": packages[0].version if packages else None}
    return {"engine": "cpu", "version": _VIEW_DECODER_VERSION}
