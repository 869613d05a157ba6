"""The machine and the versions that a measurement was made with."""

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from fastprune.base.cpus import usable_cpus

# Those that decide a measurement; DALI's wheels are named by the CUDA version.
_PACKAGES = (
    "fastprune",
    "torch",
    "torchvision",
    "numpy",
    "numba",
    "ffcv",
    "nvidia-dali-cuda130",
    "nvidia-dali-cuda120",
    "timm",
)


def describe_machine() -> dict[str, Any]:
    """Describe the CPU, its usable cores, memory in GB (10⁹ bytes) and GPU names."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu_model(),
        "cores": usable_cpus(),
        "memory_gb": round(memory_bytes / 1e9, 1),
        "gpus": gpus,
        "system": f"{platform.system()} {platform.machine()}",
    }


def describe_versions() -> dict[str, str]:
    """Look up the versions of Python and of the packages that matter, where installed."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _cpu_model() -> str:
    # platform.processor() is empty, or the architecture, on Linux.
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
