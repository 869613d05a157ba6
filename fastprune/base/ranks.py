"""The processes of a run: how they meet, what they exchange, and how they end together."""

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from fastprune.base.errors import PeerError, TrainingError, TrainingStopped

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Value = TypeVar("Value")

# How long a rank waits for the others in a collective. Rank 0 alone makes score tables and writes
# checkpoints meanwhile, minutes on a slow disk; a rank that hangs is noticed after this time.
TIMEOUT_MINUTES = 10

_FAILED = "failed"  # key of torchrun's store: the rank that failed first
# Keys of a group that was taken down stay in torchrun's store, so every join has its own prefix.
# Ranks run the same program, so they count alike.
_joins = itertools.count()


@dataclass(frozen=True)
class Ranks:
    """This process among those that share a run.

    They exchange values through the CPU (gloo), because these are small and gloo works for every
    backend and number of nodes. Every method is a collective: all ranks call it, in the same order.

    Attributes:
        rank: this process, in [0, world).
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

    def from_first(self, value: Value | None) -> Value:
        """Return the first rank's value, which is not None, on every rank."""
        from torch import distributed

        holder = [value]
        if self.world > 1:
            distributed.broadcast_object_list(holder, src=0, group=self.group)
        result = holder[0]
        assert result is not None
        return result

    def gather(self, tensor: "Tensor", rows: int) -> "list[Tensor]":
        """Collect a CPU tensor (n, ...) of every rank, n <= rows, on the first one.

        All ranks pass the same `rows`, dtype and further shape. The other ranks get an empty list.
        """
        if self.world == 1:
            return [tensor]
        import torch
        from torch import distributed

        # gloo gathers equal shapes alone; the last ranks of an epoch may have fewer rows.
        padded = torch.zeros(rows, *tensor.shape[1:], dtype=tensor.dtype)
        padded[: len(tensor)] = tensor
        count = torch.tensor([len(tensor)])
        counts = [torch.zeros_like(count) for _ in range(self.world)] if self.is_first else None
        gathered = [torch.empty_like(padded) for _ in range(self.world)] if self.is_first else None
        # All to one, not all to all: the other ranks would throw it away.
        distributed.gather(count, counts, dst=0, group=self.group)
        distributed.gather(padded, gathered, dst=0, group=self.group)
        pairs = zip(gathered or [], counts or [], strict=True)
        return [rows_of_rank[: int(n)] for rows_of_rank, n in pairs]

    def all_gather(self, value: Any) -> list[Any]:
        """Return a small value of every rank, in their order, on every rank."""
        if self.world == 1:
            return [value]
        from torch import distributed

        # Pickled by torch; for small values of ours, never for what a file holds.
        values: list[Any] = [None] * self.world
        distributed.all_gather_object(values, value, group=self.group)
        return values

    def all_sum(self, tensor: "Tensor") -> "Tensor":
        """Return the sum of a CPU tensor over all ranks, on every rank; may be done in place."""
        if self.world > 1:
            from torch import distributed

            distributed.all_reduce(tensor, group=self.group)
        return tensor


@contextmanager
def join_ranks(device: "torch.device | None" = None) -> Iterator[Ranks]:
    """Join the other processes, where torchrun or the caller started some.

    A process group that is there already is used, and left as it is; one that is made here, from
    torchrun's environment, is taken down at the end. When one process fails, the others end too,
    and it alone gives the reason.

    Args:
        device: of this process, where gradients are exchanged: through NCCL on CUDA, else through
            gloo; the current one where it is a CUDA device. None exchanges nothing but `Ranks`.

    Raises:
        PeerError: another process failed first.
        TrainingError: another process died silently, or did not answer for `TIMEOUT_MINUTES`.
    """
    from torch import distributed
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    is_ours = not distributed.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1
    timeout = timedelta(minutes=TIMEOUT_MINUTES)
    store = None
    if is_ours:
        # torchrun's store outlives the processes, so that a failure can be left in it.
        store, rank, world = next(rendezvous("env://"))
        store = PrefixStore(f"fastprune/{next(_joins)}", store)
        # Scoring exchanges nothing on the device, and NCCL would take memory of each card.
        on_cuda = device is not None and device.type == "cuda"
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
            store=store,
            rank=rank,
            world_size=world,
            timeout=timeout,
        )
    try:
        if not distributed.is_initialized() or distributed.get_world_size() == 1:
            yield Ranks()
            return
        ranks = Ranks(
            distributed.get_rank(),
            distributed.get_world_size(),
            distributed.new_group(backend="gloo", timeout=timeout),
        )
        with _ending_together(ranks, store):
            yield ranks
    finally:
        if is_ours:
            distributed.destroy_process_group()


def device_of_rank(device: "torch.device") -> "torch.device":
    """The CUDA device of this rank on its node, where none is named; else the device as it is."""
    import torch

    names_no_card = device == torch.device("cuda")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if names_no_card else device


class Agreement:
    """Requests of any process to all of them, agreed on without waiting for each other.

    `ask` returns the answer to the previous step's request, which has arrived by then, so all
    processes act on it after the same step. A single process gets its answer at once.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._pending: tuple[Any, Tensor] | None = None

    def ask(self, request: int) -> int:
        """Send a request (0 for none, the largest wins); return the previous step's answer."""
        if self._ranks.world == 1:
            return request
        import torch
        from torch import distributed

        # One request is under way at a time; all ranks start theirs in the same order.
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


@contextmanager
def _ending_together(ranks: Ranks, store: Any) -> Iterator[None]:
    """Let the first process that fails report the reason, and the others end quietly."""
    try:
        yield
    except TrainingStopped:
        raise  # all of them stop, after the same step
    except Exception as error:
        first = str(ranks.rank)
        # The first to set the key wins; the others read its rank. A caller's own group has no store
        # that is known here, and each process gives its own reason.
        if store is not None:
            first = store.compare_set(_FAILED, "", first).decode()
        if first != str(ranks.rank):
            raise PeerError(
                f"rank {first} of the run failed first; its log has the reason."
            ) from error
        if _is_lost_connection(error):
            raise TrainingError(
                f"rank {ranks.rank} lost the other ranks: one of them died without a message, out "
                "of memory perhaps (see the system's log), or did not answer for "
                f"{TIMEOUT_MINUTES} minutes. Start the command again (`train` with --resume)."
            ) from error
        raise


def _is_lost_connection(error: Exception) -> bool:
    """Whether a collective failed because another process is gone."""
    from torch import distributed

    # gloo's transport raises RuntimeError, with its name in the text alone.
    return isinstance(error, distributed.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )
