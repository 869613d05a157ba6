"""Whether each engine decodes: an image is converted and loaded through it."""

import contextlib
import importlib
import importlib.util
import io
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastprune.base.compiled import scratch_folders
from fastprune.base.errors import FastpruneError
from fastprune.doctor.machine import Finding

_SIDE = 64
# Between decoders and filters; a wrong image is tens of levels off.
_MOST_LEVELS = 6.0

_FFCV_ADVICE = (
    "Only an ffcv.Loader of your own needs it. It is built from source. On Debian or Ubuntu: "
    "apt-get install -y --no-install-recommends pkg-config g++ python3-dev libopencv-dev "
    "libturbojpeg0-dev && pip install 'ffcv>=1.0.2'"
)
_FFCV_REPAIR = (
    "It was built against other system libraries. Install libopencv-dev and libturbojpeg0-dev, and "
    "build it again: pip install --force-reinstall --no-deps --no-cache-dir ffcv"
)
_DALI_ADVICE = (
    "Install it with: pip install nvidia-dali-cuda130 (driver for CUDA 12: nvidia-dali-cuda120)"
)
_ROOM = "Let TMPDIR name a folder that can be written and has room."

# Of each engine: the package it needs, advice where that is missing, advice where it fails.
_PACKAGES = {
    "cpu": ("numba", "Install fastprune again.", "Report this with the versions above."),
    "dali": ("nvidia.dali", _DALI_ADVICE, "Install it again, or use backend='cpu'."),
}


def check_engines() -> list[Finding]:
    """Try every engine on every device; "bad" where an installed one fails."""
    devices = [("cpu", "cpu"), ("dali", "cpu"), *([("dali", "cuda")] if _has_cuda() else [])]
    try:
        with _beton() as (beton, pixels):
            findings = [_check(backend, device, beton, pixels) for backend, device in devices]
    except (FastpruneError, OSError) as error:
        return [Finding("engines", "bad", f"no image could be converted: {error}", _ROOM)]
    return [*findings, _check_ffcv()]


@contextlib.contextmanager
def _beton() -> Iterator[tuple[Path, NDArray[np.uint8]]]:
    """Convert one image, and yield the beton with the pixels that PIL decodes."""
    from fastprune.beton.convert.writer import convert

    across = np.linspace(0, 255, _SIDE).astype(np.uint8)
    channels = np.broadcast_arrays(across[:, None], across[None, :], np.uint8(128))
    buffer = io.BytesIO()
    Image.fromarray(np.stack(channels, axis=2)).save(buffer, "JPEG", quality=95)
    scratch = next(scratch_folders(), None)
    with tempfile.TemporaryDirectory(prefix="fastprune-doctor-", dir=scratch) as name:
        folder = Path(name)
        (folder / "images" / "class").mkdir(parents=True)
        (folder / "images" / "class" / "image.jpg").write_bytes(buffer.getvalue())
        convert(folder / "images", folder / "image.beton", workers=1)
        yield folder / "image.beton", np.asarray(Image.open(buffer))


def _check(backend: str, device: str, beton: Path, expected: NDArray[np.uint8]) -> Finding:
    """Decode the image with one engine and compare it."""
    topic = f"engine {backend}, {device}"
    package, advice, repair = _PACKAGES[backend]
    if not _is_installed(package):
        return Finding(topic, "note", "not installed", advice)
    started = time.perf_counter()
    try:
        pixels = _decode(beton, backend, device)
    # A broken installation may raise anything; the doctor reports it and continues.
    except Exception as error:
        reason = str(error) if isinstance(error, FastpruneError) else repr(error)
        return Finding(topic, "bad", reason, repair)
    seconds = time.perf_counter() - started
    levels = float(np.abs(pixels.astype(float) - expected).mean())
    if levels > _MOST_LEVELS:
        return Finding(
            topic,
            "bad",
            f"decodes wrongly: {levels:.1f} levels from PIL on average",
            "Use the other engine, and report this with the versions above.",
        )
    return Finding(topic, "good", f"decoded an image, {seconds:.1f} s with start and compilation")


def _check_ffcv() -> Finding:
    """Import FFCV and the decoder for it; a library it was built against may be missing."""
    topic = "adapter ffcv"
    if not _is_installed("ffcv"):
        return Finding(topic, "note", "not installed", _FFCV_ADVICE)
    try:
        importlib.import_module("fastprune.adapters.ffcv")
    except Exception as error:
        reason = str(error) if isinstance(error, FastpruneError) else repr(error)
        return Finding(topic, "bad", reason, _FFCV_REPAIR)
    return Finding(topic, "good", "can be imported")


def _decode(beton: Path, backend: str, device: str) -> NDArray[np.uint8]:
    """Decode the (S, S, 3) uint8 pixels of the only image."""
    import torch

    from fastprune.loading.loader import Loader

    loader = Loader(
        beton,
        backend=backend,
        device=device,
        train=False,
        augment="none",
        image_size=_SIDE,
        batch_size=1,
        num_workers=1,
        dtype=torch.uint8,
        distributed=None,
    )
    images, _ = next(iter(loader))
    return np.asarray(images[0].permute(1, 2, 0).cpu())


def _has_cuda() -> bool:
    """Check whether torch is there and sees a GPU."""
    try:
        import torch
    except (ImportError, OSError):
        return False
    return torch.cuda.is_available()


def _is_installed(package: str) -> bool:
    """Check whether a package can be found, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # its parent is missing
        return False
