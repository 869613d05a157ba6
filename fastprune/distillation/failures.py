"""What ends a run from inside: a loss that is no number, and memory that is used up."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save

from fastprune.base.errors import TrainingError
from fastprune.distillation.meters import StepLosses
from fastprune.distillation.step import Batch, Context

# As many as fit a terminal; the saved batch has all of them.
_ROWS_NAMED = 8


def bad_loss_error(context: Context, bad: StepLosses, batch: Batch) -> TrainingError:
    """Make the error that names a bad step and its rows, and save its batch; a collective.

    Args:
        context: of the run; the batch goes into its folder.
        bad: the step, the same on every process, with this process's losses.
        batch: this process's batch of that step.
    """
    # After a first bad step all weights are bad, so only its own rows mean anything.
    bad_rows = bad.rows[~bad.losses.isfinite()].tolist()
    # A process whose rows are fine has nothing to look at.
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
    """Write a batch as safetensors, and return the file's name or why there is none."""
    rank = f"-rank-{context.ranks.rank}" if context.ranks.world > 1 else ""
    path = Path(context.recipe.run.out) / f"bad-batch-step-{bad.step}{rank}.safetensors"
    tensors = batch._asdict() | {"losses": bad.losses}
    # Without a teacher cache a batch has no logits of the teacher, and holes are no tensor.
    present = {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    # Contiguous: channels_last images would be refused.
    data = save({name: value.cpu().contiguous() for name, value in present.items()})
    try:
        # Not through `atomic_path`: the error below must come out, whatever the disk does.
        path.write_bytes(data)
    except OSError as error:
        return f"not saved ({error})"
    return str(path)


@contextmanager
def naming_memory(*, batch_size: int, image_size: int, device: torch.device) -> Iterator[None]:
    """Turn a failed allocation into an error that says which batch size to try.

    Raises:
        TrainingError: the device's memory is used up.
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
    """Whether an allocation failed; torch has no class of its own for the CPU's."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        "can't allocate memory" in str(error)
    )
