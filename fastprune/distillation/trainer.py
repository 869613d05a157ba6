"""From a recipe to a student: open the files, build, train epoch by epoch, write the result."""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from itertools import starmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastprune.base.errors import TrainingError
from fastprune.base.files import write_text
from fastprune.base.ranks import device_of_rank, join_ranks
from fastprune.distillation.checkpoint import (
    Checkpoints,
    hold_run_folder,
    identity,
    require_same_run,
    rng_state,
    save_student,
    set_rng_state,
    student_metadata,
)
from fastprune.distillation.context import Batch, Context
from fastprune.distillation.endings import (
    CHECKPOINT,
    Requests,
    bad_loss_error,
    naming_memory,
    stopped,
)
from fastprune.distillation.evaluation import Evaluation, evaluate
from fastprune.distillation.infobatch import InfoBatch
from fastprune.distillation.loaders import (
    classes_of_run,
    data_seed,
    open_loaders,
    open_train_loader,
)
from fastprune.distillation.meters import LossMeter, PhaseTimer, ProgressMeter, StepLosses
from fastprune.distillation.progressive_resizing import GrowingLoader, training_sizes
from fastprune.distillation.result import Result, make_result
from fastprune.distillation.runlog import RunLog
from fastprune.distillation.schedule import learning_rate, num_passes
from fastprune.distillation.step import Stepper, make_pair, share_buffers
from fastprune.distillation.teacher import make_teacher
from fastprune.loading.batch import choose_device
from fastprune.loading.loader import Loader
from fastprune.settings import Recipe, load_recipe

logger = logging.getLogger(__name__)


def distill(recipe: Recipe | str | Path, *, resume: bool = False) -> Result:
    """Train a student by a recipe, and write the run's folder.

    The folder gets recipe.json (as resolved), metrics.jsonl, TensorBoard events, checkpoints while
    the run lasts, student.safetensors and, last, result.json. Under torchrun, or with a process
    group of the caller's, the processes train together and the first one writes.

    Args:
        recipe: settings, or the TOML file that holds them.
        resume: continue from the newest checkpoint in the folder, if there is one; on the CPU the
            weights at the end equal the weights of an uninterrupted run, to the bit.

    Returns:
        Cost and accuracy, as in result.json; the same on every process.

    Raises:
        RecipeError: a setting does not fit the data or the run to resume, or the folder holds a
            finished run, or an unfinished one without `resume`.
        ArtifactMismatch: subset, train and val beton or the teacher do not belong together.
        ArtifactError: another process is writing into the folder, or it cannot be written.
        TrainingError: the loss is not finite, or the memory is exhausted.
        TrainingStopped: SIGTERM or SIGINT came; the run can be resumed.
        PeerError: another process of the run failed first.
    """
    # First of all: start-up counts.
    began = time.perf_counter()
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    device = device_of_rank(choose_device(recipe.run.device))
    memory = naming_memory(
        batch_size=recipe.data.batch_size, image_size=recipe.data.image_size, device=device
    )
    # Events, streams and libraries use the current device where none is named.
    current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with current, join_ranks(device) as ranks, memory:
        context = Context(recipe, ranks, device, PhaseTimer(device, began=began))
        # Loaders before the folder, so that a run that cannot begin leaves no folder behind.
        train_loader, val_loader = open_loaders(context)
        with hold_run_folder(recipe.run.out, resume=resume) if ranks.is_first else nullcontext():
            trainer = Trainer(context, train_loader, val_loader)
            if resume:
                trainer.resume()
            trainer.train()
            return trainer.close()


