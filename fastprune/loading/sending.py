"""Batches on their way to a GPU: copied in a stream of their own, a batch ahead of the caller."""

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

_T = TypeVar("_T")


@dataclass(frozen=True)
class Sent:
    """A batch on its way.

    Attributes:
        rows: (B,) int64, on the host.
        parts: tensors on the device, which may not have arrived yet.
        events: what a stream must wait for before it reads them; none on the CPU.
    """

    rows: NDArray[np.int64]
    parts: list[torch.Tensor]
    events: tuple[torch.cuda.Event, ...] = ()

    def receive(self) -> list[torch.Tensor]:
        """Return the parts, for which the current stream waits, and the host does not."""
        for event in self.events:
            stream = torch.cuda.current_stream(self.parts[0].device)
            stream.wait_event(event)
            for part in self.parts:
                # Else torch could give the memory away again while this stream still reads it.
                part.record_stream(stream)
        return self.parts


def send(rows: NDArray[np.int64], parts: Sequence[torch.Tensor], device: torch.device) -> Sent:
    """Begin to copy a batch to the device.

    Args:
        rows: (B,) int64.
        parts: tensors, on the host or on the device already.
        device: where they go.
    """
    if device.type != "cuda":
        return Sent(rows, [part.to(device) for part in parts])
    # What the engine may have put on the device is ready in the stream that is current now.
    decoded = torch.cuda.current_stream(device).record_event()
    stream = _copy_stream(device)
    with torch.cuda.stream(stream):
        # From pageable memory, a copy would wait for the device in spite of `non_blocking`.
        copies = [
            part if part.is_cuda else part.pin_memory().to(device, non_blocking=True)
            for part in parts
        ]
    return Sent(rows, copies, (decoded, stream.record_event()))


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
