"""Batches on their way to a GPU: copied in a stream of their own, a batch ahead of the caller."""

import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch

_T = TypeVar("_T")


@dataclass(frozen=True)
class Parts:
    """Tensors of a batch by name.

    Attributes:
        tensors: on the host, or on the device, where they may not have arrived yet.
        events: CUDA events that a stream must wait for before it reads them.
    """

    tensors: dict[str, torch.Tensor]
    events: tuple[torch.cuda.Event, ...] = ()

    def received(self) -> dict[str, torch.Tensor]:
        """Let the current stream, but not the host, wait for the tensors; return them."""
        for event in self.events:
            stream = torch.cuda.current_stream(self.tensors["pixels"].device)
            stream.wait_event(event)
            for tensor in self.tensors.values():
                # Else torch could give the memory away again while this stream still reads it.
                tensor.record_stream(stream)
        return dict(self.tensors)


def send(parts: Parts, device: torch.device) -> Parts:
    """Begin to copy tensors, from the host or the device itself, to a device."""
    if device.type != "cuda":
        return Parts({name: tensor.to(device) for name, tensor in parts.tensors.items()})
    # Pixels that DALI put on the device are ready in the stream that is current now.
    decoded = torch.cuda.current_stream(device).record_event()
    stream = _copy_stream(device)
    with torch.cuda.stream(stream):
        # From pageable memory, a copy would wait for the device in spite of `non_blocking`.
        copies = {
            name: t if t.is_cuda else t.pin_memory().to(device, non_blocking=True)
            for name, t in parts.tensors.items()
        }
    return Parts(copies, (decoded, stream.record_event()))


def one_ahead(items: Iterator[_T]) -> Iterator[_T]:
    """Make each item before the one ahead of it is given; the first is given at once.

    An error comes in its turn, after the items before it.
    """
    yield from itertools.islice(items, 1)
    made = deque(itertools.islice(items, 1))
    while made:
        failure = None
        try:
            made.extend(itertools.islice(items, 1))
        except Exception as error:
            failure = error
        yield made.popleft()
        if failure is not None:
            raise failure


@lru_cache(maxsize=16)
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Return this process's stream for copies to a GPU: in it they pass the kernels of a step."""
    return torch.cuda.Stream(device)
