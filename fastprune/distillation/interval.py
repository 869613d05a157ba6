"""The losses since the last line of the log: on the device until a line is due, then examined."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from fastprune.distributed import Ranks
from fastprune.errors import TrainingError

_ROWS_NAMED = 8

Batch = tuple[Tensor, ...]


class _Step(NamedTuple):
    """One step on this process; `losses` and `rows` (B,) lie on the device."""

    step: int
    epoch: int
    batch: int
    losses: Tensor
    rows: Tensor


class Interval:
    """The steps between two lines of the log.

    The host reads the losses of all steps at once, where it would wait for the device anyway. Only
    then can a loss that is no number be noticed: it is traced back to its step and rows, and the
    batch, which the loader can make again, is saved.
    """

    def __init__(
        self, *, folder: Path, ranks: Ranks, batch_again: Callable[[int, int], Batch], cure: str
    ) -> None:
        """Begin with no steps.

        Args:
            folder: where a bad batch is saved.
            ranks: the processes whose losses are averaged.
            batch_again: makes (images, labels, rows) of (epoch, batch) again.
            cure: what to do about a bad loss, for the message.
        """
        self.means: list[float] = []
        self._folder = folder
        self._ranks = ranks
        self._batch_again = batch_again
        self._cure = cure
        self._pending: list[_Step] = []

    def add(self, *, step: int, epoch: int, batch: int, losses: Tensor, rows: Tensor) -> None:
        """Keep what a step gave.

        Args:
            step: optimiser steps done, this one included.
            epoch: passes complete before it.
            batch: its place in the epoch.
            losses: (B,) of its rows, detached, on the device.
            rows: (B,) of the beton.
        """
        self._pending.append(_Step(step, epoch, batch, losses, rows))

    def fetch(self) -> None:
        """Bring the steps' mean losses to the host, as `means`.

        Raises:
            TrainingError: a loss is not finite.
        """
        if not self._pending:
            return
        means = torch.stack([step.losses.mean() for step in self._pending]).double().cpu()
        means = self._ranks.all_sum(means) / self._ranks.world
        bad = (~means.isfinite()).nonzero()
        if len(bad):
            first = int(bad[0])
            raise self._bad_loss(self._pending[first], float(means[first]))
        self.means += means.tolist()
        self._pending.clear()

    def mean(self) -> float:
        """The mean loss of the interval, which ends with it; `fetch` comes before."""
        value = sum(self.means) / len(self.means)
        self.means.clear()
        return value

    def _bad_loss(self, step: _Step, mean: float) -> TrainingError:
        """What to tell of the first step that went wrong, on every process the same."""
        bad_rows = step.rows[~step.losses.isfinite()].tolist()
        saved = self._save(step) if bad_rows else None
        found = self._ranks.all_gather((bad_rows, saved))
        rows = sorted(row for rows, _ in found for row in rows)
        shown = ", ".join(f"{row:,}" for row in rows[:_ROWS_NAMED])
        more = f" and {len(rows) - _ROWS_NAMED} more" if len(rows) > _ROWS_NAMED else ""
        files = ", ".join(file for _, file in found if file is not None)
        return TrainingError(
            f"the loss became {mean} at step {step.step} (epoch {step.epoch + 1}), in rows "
            f"{shown}{more}; look at the batch: {files}. {self._cure}"
        )

    def _save(self, step: _Step) -> str:
        """Write the batch of a step as safetensors, and return its name or why there is none."""
        rank = f"-rank-{self._ranks.rank}" if self._ranks.world > 1 else ""
        path = self._folder / f"bad-batch-step-{step.step}{rank}.safetensors"
        images, labels, rows = self._batch_again(step.epoch, step.batch)
        tensors = {"images": images, "labels": labels, "rows": rows, "losses": step.losses}
        data = save({name: value.cpu().contiguous() for name, value in tensors.items()})
        try:
            path.write_bytes(data)
        except OSError as error:
            return f"not saved ({error})"
        return str(path)