class Trainer:
    """A run from its opened loaders to its result.

    Every process of a run has one. The first writes the log and the checkpoints; all of them
    validate, each on its share of the rows.

    Attributes:
        steps: optimizer steps done.
        epochs_done: complete passes.
        evaluations: one per validation.
        curve: one dict per validation: epoch, train_seconds so far, top1, val_loss.
    """

    def __init__(self, context: Context, train_loader: Loader, val_loader: Loader | None) -> None:
        """Build everything, and warm up: compilation and other work that happens once."""
        recipe, ranks = context.recipe, context.ranks
        self._context, self._recipe, self._ranks, self._timer = (
            context,
            recipe,
            ranks,
            context.timer,
        )
        self._folder = recipe.run.out
        self._train_loader, self._val_loader = train_loader, val_loader
        # With pruning the loader's rows change from epoch to epoch; these stay.
        self._rows = train_loader.rows
        # The student's weights are drawn first and on the CPU, so they depend on the seed alone.
        torch.manual_seed(recipe.run.seed)
        self._num_classes, teacher_classes = classes_of_run(recipe, train_loader)
        learner, objective = make_pair(
            context,
            num_classes=self._num_classes,
            teacher_classes=teacher_classes,
            keep_ratio=len(self._rows) / train_loader.beton.num_rows,
        )
        # Before `make_teacher`, which takes the teacher out of the objective.
        self._identity = identity(
            recipe, train_loader, val_loader, objective, processes=ranks.world
        )
        for loader in filter(None, (train_loader, val_loader)):
            loader.warm_up()
        # Rows of one step of all processes; rows that do not fill a step are left out of an epoch.
        stride = train_loader.batch_size * ranks.world
        self._epochs = num_passes(
            recipe.schedule,
            steps_of_pass=len(train_loader),
            steps_of_all=train_loader.beton.num_rows // stride,
        )
        sizes = training_sizes(recipe.data)
        self._teacher = make_teacher(
            context,
            objective,
            train_loader,
            num_classes=teacher_classes,
            epochs=self._epochs,
            sizes=sizes,
        )
        self._batches: Loader | GrowingLoader = (
            train_loader
            if len(sizes) == 1
            else GrowingLoader(self._loader_of_size, sizes, epochs=self._epochs)
        )
        self._pruning = self._make_pruning(min_rows=stride)
        self._stepper = Stepper(context, learner, objective, self._teacher, self._pruning)
        self._stepper.warm_up(
            num_classes=self._num_classes, teacher_classes=teacher_classes, image_sizes=sizes
        )
        # The seconds of warm-up steps are mostly compilation.
        self._timer.forget_parts()
        # Processes see different rows and draw different numbers (dropout).
        torch.manual_seed(recipe.run.seed + ranks.rank)
        self._checkpoints = Checkpoints(
            self._folder / "checkpoints", keep=recipe.run.keep_checkpoints
        )
        self._losses = LossMeter(ranks)
        self._progress = ProgressMeter(self._timer, self._losses, ranks, epochs=self._epochs)
        self._requests = Requests(recipe.run, ranks)
        self._log: RunLog | None = None
        self._log_bytes = 0
        self._learning_rate = 0.0
        self._is_saved = True
        self.steps = 0
        self.epochs_done = 0
        self.evaluations: list[Evaluation] = []
        self.curve: list[dict[str, float]] = []

    def _loader_of_size(self, size: int) -> Loader:
        """Open a loader of training images of a size, and warm it up."""
        if size == self._recipe.data.image_size:
            return self._train_loader
        loader = open_train_loader(self._context, size)
        loader.warm_up()
        return loader

    def _make_pruning(self, *, min_rows: int) -> InfoBatch | None:
        """Make the rule that chooses the rows of each pass; None if the recipe has none."""
        if self._recipe.pruning is None:
            return None
        return InfoBatch(
            self._recipe.pruning,
            self._rows,
            epochs=self._epochs,
            seed=data_seed(self._recipe),
            min_rows=min_rows,
            device=self._context.device,
            ranks=self._ranks,
        )

    def resume(self) -> None:
        """Continue from the newest checkpoint in the folder, if there is one."""
        # A tuple, since `from_first` sends anything but None.
        newest = (self._checkpoints.newest(),) if self._ranks.is_first else None
        (state,) = self._ranks.from_first(newest)
        if state is not None:
            require_same_run(state["identity"], self._identity, folder=self._folder)
            self.load_state_dict(state)

    def train(self) -> None:
        """Train until the last pass is done and validated."""
        if self._ranks.is_first:
            write_text(self._folder / "recipe.json", self._recipe.model_dump_json(indent=2) + "\n")
            # Lines that an interrupted run logged after its checkpoint are cut off.
            self._log = RunLog(self._folder, num_bytes=self._log_bytes, step=self.steps)
        # Signals are caught within the log, so that it is closed in any case.
        with self._log or nullcontext(), self._requests, self._teacher:
            # A resumed run may have been stopped in the validation of its last epoch.
            self._validate_where_due()
            while self.epochs_done < self._epochs:
                first = self._begin_epoch(self.epochs_done)
                self._take_steps(self.epochs_done, first)
                self._end_epoch()
                self._validate_where_due()

    def _begin_epoch(self, epoch: int) -> int:
        """Prepare teacher, loader and rows; returns the first batch that is left of the epoch."""
        self._stepper.begin_epoch(epoch)
        self._teacher.begin_epoch(self._train_loader.slot_of(epoch))
        # A larger image size has a loader of its own, which is opened here.
        with self._timer.phase("startup"):
            self._batches.set_epoch(epoch)
        # Zero except in the epoch in which a resumed run stopped.
        first: int = self._batches.state_dict()["batches"]
        if self._pruning is not None:
            rows = self._pruning.begin_epoch(epoch)
            self._batches.set_rows(rows)
            # The selection of a resumed epoch is in the log already.
            if self._log is not None and first == 0:
                self._log.write(step=self.steps, epoch=epoch, rows=len(rows))
        return first

    def _take_steps(self, epoch: int, first: int) -> None:
        """Take a step for each batch that is left of the epoch; log and save where that is due."""
        # A pruned epoch is shorter than others.
        num_batches = len(self._batches)
        batches = self._progress.over(self._batches, epoch=epoch, first=first)
        self._timer.switch("train")
        for index, batch in enumerate(map(self._teacher.look_up, starmap(Batch, batches)), first):
            # By epochs and not by steps, since pruned epochs differ in length.
            progress = (epoch + index / num_batches) / self._epochs
            self._learning_rate = learning_rate(self._recipe.schedule, progress)
            self.steps += 1
            losses = self._stepper.update(batch, step=self.steps, learning_rate=self._learning_rate)
            self._timer.steps.lap(batch.kind)
            # No `.item()` here: the host would wait for the device at each step.
            self._losses.add(StepLosses(self.steps, epoch, index, losses, batch.rows))
            if self.steps % self._recipe.run.log_every == 0:
                self._write_losses()
            request = self._requests.ask(self.steps, is_last=index + 1 == num_batches)
            if request:
                self._save()
            if request > CHECKPOINT:
                raise stopped(request, step=self.steps, is_saved=self._is_saved)

    def _end_epoch(self) -> None:
        """Log the rest of the losses, and write the epoch's checkpoint."""
        # An epoch's last line precedes its validation's, regardless of log_every.
        self._write_losses()
        if self._pruning is not None:
            self._pruning.end_epoch()
        self.epochs_done += 1
        self._save(is_epoch_done=True)

    def _write_losses(self) -> None:
        """Log the mean loss since the last line."""
        self._examine_losses()
        if not self._losses.means:
            return
        # On every process, though only the first logs: all of them start the next line empty.
        mean = self._losses.pop_mean()
        if self._log is not None:
            self._log.write(
                step=self.steps,
                epoch=self.epochs_done,
                loss=mean,
                learning_rate=self._learning_rate,
            )

    def _examine_losses(self) -> None:
        """Bring losses and seconds to the host; refuse a loss that is not finite."""
        bad = self._losses.fetch()
        self._timer.read()
        if bad is not None:
            # If the cache refused logits, they are the cause, and this raises an error about them.
            self._teacher.flush()
            # Views are pure functions of epoch and row, so the loader can repeat the batch.
            position = {"epoch": bad.epoch, "batches": bad.batch}
            self._batches.load_state_dict(self._batches.state_dict() | position)
            raise bad_loss_error(self._context, bad, Batch(*next(iter(self._batches))))

    def _save(self, *, is_epoch_done: bool = False) -> None:
        """Write a checkpoint: the one place that does."""
        # Losses first: a checkpoint of a run that went wrong would push out the good ones.
        self._examine_losses()
        with self._timer.phase("checkpoint"):
            # Before the checkpoint, after which these steps are not taken again.
            self._teacher.flush(is_epoch_done=is_epoch_done)
            state = self.state_dict()
            is_saved = None
            if self._ranks.is_first:
                is_saved = self._checkpoints.save(state, step=self.steps)
            # Processes wait for it: a launcher may end the others as soon as one ends.
            self._is_saved = self._ranks.from_first(is_saved)
        self._requests.note_checkpoint()

    def _validate_where_due(self) -> None:
        """Evaluate the student after the last pass, and after each that the recipe names."""
        epoch = self.epochs_done
        is_named = epoch == self._epochs or epoch % self._recipe.run.validate_every == 0
        is_validated = bool(self.curve) and self.curve[-1]["epoch"] == epoch
        if self._val_loader is None or epoch == 0 or is_validated or not is_named:
            return
        train_seconds = self._timer.seconds["train"]
        with self._timer.phase("validation"), self._context.autocast():
            # Otherwise each process would validate with the running statistics of its own rows.
            share_buffers(self._stepper.student, self._ranks)
            batches = self._until_signal(self._val_loader)
            evaluation = evaluate(self._stepper.student, batches, ranks=self._ranks)
        if not math.isfinite(evaluation.loss):
            # The last step can ruin the weights; its own loss came from the weights before it.
            rate = self._recipe.schedule.learning_rate
            raise TrainingError(
                f"the loss became {evaluation.loss} in the validation after step {self.steps}. "
                f"Lower schedule.learning_rate ({rate}) or set schedule.clip_norm, and start over."
            )
        self.evaluations.append(evaluation)
        point = {"top1": evaluation.top1, "val_loss": evaluation.loss}
        self.curve.append({"epoch": epoch, "train_seconds": train_seconds, **point})
        if self._log is not None:
            self._log.write(step=self.steps, epoch=epoch, **point)
            logger.info(
                "epoch %d/%d: top-1 %.1f%%, %.0f s of training",
                epoch,
                self._epochs,
                100 * evaluation.top1,
                train_seconds,
            )

    def _until_signal(self, batches: Loader) -> Iterator[tuple[Tensor, ...]]:
        """Yield the batches of a validation; a signal ends it, since a checkpoint precedes it.

        Several processes could not agree here; they react after the next step.
        """
        for batch in batches:
            number = self._requests.signals.number
            if number and self._ranks.world == 1:
                raise stopped(number, step=self.steps, is_saved=self._is_saved)
            yield batch

    def close(self) -> Result:
        """Write the student and, after it, the result, which is returned; remove checkpoints."""
        # On CUDA this waits for the device, so that the time of training is complete.
        self._timer.switch("closing")
        student = self._folder / "student.safetensors"
        if self._ranks.is_first:
            metadata = student_metadata(
                self._recipe,
                self._train_loader,
                self._context.precision,
                num_classes=self._num_classes,
            )
            save_student(
                self._stepper.student, student, metadata=metadata, has_checkpoint=self._is_saved
            )
        self._timer.switch("closing")
        result = make_result(
            self._context,
            self._train_loader,
            self._teacher,
            rows=len(self._rows),
            epochs=self._epochs,
            steps=self.steps,
            evaluations=self.evaluations,
            curve=self.curve,
            student=student,
        )
        if self._ranks.is_first:
            # Last: a folder with result.json has its student.
            result.save(self._folder)
            self._checkpoints.remove()
        return result

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the rest of the run depends on; a collective."""
        return {
            "identity": self._identity,
            "steps": self.steps,
            "epochs_done": self.epochs_done,
            "learning_rate": self._learning_rate,
            "evaluations": [asdict(evaluation) for evaluation in self.evaluations],
            "curve": self.curve,
            "means": self._losses.means,
            "log_bytes": self._log.num_bytes if self._log is not None else 0,
            "timer": self._timer.state_dict(),
            "loader": self._batches.state_dict(),
            "stepper": self._stepper.state_dict(),
            "rng": self._ranks.all_gather(rng_state(self._context.device)),
            "pruning": self._pruning.state_dict() if self._pruning is not None else None,
            "teacher": self._teacher.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore from `state_dict`."""
        self.steps, self.epochs_done = state["steps"], state["epochs_done"]
        self._learning_rate = state["learning_rate"]
        self.evaluations = [Evaluation(**fields) for fields in state["evaluations"]]
        self.curve = state["curve"]
        self._losses.means = state["means"]
        self._log_bytes = state["log_bytes"]
        self._timer.load_state_dict(state["timer"])
        self._batches.load_state_dict(state["loader"])
        self._stepper.load_state_dict(state["stepper"])
        if self._pruning is not None:
            self._pruning.load_state_dict(state["pruning"])
        self._teacher.load_state_dict(state["teacher"])
        set_rng_state(state["rng"][self._ranks.rank], self._context.device)
