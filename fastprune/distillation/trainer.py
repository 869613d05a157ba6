"""From a recipe to a student: opens what the recipe names, trains, writes the run's folder."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from fastprune.artifacts.atomic import atomic_path, exclusive, write_text
from fastprune.artifacts.subset import Subset
from fastprune.distillation.checkpoint import Checkpoints
from fastprune.distillation.clocks import Clocks
from fastprune.distillation.faults import naming_memory
from fastprune.distillation.infobatch import InfoBatch
from fastprune.distillation.interval import Interval
from fastprune.distillation.loop import TrainingLoop
from fastprune.distillation.opening import (
    identity,
    make_batches,
    open_loaders,
    require_same_run,
    student_metadata,
    training_sizes,
)
from fastprune.distillation.pair import make_pair
from fastprune.distillation.result import Result
from fastprune.distillation.runlog import RunLog
from fastprune.distillation.schedule import num_passes
from fastprune.distillation.step import Stepper
from fastprune.distributed import Ranks, device_of_rank, join_ranks
from fastprune.errors import RecipeError
from fastprune.loading.device import choose_device
from fastprune.loading.loader import Loader
from fastprune.networks import save_weights
from fastprune.recipe import Recipe, load_recipe


def distill(recipe: Recipe | str | Path, *, resume: bool = False) -> Result:
    """Train a student as a recipe says, and write the run's folder.

    The folder gets recipe.json (as resolved), metrics.jsonl, TensorBoard events, checkpoints while
    the run lasts, student.safetensors and, last, result.json. Under torchrun, or with a process
    group of the caller's, the processes train together and the first one writes.

    Args:
        recipe: settings, or the TOML file that holds them.
        resume: go on from the newest checkpoint in the folder, if there is one; on the CPU the
            weights at the end are those of a run that was never interrupted, to the bit.

    Returns:
        What the run cost and what it reached; the same as in result.json. Every process has it.

    Raises:
        RecipeError: a setting does not fit the data or the run to go on with, or the folder holds
            a finished run, or an unfinished one without `resume`.
        ArtifactMismatch: subset, train and val beton or the teacher do not belong together.
        ArtifactError: another process is at work in the folder, or it cannot be written.
        TrainingError: the loss is no longer a finite number, or the memory is used up.
        TrainingStopped: SIGTERM or SIGINT came; the run can be gone on with.
        PeerError: another process of the run failed first.
    """
    began = time.perf_counter()
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    device = device_of_rank(choose_device(recipe.run.device))
    memory = naming_memory(
        batch_size=recipe.data.batch_size, image_size=recipe.data.image_size, device=device
    )
    # Events, streams and libraries mean the current device where they are told none.
    current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with current, join_ranks(device) as ranks, memory:
        train_loader, val_loader = open_loaders(recipe, device)
        with _run_folder(recipe, resume=resume) if ranks.is_first else nullcontext():
            clocks = Clocks(device, began=began)
            run = _Run(recipe, train_loader, val_loader, ranks=ranks, device=device, clocks=clocks)
            return run.finish(resume=resume)


class _Run:
    """A run between its opening and its result."""

    def __init__(
        self,
        recipe: Recipe,
        train_loader: Loader,
        val_loader: Loader,
        *,
        ranks: Ranks,
        device: torch.device,
        clocks: Clocks,
    ) -> None:
        """Build what trains, and do once what happens once."""
        self._recipe, self._ranks, self._clocks = recipe, ranks, clocks
        self._folder = recipe.run.out
        self._train_loader = train_loader
        # The student's weights depend on the seed alone, whatever was built before.
        torch.manual_seed(recipe.run.seed)
        learner, objective = make_pair(
            recipe,
            num_classes=train_loader.num_classes,
            keep_ratio=len(train_loader.rows) / train_loader.beton.num_rows,
            device=device,
        )
        self._identity = identity(
            recipe, train_loader, val_loader, objective, processes=ranks.world
        )
        train_loader.warm_up()
        val_loader.warm_up()
        self._epochs = self._num_passes()
        self._rows = train_loader.rows
        self._batches = make_batches(recipe, train_loader, epochs=self._epochs, device=device)
        pruning = self._pruning(device)
        self._stepper = Stepper(
            recipe, learner, objective, pruning, ranks=ranks, device=device, clocks=clocks
        )
        self._stepper.rehearse(
            num_classes=train_loader.num_classes, image_sizes=training_sizes(recipe)
        )
        clocks.forget_parts()
        # Processes differ, as in the rows that they see.
        torch.manual_seed(recipe.run.seed + ranks.rank)
        self._checkpoints = Checkpoints(
            self._folder / "checkpoints", keep=recipe.run.keep_checkpoints
        )
        self._loop = TrainingLoop(
            recipe,
            self._stepper,
            epochs=self._epochs,
            train_loader=self._batches,
            val_loader=val_loader,
            interval=self._interval(),
            pruning=pruning,
            checkpoints=self._checkpoints,
            identity=self._identity,
            ranks=ranks,
            device=device,
            clocks=clocks,
        )

    def finish(self, *, resume: bool) -> Result:
        """Train, save the student, and tell what it cost."""
        state = self._resumed() if resume else None
        kept = state or {"log_bytes": 0, "steps": 0}
        del state
        if self._ranks.is_first:
            text = self._recipe.model_dump_json(indent=2)
            write_text(self._folder / "recipe.json", text + "\n")
        with (
            RunLog(self._folder, num_bytes=kept["log_bytes"], step=kept["steps"])
            if self._ranks.is_first
            else nullcontext()
        ) as log:
            self._loop.run(log)
        self._clocks.switch("closing")
        student = self._folder / "student.safetensors"
        if self._ranks.is_first:
            with atomic_path(student) as temporary:
                metadata = student_metadata(self._recipe, self._train_loader)
                save_weights(self._stepper.student, temporary, metadata=metadata)
        self._clocks.switch("closing")
        result = self._result(student)
        if self._ranks.is_first:
            result.save(self._folder)
            self._checkpoints.remove()
        return result

    def _resumed(self) -> dict[str, Any] | None:
        """The checkpoint that the run goes on from; None where it begins."""
        newest = (self._checkpoints.newest(),) if self._ranks.is_first else None
        (state,) = self._ranks.from_first(newest)
        if state is not None:
            require_same_run(state["identity"], self._identity, folder=str(self._folder))
            self._loop.load_state_dict(state)
        return state

    def _num_passes(self) -> int:
        """How often the rows are seen."""
        loader = self._train_loader
        stride = loader.batch_size * self._ranks.world
        return num_passes(
            self._recipe.schedule,
            steps_of_pass=len(loader),
            steps_of_all=loader.beton.num_rows // stride,
        )

    def _pruning(self, device: torch.device) -> InfoBatch | None:
        """What chooses the rows of each pass, where the recipe asks for it."""
        if self._recipe.pruning is None:
            return None
        return InfoBatch(
            self._recipe.pruning,
            self._rows,
            epochs=self._epochs,
            seed=self._recipe.run.seed,
            min_rows=self._train_loader.batch_size * self._ranks.world,
            device=device,
            ranks=self._ranks,
        )

    def _interval(self) -> Interval:
        """What examines the losses."""
        return Interval(
            folder=self._folder,
            ranks=self._ranks,
            batch_again=self._batch_again,
            cure=f"Lower schedule.learning_rate ({self._recipe.schedule.learning_rate}) or set "
            "schedule.clip_norm, and see whether the images are as expected.",
        )

    def _batch_again(self, epoch: int, batch: int) -> tuple[torch.Tensor, ...]:
        """The batch that was this one of an epoch."""
        loader = self._batches
        loader.load_state_dict(loader.state_dict() | {"epoch": epoch, "batches": batch})
        again: tuple[torch.Tensor, ...] = next(iter(loader))
        return again

    def _result(self, student: Path) -> Result:
        """What the run cost and what it reached."""
        loader, loop, seconds = self._train_loader, self._loop, self._clocks.seconds
        subset = Subset.load(self._recipe.data.subset) if self._recipe.data.subset else None
        asked = subset.keep_ratio if subset else None
        return Result(
            name=self._recipe.run.name or self._folder.resolve().name,
            seed=self._recipe.run.seed,
            rows=len(self._rows),
            keep_ratio=asked or len(self._rows) / loader.beton.num_rows,
            metric=subset.metric if subset else None,
            strategy=subset.strategy if subset else None,
            images_per_epoch=loop.steps * loader.batch_size * self._ranks.world // self._epochs,
            epochs=self._epochs,
            steps=loop.steps,
            batch_size=loader.batch_size * self._ranks.world,
            processes=self._ranks.world,
            backend=loader.backend,
            device=loader.device.type,
            startup_seconds=seconds["startup"],
            train_seconds=seconds["train"],
            wait_seconds=seconds["wait"],
            teacher_seconds=seconds["teacher"],
            student_seconds=seconds["student"],
            optimizer_seconds=seconds["optimizer"],
            validation_seconds=seconds["validation"],
            checkpoint_seconds=seconds["checkpoint"],
            total_seconds=self._clocks.total,
            data_wait_share=seconds["wait"] / seconds["train"],
            top1_last=loop.evaluations[-1].top1,
            top1_best=max(evaluation.top1 for evaluation in loop.evaluations),
            top5_last=loop.evaluations[-1].top5,
            curve=loop.curve,
            student=student,
        )


@contextmanager
def _run_folder(recipe: Recipe, *, resume: bool) -> Iterator[None]:
    """Make the run's folder where it is missing, and hold it against other processes."""
    folder = recipe.run.out
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"run.out = {str(folder)!r} cannot be made: {error.strerror}.") from error
    with exclusive(folder / ".lock"):
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
