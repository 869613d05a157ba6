"""The processes that train together: how they meet, agree, and end together."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from fastprune.difficulty.ranks import Ranks
from fastprune.errors import PeerError, RecipeError, TrainingError, TrainingStopped

_FAILED = "fastprune/failed"


@contextmanager
def join_processes(device: torch.device) -> Iterator[Ranks]:
    """Join the other processes, where torchrun or the caller started some.

    A process group that is there already is used, and left as it is; one that is made here, from
    torchrun's environment, is taken down at the end. Gradients travel through NCCL on CUDA, through
    gloo else; `Ranks.group` is of gloo in any case, for what lies on the CPU. When one process
    fails, the others end too, and it alone tells why.

    Args:
        device: of this process; the current one where it is a CUDA device.

    Raises:
        PeerError: another process failed first.
        TrainingError: the other processes are gone without a word.
    """
    is_ours = not distributed.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1
    store = None
    if is_ours:
        # torchrun's store outlives the processes, so that a failure can be left in it.
        store, rank, world = next(rendezvous("env://"))
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore("fastprune", store),
            rank=rank,
            world_size=world,
        )
    try:
        if not distributed.is_initialized() or distributed.get_world_size() == 1:
            yield Ranks()
            return
        ranks = Ranks(
            distributed.get_rank(),
            distributed.get_world_size(),
            distributed.new_group(backend="gloo"),
        )
        with _ending_together(ranks, store):
            yield ranks
    finally:
        if is_ours:
            distributed.destroy_process_group()


@contextmanager
def _ending_together(ranks: Ranks, store: Any) -> Iterator[None]:
    """Let the first process that fails say so, and the others end without a word of their own."""
    try:
        yield
    except TrainingStopped:
        raise  # all of them stop, after the same step
    except Exception as error:
        first = str(ranks.rank)
        if store is not None:
            first = store.compare_set(_FAILED, "", first).decode()
        if first != str(ranks.rank):
            raise PeerError(f"rank {first} of the run failed first, and tells why.") from error
        if _is_lost_connection(error):
            raise TrainingError(
                f"rank {ranks.rank} lost the other ranks: one of them died without a message, out "
                "of memory perhaps (see the system's log). Go on with --resume."
            ) from error
        raise


def _is_lost_connection(error: Exception) -> bool:
    """Whether a collective failed because another process is gone."""
    return isinstance(error, distributed.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


def synchronize_batchnorm(learner: nn.Module, ranks: Ranks, device: torch.device) -> nn.Module:
    """Let batch normalisation see the batches of all processes.

    Raises:
        RecipeError: there are several processes, but not on CUDA.
    """
    if ranks.world == 1:
        return learner
    if device.type != "cuda":
        raise RecipeError(
            f"run.sync_batchnorm = true works on CUDA alone, but the {ranks.world} processes train "
            f"on {device}. Leave it out."
        )
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(learner)
    return converted


def distribute(learner: nn.Module, ranks: Ranks, device: torch.device) -> nn.Module:
    """Wrap what is trained, so that every process steps along the mean of all gradients."""
    if ranks.world == 1:
        return learner
    return DistributedDataParallel(
        learner,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )


def summed(tensor: Tensor, ranks: Ranks) -> Tensor:
    """The sum of a CPU tensor over all processes, on every one of them."""
    if ranks.world > 1:
        distributed.all_reduce(tensor, group=ranks.group)
    return tensor


def gathered(value: Any, ranks: Ranks) -> list[Any]:
    """A small value of every process, in the order of ranks, on every one of them."""
    if ranks.world == 1:
        return [value]
    values: list[Any] = [None] * ranks.world
    distributed.all_gather_object(values, value, group=ranks.group)
    return values


def share_buffers(network: nn.Module, ranks: Ranks) -> None:
    """Give every process the first one's running statistics, which differ after a step."""
    if ranks.world > 1:
        for buffer in network.buffers():
            distributed.broadcast(buffer, src=0)


class Agreement:
    """What any process asks of all of them, agreed upon without waiting for one another.

    An answer is that of the step before, so it has arrived when it is read, and all processes act
    upon it after the same step. One process alone has its answer at once.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._pending: tuple[Any, Tensor] | None = None

    def ask(self, request: int) -> int:
        """Tell what this process asks for.

        Args:
            request: 0 for nothing; of several requests the largest is heard.

        Returns:
            What was asked for one step before.
        """
        if self._ranks.world == 1:
            return request
        answer = self.close()
        asked = torch.tensor([request])
        work = distributed.all_reduce(
            asked, op=distributed.ReduceOp.MAX, group=self._ranks.group, async_op=True
        )
        self._pending = (work, asked)
        return answer

    def close(self) -> int:
        """Wait for the answer that is still under way; 0 without one."""
        if self._pending is None:
            return 0
        (work, asked), self._pending = self._pending, None
        work.wait()
        return int(asked)
