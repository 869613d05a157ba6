"""Checkpoints: the run's folder, the identity of a run, what is written and what is read back."""

import hashlib
import io
import json
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
from fastprune.base.provenance import differences
from fastprune.distillation.objective import Objective
from fastprune.loading.loader import Loader
from fastprune.networks import save_weights, weights_digest
from fastprune.settings import Recipe

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{9})-([0-9a-f]{16})\.pt")
# What may change between two parts of a run. Files may lie elsewhere: their contents are compared.
_FREE = {
    "data": {
        "train",
        "val",
        "subset",
        "num_workers",
        "backend",
        "service",
        "service_token_file",
    },
    "teacher": {"checkpoint", "cache", "cache_dtype"},
    "student": {"checkpoint"},
    "run": {
        "out",
        "name",
        "device",
        "compile",
        "log_every",
        "validate_every",
        "checkpoint_every",
        "checkpoint_minutes",
        "keep_checkpoints",
    },
}


def identity(
    recipe: Recipe, train: Loader, val: Loader | None, objective: Objective, *, processes: int
) -> dict[str, Any]:
    """Return everything that decides which weights a run ends with, by name."""
    # Through JSON, so that paths and tuples compare as they are stored in a checkpoint.
    settings: dict[str, Any] = json.loads(recipe.model_dump_json(exclude=_FREE))
    # The engine that "auto" chose, and contents in place of file names: they decide the pixels.
    return settings | {
        "data.backend": train.backend,
        "the images of data.train": str(train.beton.fingerprint),
        "the images of data.val": None if val is None else str(val.beton.fingerprint),
        "the rows of data.subset": train.state_dict()["rows_digest"],
        "the weights of the teacher and the class std": weights_digest(objective),
        "teacher.cache": recipe.teacher is not None and recipe.teacher.cache is not None,
        "processes": processes,
    }


def require_same_run(theirs: dict[str, Any], ours: dict[str, Any], *, folder: Path) -> None:
    """Refuse to continue the run in a folder with other settings, by the `identity` of both.

    Raises:
        RecipeError: they differ; each difference is named.
    """
    differing = "; ".join(sorted(map(str, differences(ours, theirs))))
    if differing:
        raise RecipeError(
            f"{folder} holds an unfinished run with other settings: {differing}. Continue it with "
            "its own, or name another folder (run.out)."
        )


class Checkpoints:
    """The newest checkpoints of a run.

    A file is called `step-000001200-9f3c12ab41aa90de.pt`, after the optimizer steps done and the
    BLAKE2b digest of its bytes. It is what `torch.save` writes, read without running pickles.
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        """Use a folder of their own, made with the first; the newest `keep` ones stay."""
        self._folder = folder
        self._keep = keep

    def save(self, state: dict[str, Any], *, step: int) -> bool:
        """Write a checkpoint, then remove the oldest beyond `keep`; returns whether it was written.

        A failed write, as on a full disk, is a warning: the run continues and the older ones stay.

        Args:
            state: tensors and plain values.
            step: optimizer steps done.
        """
        # In memory first: the name holds the digest of the bytes.
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
                "NO CHECKPOINT at step %d: %s Training continues; a resumed run would start "
                "from %s.",
                step,
                error,
                kept[0] if kept else "the beginning",
            )
            return False
        # Only now that the new one is on the disk.
        for old in [old for old in self._newest_first() if old != path][self._keep - 1 :]:
            old.unlink(missing_ok=True)
        return True

    def newest(self) -> dict[str, Any] | None:
        """Read the newest checkpoint that is whole, onto the CPU; None if there is not any.

        Warns:
            DamagedCheckpointWarning: a newer one is damaged.

        Raises:
            ArtifactError: there are some, and all of them are damaged.
        """
        found = self._newest_first()
        for path in found:
            try:
                return _load(path)
            # All that torch.load raises for bytes that it did not write.
            except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
                # Starting over by itself would throw away the run that --resume asked for.
                if path == found[-1]:
                    raise ArtifactError(
                        f"none of the {len(found)} checkpoints in {self._folder} is whole; the "
                        f"oldest, {path.name}, is damaged too ({error}). Remove {self._folder} to "
                        "start over."
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
        """Remove them all: a finished run needs none."""
        for path in self._newest_first():
            path.unlink(missing_ok=True)
        self._sweep()
        if self._folder.is_dir() and not any(self._folder.iterdir()):
            self._folder.rmdir()

    def _sweep(self) -> None:
        """Remove what a kill during a write left behind."""
        # Names of `atomic_path`; the folder is held by this process alone.
        for path in self._folder.glob(".step-*.tmp"):
            path.unlink(missing_ok=True)

    def _newest_first(self) -> list[Path]:
        """List the checkpoints, by name."""
        if not self._folder.is_dir():
            return []
        # A name counts by its pattern, so other people's files stay.
        found = [path for path in self._folder.iterdir() if _NAME.fullmatch(path.name)]
        # The step has nine digits, so names sort as steps do.
        return sorted(found, key=lambda path: path.name, reverse=True)


@contextmanager
def hold_run_folder(folder: Path, *, resume: bool) -> Iterator[None]:
    """Make a run's folder where it is missing, and lock it against other processes.

    With `resume` it may hold an unfinished run.

    Raises:
        RecipeError: it cannot be made, or holds a run that this one would destroy.
        ArtifactError: another process is writing into it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"run.out = {str(folder)!r} cannot be made: {error.strerror}.") from error
    # Released by the kernel if the run is killed.
    with lock(folder / ".lock", wait=False):
        # result.json is written last, so a run without one is unfinished.
        if (folder / "result.json").exists():
            raise RecipeError(
                f"{folder} holds a finished run. Name another folder (run.out) or remove this one."
            )
        if not resume and Checkpoints(folder / "checkpoints", keep=1).exist():
            raise RecipeError(
                f"{folder} holds an unfinished run. Continue it (--resume), name another folder "
                "(run.out), or remove this one."
            )
        yield
        # A folder with a result is refused above, so it needs no lock.
        (folder / ".lock").unlink()


def student_metadata(
    recipe: Recipe, loader: Loader, precision: str, *, num_classes: int
) -> dict[str, str]:
    """Return the header of the student's file: how to build it, feed it, and read its classes."""
    metadata = {
        "network": recipe.student.network,
        "num_classes": str(num_classes),
        "image_size": str(recipe.data.val_image_size or recipe.data.image_size),
        "mean": json.dumps(recipe.data.mean),
        "std": json.dumps(recipe.data.std),
        "precision": precision,
    }
    if recipe.data.labels and loader.class_names is not None:
        metadata["class_names"] = json.dumps(loader.class_names)
    return metadata


def save_student(
    network: nn.Module, path: Path, *, metadata: dict[str, str], has_checkpoint: bool
) -> None:
    """Write the student's weights into the run's folder; a full disk does not lose them.

    Args:
        network: the student.
        path: in the run's folder.
        metadata: texts for the file's header.
        has_checkpoint: whether the newest checkpoint is of this student, so that a resumed run
            can write it. Without one it goes into the system's temporary folder.

    Raises:
        ArtifactError: it could not be written there; the text tells where the weights are.
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
    """Read a checkpoint; ValueError where its bytes do not have the digest in its name."""
    data = path.read_bytes()
    match = _NAME.fullmatch(path.name)
    # `_newest_first` lists no other names.
    assert match is not None
    if _digest(data) != match[2]:
        raise ValueError(f"its {len(data):,} bytes have another digest than the one in its name")
    # From the bytes that were digested, not from the file again. No pickled code runs.
    state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return state


def _digest(data: bytes) -> str:
    """BLAKE2b-64."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()
