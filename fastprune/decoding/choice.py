"""Which engine `backend="auto"` stands for: a trial and a short measurement decide, not faith."""

import importlib.util
import math
import time
from collections.abc import Callable

import numpy as np
import torch

from fastprune.base.cpus import usable_cpus
from fastprune.base.errors import FastpruneError
from fastprune.beton.beton import Beton
from fastprune.beton.layout import JPG
from fastprune.decoding.engine import Engine
from fastprune.decoding.gpu_probe import gpu_facts, probe_gpu_decoding, remembered
from fastprune.loading.batch import cuda_index
from fastprune.loading.crops import CropPolicy

# DALI decodes on the GPU that trains, and must be worth what it takes from it.
_LEAST_GAIN = 1.2
_BATCH_ROWS = 64
# Both engines decode up to four batches ahead, which the clock must not get for nothing.
_WARM_UP_BATCHES, _TIMED_BATCHES = 5, 15


def choose_backend(
    beton: Beton,
    make: Callable[[str], Engine],
    *,
    image_size: int,
    num_workers: int,
    device: torch.device,
) -> tuple[str, str]:
    """Choose the CPU engine, or DALI where it works on this GPU and these CPUs are too slow.

    What a trial in a child process and a measurement of a second or two found is kept for the next
    process, so that all ranks of a machine, and a run that is resumed there, choose alike.

    Args:
        beton: whose images are measured.
        make: starts the engine of a name, to be measured.
        image_size: S.
        num_workers: decoding threads.
        device: where batches are delivered.

    Returns:
        The backend, and why in a few words.
    """
    index = cuda_index(device)
    if index is None:
        return "cpu", "the device is the CPU"
    if not _has_dali():
        return "cpu", "DALI is not installed"
    if (beton.modes != JPG).any():
        return "cpu", "DALI reads no raw rows"
    trial = probe_gpu_decoding(index)
    if trial.verdict != "good":
        return "cpu", f"DALI is not used on this GPU: {trial.reason}"
    # Powers of two: betons of about the same images share an answer.
    pixels = float(np.mean(beton.widths.astype(np.float64) * beton.heights))
    sizes = [round(math.log2(value)) for value in (float(beton.sizes.mean()), pixels)]
    facts = [*gpu_facts(index), f"{num_workers} of {usable_cpus()} CPUs, {image_size}, {sizes}"]
    try:
        rates = remembered(
            "engine-rates",
            facts,
            lambda: {
                name: images_per_second(make(name), beton, image_size) for name in ("cpu", "dali")
            },
            lasts=lambda _: True,
        )
    except FastpruneError as error:
        return "cpu", f"the engines could not be compared: {error}"
    return faster(rates, num_workers)


def faster(rates: dict[str, float], num_workers: int) -> tuple[str, str]:
    """Choose between measured rates (images per second) of "cpu" and "dali"."""
    chosen = "dali" if rates["dali"] >= _LEAST_GAIN * rates["cpu"] else "cpu"
    return chosen, (
        f"{rates['cpu']:,.0f} images/s on {num_workers} CPU threads, {rates['dali']:,.0f} by DALI "
        "on the GPU"
    )


def images_per_second(engine: Engine, beton: Beton, image_size: int) -> float:
    """Measure an engine on training views of random rows."""
    policy = CropPolicy.make(None, image_size=image_size, train=True)
    generator = np.random.default_rng(0)
    batches = [
        generator.integers(beton.num_rows, size=_BATCH_ROWS)
        for _ in range(_WARM_UP_BATCHES + _TIMED_BATCHES)
    ]
    widths, heights = beton.widths.astype(np.int64), beton.heights.astype(np.int64)
    decoded = engine.decode(
        batches, lambda rows: policy.views(rows, widths[rows], heights[rows], seed=0, slot=0)
    )
    started = 0.0
    for number, (_pixels, _rows) in enumerate(decoded, 1):
        if number == _WARM_UP_BATCHES:
            started = time.perf_counter()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return _TIMED_BATCHES * _BATCH_ROWS / (time.perf_counter() - started)


def _has_dali() -> bool:
    """Return whether DALI can be found, without importing it."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # the package nvidia is missing too
        return False
