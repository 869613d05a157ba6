"""How fast the loaders are on this machine: every backend, stock FFCV and torchvision in turn."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastprune.base.errors import FastpruneError
from fastprune.bench.peers import our_decoder_in_ffcv, stock_ffcv, torchvision_loader
from fastprune.beton.beton import Beton, RowsLike, rows_of
from fastprune.beton.opening import open_beton
from fastprune.loading.batch import choose_device
from fastprune.loading.loader import Loader


@dataclass(frozen=True)
class LoaderRate:
    """The measured rate of one loader.

    Attributes:
        name: the loader.
        images_per_second: median over the rounds, of whole epochs.
        slowest: images per second of the slowest round.
        fastest: images per second of the fastest round.
        first_batch_seconds: from making the loader to its first batch, compilation included.
    """

    name: str
    images_per_second: float
    slowest: float
    fastest: float
    first_batch_seconds: float


@dataclass(frozen=True)
class LoaderBench:
    """The loaders of this machine.

    Attributes:
        rates: of the loaders that work, ours first.
        skipped: name -> why a loader was not measured.
    """

    rates: list[LoaderRate]
    skipped: dict[str, str]


def bench_loader(
    beton_path: str | Path,
    subset: RowsLike = None,
    *,
    batch_size: int = 64,
    image_size: int = 224,
    num_workers: int,
    device: str = "auto",
    rounds: int = 3,
) -> LoaderBench:
    """Measure the loaders that work here on your own beton and subset.

    All give uint8 batches of random resized crops with flips, in random order. They take turns,
    an epoch each, after a first epoch that is not counted.

    Args:
        beton_path: the beton.
        subset: the kept rows, as a file, a `Subset` or an array; None for all of them.
        batch_size: rows per batch.
        image_size: S, in pixels.
        num_workers: threads or processes that decode.
        device: where our own loaders deliver; "auto" is CUDA where it is there.
        rounds: counted epochs of each loader.

    Returns:
        A rate per loader that works here, ours first, and why the others do not.

    Raises:
        BetonError: the beton is missing or damaged.
        InvalidValueError: the rows do not index the beton, or an argument is outside its domain.
    """
    beton = open_beton(beton_path)
    settings: dict[str, Any] = {
        "batch_size": batch_size,
        "image_size": image_size,
        "num_workers": num_workers,
    }
    makers = _makers(beton, subset, choose_device(device), settings)
    loaders, first_seconds, skipped = {}, {}, {}
    for name, make in makers.items():
        started = time.perf_counter()
        try:
            loader = make()
            next(iter(loader))
        # A broken installation raises what it likes. The others can be measured all the same.
        except (FastpruneError, ImportError, OSError, RuntimeError) as error:
            skipped[name] = str(error)
            continue
        loaders[name], first_seconds[name] = loader, time.perf_counter() - started
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    # In turns: a machine that slows down slows all of them. The first round fills the page cache.
    for number in range(1 + rounds):
        for name, loader in loaders.items():
            rate = _images_per_second(loader)
            if number > 0:
                rates[name].append(rate)
    return LoaderBench(
        rates=[
            LoaderRate(name, statistics.median(rate), min(rate), max(rate), first_seconds[name])
            for name, rate in rates.items()
        ],
        skipped=skipped,
    )


def _makers(
    beton: Beton, subset: RowsLike, device: torch.device, settings: dict[str, Any]
) -> dict[str, Callable[[], Any]]:
    rows = rows_of(beton, subset)
    ours = partial(
        Loader,
        beton.path,
        rows,
        augment="rrc",
        device=device,
        dtype=torch.uint8,
        tail="exact",
        distributed=None,
        **settings,
    )
    has_raw_rows = bool(beton.modes.any())
    makers: dict[str, Callable[[], Any]] = {"fastprune, cpu": partial(ours, backend="cpu")}
    if not has_raw_rows:
        makers["fastprune, dali"] = partial(ours, backend="dali")
    if len(beton.files) == 1:  # FFCV reads a shard, but no folder of them
        makers["fastprune in ffcv"] = partial(our_decoder_in_ffcv, beton, rows, **settings)
        makers["stock ffcv"] = partial(stock_ffcv, beton, rows, **settings)
    if not has_raw_rows:
        makers["torchvision"] = partial(torchvision_loader, beton, rows, **settings)
    return makers


def _images_per_second(loader: Any) -> float:
    started = time.perf_counter()
    num_images = sum(len(batch[0]) for batch in loader)
    # Copies to the device may still be under way when the last batch is handed out.
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return num_images / (time.perf_counter() - started)
