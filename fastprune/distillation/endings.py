"""Endings of a run: signals, non-finite losses, exhausted memory; checkpoints that are due."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Self

import torch
from safetensors.torch import save

from fastprune.base import interrupts
from fastprune.base.errors import TrainingError, TrainingStopped
from fastprune.base.ranks import Agreement, Ranks
from fastprune.distillation.context import Batch, Context
from fastprune.distillation.meters import StepLosses
from fastprune.settings import RunSettings

# What a process asks of all of them at a step: nothing (0), this, or the number of a signal, which
# is larger; the largest request wins.
CHECKPOINT = 1

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# torchrun repeats a signal to its workers within a second; a person waits longer.
_REPEAT_SECONDS = 5.0
# As many as fit a terminal; the saved batch has all of them.
_ROWS_NAMED = 8


class Signals:
    """Records SIGTERM and SIGINT, so that a run can end with a checkpoint.

    Schedulers send a signal to every process and launchers forward it, so the same one within five
    seconds counts once. Any other that follows acts as it would have without us. Python delivers
    signals to the main thread alone; in other threads this does nothing.

    Attributes:
        number: of the signal that came; 0 without one.
    """

    def __init__(self) -> None:
        self.number = 0
        self._came_at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        # signal.signal raises in any other thread.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
            # A signal that was held back during start-up ends the run at its first step.
            self.number = interrupts.take()
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Remember the first signal; let a different or later one end the process."""
        del frame
        now = time.monotonic()
        # Only recorded: the running step ends, so that the checkpoint is of a whole step.
        if not self.number:
            self.number, self._came_at = number, now
        elif number != self.number or now - self._came_at >= _REPEAT_SECONDS:
            # A second Ctrl-C ends a run that hangs.
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        """Put back the handlers that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


class Requests:
    """Lets the processes of a run agree at each step whether to save or to stop.

    A context manager, which records signals in between.

    Attributes:
        signals: of this process.
    """

    def __init__(self, settings: RunSettings, ranks: Ranks) -> None:
        self.signals = Signals()
        self._settings = settings
        self._ranks = ranks
        self._agreement = Agreement(ranks)
        self._saved_at = time.monotonic()

    def __enter__(self) -> Self:
        self.note_checkpoint()
        self.signals.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.signals.__exit__()
        if exception[0] is None:
            # The request of the last step is in flight; the process group must outlive it.
            self._agreement.close()

    def note_checkpoint(self) -> None:
        """Count the minutes until the next checkpoint from here."""
        self._saved_at = time.monotonic()

    def ask(self, step: int, *, is_last: bool) -> int:
        """Ask for what is due here, and return what is due on any process.

        Args:
            step: optimizer steps done.
            is_last: whether it is an epoch's last one, which a checkpoint follows anyway.

        Returns:
            0, `CHECKPOINT`, or the number of a signal; the same on every process.
        """
        answer = self._agreement.ask(self._due(step, is_last=is_last))
        return 0 if answer == CHECKPOINT and is_last else answer

    def _due(self, step: int, *, is_last: bool) -> int:
        # A signal outweighs a checkpoint, since it brings one.
        if self.signals.number:
            return self.signals.number
        every, minutes = self._settings.checkpoint_every, self._settings.checkpoint_minutes
        is_due = every is not None and step % every == 0
        # Clocks differ among processes, so only the first one's counts.
        is_late = self._ranks.is_first and time.monotonic() - self._saved_at >= 60 * minutes
        if is_last or not (is_due or is_late):
            return 0
        # The answer comes a step later; until then nothing more is due.
        self.note_checkpoint()
        return CHECKPOINT


def stopped(number: int, *, step: int, is_saved: bool) -> TrainingStopped:
    """Make the error that ends a run after a signal."""
    name = signal.Signals(number).name
    where = "from there" if is_saved else "from the last checkpoint"
    return TrainingStopped(
        f"{name} stopped the run after step {step}. Continue {where} with --resume.",
        exit_code=128 + number,
    )


def bad_loss_error(context: Context, bad: StepLosses, batch: Batch) -> TrainingError:
    """Make the error that names a bad step and its rows, and save its batch; a collective.

    The step is the same on every process; losses and batch are this one's.
    """
    # After a first bad step all weights are bad, so only its own rows mean anything.
    bad_rows = bad.rows[~bad.losses.isfinite()].tolist()
    # A process whose rows are fine has nothing worth saving.
    saved = _save_batch(context, bad, batch) if bad_rows else None
    mean = float(context.ranks.all_sum(bad.losses.mean().double().cpu()) / context.ranks.world)
    # Every process raises the same text: any of them may be the one that is printed.
    found = context.ranks.all_gather((bad_rows, saved))
    rows = sorted(row for rows, _ in found for row in rows)
    shown = ", ".join(f"{row:,}" for row in rows[:_ROWS_NAMED])
    more = f" and {len(rows) - _ROWS_NAMED} more" if len(rows) > _ROWS_NAMED else ""
    files = ", ".join(file for _, file in found if file is not None)
    return TrainingError(
        f"the loss became {mean} at step {bad.step} (epoch {bad.epoch + 1}), in rows "
        f"{shown}{more}; look at the batch: {files}. Lower schedule.learning_rate "
        f"({context.recipe.schedule.learning_rate}) or set schedule.clip_norm, and see whether the "
        "images are as expected."
    )


def _save_batch(context: Context, bad: StepLosses, batch: Batch) -> str:
    """Write a batch as safetensors; returns the file's name, or why there is none."""
    rank = f"-rank-{context.ranks.rank}" if context.ranks.world > 1 else ""
    path = Path(context.recipe.run.out) / f"bad-batch-step-{bad.step}{rank}.safetensors"
    # On the CPU the rows on the host are the same tensor, which safetensors would refuse.
    tensors = batch._replace(host_rows=None)._asdict() | {"losses": bad.losses}
    # Without a teacher cache a batch has no teacher logits; holes are not a tensor.
    present = {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    # Contiguous: channels_last images would be refused.
    data = save({name: value.cpu().contiguous() for name, value in present.items()})
    try:
        # Not through `atomic_path`, whose errors would hide the one about the loss.
        path.write_bytes(data)
    except OSError as error:
        return f"not saved ({error})"
    return str(path)


@contextmanager
def naming_memory(*, batch_size: int, image_size: int, device: torch.device) -> Iterator[None]:
    """Turn a failed allocation into an error that names a batch size to try.

    Raises:
        TrainingError: the device's memory is exhausted.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        # Half is what usually fits; the learning rate goes with the batch.
        cure = (
            f"Try data.batch_size = {batch_size // 2}, and schedule.learning_rate lowered as much"
            if batch_size > 1
            else "Use a smaller network, or data.image_size"
        )
        raise TrainingError(
            f"out of memory on {device} with data.batch_size = {batch_size} at {image_size} "
            f"pixels ({str(error).splitlines()[0]}). {cure}; run.precision = 'bf16' saves memory "
            "as well."
        ) from error


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed; torch has no exception class for the CPU's."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        "can't allocate memory" in str(error)
    )
