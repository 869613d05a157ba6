"""The device that a name stands for, and copies of what another library put on it."""

from collections import deque

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


class Copies:
    """Copies tensors whose memory their library uses again as soon as they are dropped.

    A copy on a GPU waits in torch's stream behind the work of the caller. The library, which works
    in other streams, would not wait for it, so a tensor is held until its copy is made.
    """

    def __init__(self, *, most_held: int = 2):
        self._held: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()
        self._most_held = most_held

    def of(self, lent: torch.Tensor) -> torch.Tensor:
        """A copy that belongs to the caller."""
        owned = lent.clone()
        if lent.is_cuda:
            made = torch.cuda.Event()
            made.record(torch.cuda.current_stream(lent.device))
            self._held.append((lent, made))
            if len(self._held) > self._most_held:
                self._held[0][1].synchronize()
            while self._held and self._held[0][1].query():
                self._held.popleft()
        return owned
