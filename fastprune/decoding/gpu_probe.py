"""Whether DALI can be trusted to decode on a GPU here, found out in a process that may die of it.

nvImageCodec 0.9.0 ends the process on JPEG regions on some GPUs (its issue 55), and nvJPEG before
13.2 decodes regions with smooth chroma on the CPU without a word. Neither can be told from version
numbers alone, so one batch is decoded, in a child.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib
import io
import json
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fastprune.base.compiled import writable_folder
from fastprune.base.files import lock, write_text

_SECONDS = 180.0  # a first start loads gigabytes of libraries
_SIDE = 64
# Between decoders and filters; a wrong image is tens of levels off.
_MOST_LEVELS = 6.0
_PACKAGES = ("nvidia-dali", "nvidia-nvimgcodec", "nvidia-nvjpeg")


@dataclass(frozen=True)
class GpuDecoding:
    """What a trial of DALI's decoding on a GPU found.

    Attributes:
        verdict: "good"; "slow" where regions are decoded on the CPU after all; "crashes" where the
            trial was killed; "fails" for any other end.
        reason: a sentence without its full stop.
    """

    verdict: str
    reason: str


@functools.cache
def probe_gpu_decoding(device_index: int, *, again: bool = False) -> GpuDecoding:
    """Find out whether DALI decodes on a GPU, once for a GPU, driver and set of versions.

    Args:
        device_index: number of the CUDA device.
        again: try although an earlier process did.
    """
    command = [sys.executable, "-m", __name__, f"cuda:{device_index}"]
    found = remembered(
        "gpu-decoding",
        gpu_facts(device_index),
        lambda: asdict(run_probe(command)),
        # A GPU without free memory, say, must not be remembered as one that cannot decode.
        lasts=lambda found: found["verdict"] != "fails",
        again=again,
    )
    return GpuDecoding(**found)


def remembered(
    name: str,
    facts: Sequence[str],
    find: Callable[[], dict[str, Any]],
    *,
    lasts: Callable[[dict[str, Any]], bool],
    again: bool = False,
) -> dict[str, Any]:
    """Find something out, unless an earlier process has under the same conditions.

    It is kept in the folder of compiled code, where nobody else can write.

    Args:
        name: of what is found.
        facts: the conditions.
        find: finds it; JSON values.
        lasts: whether it is worth keeping.
        again: find it in any case.
    """
    folder = writable_folder()
    if folder is None:
        return find()
    digest = hashlib.blake2b("\n".join(facts).encode(), digest_size=8).hexdigest()
    kept = folder / f"{name}-{digest}.json"
    lock_path = kept.with_suffix(".lock")
    lock_path.touch()
    with lock(lock_path):  # one rank of a machine finds it, and the others read
        if not again:
            with contextlib.suppress(OSError, ValueError, TypeError):
                return dict(json.loads(kept.read_text(encoding="utf-8")))
        found = find()
        if lasts(found):
            write_text(kept, json.dumps(found) + "\n")
        return found


def gpu_facts(device_index: int) -> list[str]:
    """Name what decides how a GPU decodes: its model, the driver, the packages' versions."""
    packages = {
        f"{distribution.name}=={distribution.version}"
        for distribution in metadata.distributions()
        if (distribution.name or "").startswith(_PACKAGES)
    }
    try:
        driver = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        driver = "unknown driver"
    return [torch.cuda.get_device_name(device_index), driver, *sorted(packages)]


def run_probe(command: Sequence[str], *, timeout_seconds: float = _SECONDS) -> GpuDecoding:
    """Run a trial in a child process, and judge by its end.

    Args:
        command: prints a line of JSON, see `_try`.
        timeout_seconds: after which it is killed.
    """
    try:
        done = subprocess.run(
            list(command),
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            check=False,
            # What is expected to crash need not leave a core of gigabytes.
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, 0)),
        )
    except subprocess.TimeoutExpired:
        return GpuDecoding("fails", f"decoding regions hung for {timeout_seconds:.0f} s")
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        return GpuDecoding("crashes", f"decoding regions ended the process with {name}")
    if done.returncode > 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return GpuDecoding("fails", f"decoding regions failed: {lines[-1].rstrip('.')}")
    # The libraries print warnings around it.
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    if not found["whole_on_gpu"]:
        return GpuDecoding("fails", "nvJPEG is missing, or it decodes no JPEG")
    if found["levels"] > _MOST_LEVELS:
        return GpuDecoding("fails", f"pixels are {found['levels']:.1f} levels from Pillow's")
    if not found["regions_on_gpu"]:
        return GpuDecoding(
            "slow",
            f"nvJPEG {found['nvjpeg']} decodes regions with smooth chroma on the CPU; 13.2 and "
            "newer decode them on the GPU",
        )
    return GpuDecoding("good", f"nvJPEG {found['nvjpeg']} decodes regions")


