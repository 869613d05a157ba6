"""Which packages are installed, and whether torch sees a GPU."""

import os
from pathlib import Path

from fastprune.doctor.findings import Finding
from fastprune.environment import describe_versions

_DEVICES = Path("/dev")


def check_packages() -> Finding:
    """The versions of what matters."""
    versions = describe_versions()
    found = ", ".join(f"{name} {version}" for name, version in versions.items())
    return Finding("packages", "good", found)


def check_cuda(*, devices: Path = _DEVICES) -> Finding:
    """Whether torch works, and which GPUs it sees.

    Args:
        devices: the folder of device files.
    """
    topic = "torch and CUDA"
    try:
        import torch
    except (ImportError, OSError) as error:
        return Finding(
            topic,
            "bad",
            f"torch cannot be imported: {error}",
            "Install torch and torchvision as a pair, such as those of constraints.txt.",
        )
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Finding(topic, "good", f"{', '.join(names)}; CUDA {torch.version.cuda}")
    if torch.version.cuda is None:
        return Finding(topic, "note", "torch was built without CUDA: training runs on the CPU")
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return Finding(topic, "note", "CUDA_VISIBLE_DEVICES is empty: training runs on the CPU")
    if any(devices.glob("nvidia[0-9]*")):
        return Finding(
            topic,
            "bad",
            f"there is an NVIDIA device, but torch, built for CUDA {torch.version.cuda}, cannot "
            "use it",
            f"Compare with the driver's CUDA version (nvidia-smi): it must be {_major()} or newer.",
        )
    return Finding(
        topic,
        "note",
        "no NVIDIA device is visible here: training runs on the CPU",
        "If this machine has one, give it to the container: docker run --gpus all ...",
    )


def _major() -> str:
    """The CUDA series that torch was built for."""
    import torch

    return f"{str(torch.version.cuda).partition('.')[0]}.0"
