"""The run's folder and its checkpoints: whole or not there, checked by a digest in their names."""

import hashlib
import io
import logging
import pickle
import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastprune.base.errors import ArtifactError, DamagedCheckpointWarning, RecipeError
from fastprune.base.files import atomic_path, lock
from fastprune.networks import save_weights

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{9})-([0-9a-f]{16})\.pt")


class Checkpoints:
    """The newest checkpoints of a run.

    A file is called `step-000001200-9f3c12ab41aa90de.pt`, after the optimizer steps done and the
    BLAKE2b digest of its bytes. It is what `torch.save` writes, read without running pickles.
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        """Look into a folder.

        Args:
            folder: the checkpoints' own; made when the first is saved.
            keep: how many of the newest ones to keep.
        """
        self._folder = folder
        self._keep = keep

    def save(self, state: dict[str, Any], *, step: int) -> bool:
        """Write a checkpoint, then remove those that are too many.

        Where it cannot be written, a warning says so, the run continues, and the older ones stay.

        Args:
            state: tensors and plain values.
            step: optimizer steps done.

        Returns:
            Whether it was written.
        """
        # In memory first: the name holds the digest, so it must be known before the file is made.
        buffer = io.BytesIO()
        torch.save(state, buffer)
        data = buffer.getvalue()
        path = self._folder / f"step-{step:09d}-{_digest(data)}.pt"
        try:
            self._folder.mkdir(exist_ok=True)
            # Before the write, so that leftovers of a kill do not fill the disk.
            self._sweep()
            with atomic_path(path) as temporary:
                temporary.write_bytes(data)
        # A full disk costs a checkpoint. The run would cost more.
        except (ArtifactError, OSError) as error:
            kept = self._newest_first()
            logger.warning(
                "NO CHECKPOINT at step %d: %s Training goes on; a resumed run would start from %s.",
                step,
                error,
                kept[0] if kept else "the beginning",
            )
            return False
        # The old ones go only when the new one is on the disk.
        for old in [old for old in self._newest_first() if old != path][self._keep - 1 :]:
            old.unlink(missing_ok=True)
        return True

    def newest(self) -> dict[str, Any] | None:
        """The newest checkpoint that is whole, on the CPU; None without one.

        Warns:
            DamagedCheckpointWarning: a newer one is damaged.

        Raises:
            ArtifactError: there are some, and all of them are damaged.
        """
        found = self._newest_first()
        for path in found:
            try:
                return _load(path)
            # All that torch.load raises for bytes that are not what it wrote.
            except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
                # To begin anew by itself would throw away the run that --resume asked for.
                if path == found[-1]:
                    raise ArtifactError(
                        f"none of the {len(found)} checkpoints in {self._folder} is whole; the "
                        f"oldest, {path.name}, is damaged too ({error}). Remove {self._folder} to "
                        "begin anew."
                    ) from error
                warnings.warn(
                    f"the checkpoint {path} is damaged ({error}); the one before it is tried.",
                    DamagedCheckpointWarning,
                    stacklevel=2,
                )
        return None

    def exist(self) -> bool:
        """Whether there is any."""
        return bool(self._newest_first())

    def remove(self) -> None:
        """Remove them all; those of a finished run lead nowhere."""
        for path in self._newest_first():
            path.unlink(missing_ok=True)
        self._sweep()
        if self._folder.is_dir() and not any(self._folder.iterdir()):
            self._folder.rmdir()

    def _sweep(self) -> None:
        """Remove what a kill in the midst of writing left behind."""
        # Names of `atomic_path`; the folder is held by this process alone.
        for path in self._folder.glob(".step-*.tmp"):
            path.unlink(missing_ok=True)

    def _newest_first(self) -> list[Path]:
        """The files that are checkpoints by name."""
        if not self._folder.is_dir():
            return []
        # A name counts by its pattern, so other people's files stay.
        found = [path for path in self._folder.iterdir() if _NAME.fullmatch(path.name)]
        # The step has nine digits, so names sort as steps do.
        return sorted(found, key=lambda path: path.name, reverse=True)


@contextmanager
def hold_run_folder(folder: Path, *, resume: bool) -> Iterator[None]:
    """Make a run's folder where it is missing, and hold it against other processes.

    Args:
        folder: of the run.
        resume: whether it may hold an unfinished run.

    Raises:
        RecipeError: it cannot be made, or holds a run that this one would destroy.
        ArtifactError: another process is at work in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"run.out = {str(folder)!r} cannot be made: {error.strerror}.") from error
    # Held until the run ends, and freed by the kernel if it is killed.
    with lock(folder / ".lock", wait=False):
        # It is written last, so a run without one is unfinished.
        if (folder / "result.json").exists():
            raise RecipeError(
                f"{folder} holds a finished run. Name another folder (run.out) or remove this one."
            )
        if not resume and Checkpoints(folder / "checkpoints", keep=1).exist():
            raise RecipeError(
                f"{folder} holds an unfinished run. Go on with it (--resume), name another folder "
                "(run.out), or remove this one."
            )
        yield
        # Behind the result nobody may write here anyway, so the lock guards nothing.
        (folder / ".lock").unlink()


def save_student(
    network: nn.Module, path: Path, *, metadata: dict[str, str], has_checkpoint: bool
) -> None:
    """Write the weights that a run was for; a full disk does not cost them.

    Args:
        network: the student.
        path: in the run's folder.
        metadata: texts for the file's header.
        has_checkpoint: whether the newest checkpoint is of this student, so that a resumed run
            writes it. Without one it is put into the system's temporary folder.

    Raises:
        ArtifactError: it could not be written there; the text says where the weights are.
    """
    try:
        with atomic_path(path) as temporary:
            save_weights(network, temporary, metadata=metadata)
    except ArtifactError as error:
        if has_checkpoint:
            raise ArtifactError(
                f"{error} The training is done: with --resume the last checkpoint gives the "
                "student, and no step is taken again."
            ) from error
        try:
            kept = Path(tempfile.mkdtemp(prefix="fastprune-")) / path.name
            save_weights(network, kept, metadata=metadata)
        except OSError:
            raise error from None
        raise ArtifactError(
            f"{error} No checkpoint could be written either, so the trained student was put into "
            f"{kept}. Move it from there."
        ) from error


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """Return the states of torch's generators, of the CPU and of a CUDA device.

    Rows and views need none: they are pure functions of seed and epoch.
    """
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_rng_state(states: dict[str, Tensor], device: torch.device) -> None:
    """Let torch's generators continue from `rng_state`; another kind of device keeps its own."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def _load(path: Path) -> dict[str, Any]:
    """What a checkpoint holds; ValueError where its bytes are not those that were written."""
    data = path.read_bytes()
    match = _NAME.fullmatch(path.name)
    # `_newest_first` lists no other names.
    assert match is not None
    if _digest(data) != match[2]:
        raise ValueError(f"its {len(data):,} bytes have another digest than its name says")
    # From the bytes that were digested, not from the file again. No pickled code runs.
    state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return state


def _digest(data: bytes) -> str:
    """BLAKE2b-64."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()
