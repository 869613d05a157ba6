"""Which decoder a loader has: the CPU's, DALI, or the CPU's behind a loading service."""

import logging
import os
from importlib import import_module
from typing import cast

import torch

from fastprune.base.errors import InvalidValueError
from fastprune.beton.beton import Beton
from fastprune.decoding.cpu import CpuDecoder
from fastprune.decoding.decoder import Decoder
from fastprune.decoding.faults import RowFaults

_LOG = logging.getLogger(__name__)


def make_decoder(
    backend: str,
    beton: Beton,
    *,
    image_size: int,
    num_workers: int,
    device: torch.device,
    faults: RowFaults,
) -> Decoder:
    """Make the decoder of a backend; "auto" is "cpu".

    Raises:
        InvalidValueError: a loading service decodes this beton, and gives other pixels.
        MissingDependencyError: the backend's package is not installed, or does not work here.
    """
    # DALI and the service are imported by name: they may be missing, and take seconds to import.
    if backend == "dali":
        _require_no_service(beton)
        place = "the GPU" if device.type == "cuda" else f"{num_workers} threads"
        _LOG.info("%s: decoding with DALI on %s", beton.path, place)
        dali = import_module("fastprune.decoding.dali")
        settings = {"image_size": image_size, "num_workers": num_workers, "device": device}
        return cast(Decoder, dali.DaliDecoder(beton, faults=faults, **settings))
    _LOG.info("%s: decoding with the CPU decoder on %d threads", beton.path, num_workers)
    local = CpuDecoder(
        beton,
        image_size=image_size,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        faults=faults,
    )
    if not beton.service:
        return local
    client = import_module("fastprune.service.client")
    decoder = client.ServiceDecoder(beton, image_size=image_size, local=local, faults=faults)
    return cast(Decoder, decoder)


def _require_no_service(beton: Beton) -> None:
    # A service named in the environment is for all loaders that can use it, and this one cannot.
    is_environments = beton.service == os.environ.get("FASTPRUNE_SERVICE") and beton.files
    if beton.service and not is_environments:
        raise InvalidValueError(
            f"service={beton.service!r} gives what backend='cpu' gives, not 'dali'. Leave out one "
            "of the two."
        )