def _try(device: torch.device) -> dict[str, Any]:
    """Decode on a device, and say what was seen.

    Returns:
        whole_on_gpu and regions_on_gpu: whether JPEGs, and regions of them, are decoded with the
        CPU's decoders excluded; levels: mean difference of the pipeline's pixels from Pillow's;
        nvjpeg: the version of the library in use.
    """
    from fastprune.decoding.dali_pipeline import Pipeline

    nvimgcodec: Any = importlib.import_module("nvidia.nvimgcodec")  # it has no stubs
    jpegs = [_jpeg(number) for number in range(32)]
    boxes = [(8 * (i % 5), 16 * (i % 3), 96 + 8 * (i % 7), 120 + i) for i in range(len(jpegs))]
    kinds = (nvimgcodec.GPU_ONLY, nvimgcodec.HYBRID_CPU_GPU, nvimgcodec.HW_GPU_ONLY)
    decoder = nvimgcodec.Decoder(
        device_id=device.index if device.type == "cuda" else nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY,
        backends=[nvimgcodec.Backend(kind) for kind in kinds],
        options=":fancy_upsampling=1",
    )
    streams = [nvimgcodec.CodeStream(jpeg) for jpeg in jpegs]
    regions = [
        stream.get_sub_code_stream(0, nvimgcodec.Region(top, left, top + height, left + width))
        for stream, (top, left, height, width) in zip(streams, boxes, strict=True)
    ]
    whole_on_gpu = all(image is not None for image in decoder.decode(streams[:4]))
    regions_on_gpu = all(image is not None for image in decoder.decode(regions[:4]))
    views = np.array(boxes, np.int32)
    zeros = np.zeros_like(views)
    sample = (
        [np.frombuffer(jpeg, np.uint8) for jpeg in jpegs],
        *(np.ascontiguousarray(part) for part in (views[:, :2], views[:, 2:], zeros[:, :2])),
        zeros[:, 0].copy(),
    )
    pipeline = Pipeline(
        batch_size=len(jpegs), image_size=_SIDE, num_threads=2, device=device, size_hint=(256, 208)
    )
    *_, pixels = pipeline.run(iter([sample] * 3))
    expected = np.stack([_view(*pair) for pair in zip(jpegs, boxes, strict=True)])
    return {
        "whole_on_gpu": whole_on_gpu,
        "regions_on_gpu": regions_on_gpu,
        "levels": float(np.abs(pixels.cpu().numpy().astype(np.float64) - expected).mean()),
        "nvjpeg": _nvjpeg_version(),
    }


def _jpeg(number: int) -> bytes:
    """A picture of gradients and noise, with the chroma at half resolution as in photographs."""
    generator = np.random.default_rng(number)
    y, x = np.mgrid[0 : 176 + number, 0 : 208 + number]
    pixels = np.stack([x, y, x + y], axis=2) * 0.6 + generator.normal(0, 8, (*x.shape, 3))
    jpeg = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(
        jpeg, "JPEG", quality=90, subsampling="4:2:0"
    )
    return jpeg.getvalue()


def _view(jpeg: bytes, box: tuple[int, int, int, int]) -> NDArray[np.uint8]:
    """Pillow's pixels of a box."""
    top, left, height, width = box
    image = Image.open(io.BytesIO(jpeg)).crop((left, top, left + width, top + height))
    return np.asarray(image.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR))


def _nvjpeg_version() -> str:
    """Version of the nvJPEG that this process has loaded and torchvision has not brought."""
    mapped = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    paths = {line.split()[-1] for line in mapped if "/libnvjpeg.so" in line}
    ours = sorted(path for path in paths if "torchvision" not in path)
    if not ours:
        return "(not loaded)"
    library, number = ctypes.CDLL(ours[0]), ctypes.c_int()
    numbers = []
    for part in range(3):  # libraryPropertyType: major, minor, patch
        library.nvjpegGetProperty(part, ctypes.byref(number))
        numbers.append(str(number.value))
    return ".".join(numbers)


if __name__ == "__main__":
    print(json.dumps(_try(torch.device(sys.argv[1]))))  # noqa: T201 - the parent reads it
