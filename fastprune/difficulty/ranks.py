"""The ranks of a distributed pass: what each sends, and what the first one keeps."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """This process among those that share the pass.

    Results travel through the CPU (gloo): they are small beside the images, and every backend and
    every number of nodes is served alike.

    Attributes:
        rank: this process, 0 .. world - 1.
        world: number of processes.
        group: the processes, with gloo; None where this one is alone.
    """

    rank: int = 0
    world: int = 1
    group: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def gather(self, tensor: Tensor, rows: int) -> list[Tensor]:
        """Collect one tensor (rows_of_rank, ...) of every rank on the first one.

        Args:
            tensor: (n, ...) on the CPU, n <= rows; the further shape and dtype are all ranks' own.
            rows: the most that any rank sends.

        Returns:
            The ranks' tensors in order; empty on the other ranks.
        """
        if self.world == 1:
            return [tensor]
        padded = torch.zeros(rows, *tensor.shape[1:], dtype=tensor.dtype)
        padded[: len(tensor)] = tensor
        count = torch.tensor([len(tensor)])
        counts = [torch.zeros_like(count) for _ in range(self.world)] if self.is_first else None
        gathered = [torch.empty_like(padded) for _ in range(self.world)] if self.is_first else None
        distributed.gather(count, counts, dst=0, group=self.group)
        distributed.gather(padded, gathered, dst=0, group=self.group)
        pairs = zip(gathered or [], counts or [], strict=True)
        return [rows_of_rank[: int(n)] for rows_of_rank, n in pairs]

    def from_first(self, value: Value | None) -> Value:
        """What the first rank holds, on every rank."""
        holder = [value]
        if self.world > 1:
            distributed.broadcast_object_list(holder, src=0, group=self.group)
        result = holder[0]
        assert result is not None
        return result


@contextmanager
def join_ranks() -> Iterator[Ranks]:
    """Join the other processes, where torchrun or the caller started some.

    A process group that is there already is used, and left as it is; one that is made here, from
    torchrun's environment, is taken down at the end.
    """
    is_ours = not distributed.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if is_ours:
        distributed.init_process_group("gloo")
    try:
        if distributed.is_initialized() and distributed.get_world_size() > 1:
            group = distributed.new_group(backend="gloo")
            yield Ranks(distributed.get_rank(), distributed.get_world_size(), group)
        else:
            yield Ranks()
    finally:
        if is_ours:
            distributed.destroy_process_group()


def device_of_rank(device: torch.device) -> torch.device:
    """The CUDA device of this rank on its node, where none is named; else the device as it is."""
    names_no_card = device == torch.device("cuda")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if names_no_card else device
