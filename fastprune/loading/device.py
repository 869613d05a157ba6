"""The device that a name stands for."""

import torch

from fastprune.errors import InvalidValueError


def choose_device(name: str | torch.device) -> torch.device:
    """The device that is asked for; "auto" is CUDA where it is there, else the CPU.

    Raises:
        InvalidValueError: no such device, or CUDA is asked for where torch sees none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InvalidValueError(
            f"device {name!r} is none of torch's. Say auto, cpu, cuda or cuda:1."
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InvalidValueError(f"device {name!r}: torch sees no CUDA device here. Say cpu.")
    return device


def cuda_index(device: torch.device) -> int | None:
    """The number of a CUDA device, the current one where it names none; None for the CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index
