"""The training loop: epochs, validations, checkpoints, and what is told of them."""

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from fastprune.distillation.checkpoint import Checkpoints
from fastprune.distillation.clocks import Clocks
from fastprune.distillation.evaluation import Evaluation, evaluate
from fastprune.distillation.faults import Signals, stopped
from fastprune.distillation.generators import generator_states, set_generator_states
from fastprune.distillation.growth import GrowingLoader
from fastprune.distillation.infobatch import InfoBatch
from fastprune.distillation.interval import Interval
from fastprune.distillation.runlog import RunLog
from fastprune.distillation.schedule import learning_rate
from fastprune.distillation.step import Stepper, share_buffers
from fastprune.distillation.watching import Watch
from fastprune.distributed import Agreement, Ranks
from fastprune.errors import TrainingError
from fastprune.loading.loader import Loader
from fastprune.recipe import Recipe

logger = logging.getLogger(__name__)

_CHECKPOINT = 1  # below the number of any signal that is noticed


class TrainingLoop:
    """A student on its way through the passes of a recipe.

    Every process of a run has one. The first writes the log and the checkpoints; all of them
    validate, each on its share of the rows.

    Attributes:
        steps: optimiser steps done.
        epochs_done: passes that are complete.
        evaluations: one per validation.
        curve: one dict per validation: epoch, train_seconds so far, top1, val_loss.
    """

    def __init__(
        self,
        recipe: Recipe,
        stepper: Stepper,
        *,
        epochs: int,
        train_loader: Loader | GrowingLoader,
        val_loader: Loader,
        interval: Interval,
        pruning: InfoBatch | None,
        checkpoints: Checkpoints,
        identity: dict[str, Any],
        ranks: Ranks,
        device: torch.device,
        clocks: Clocks,
    ) -> None:
        """Begin before the first step.

        Args:
            recipe: schedule and intervals.
            stepper: takes the steps.
            epochs: passes over the rows.
            train_loader: yields (images, labels, rows).
            val_loader: yields (images, labels), this process's share.
            interval: examines the losses.
            pruning: chooses the rows of each pass, and weighs them in the stepper; None for all.
            checkpoints: where the first process saves.
            identity: of the run, kept in its checkpoints.
            ranks: the processes that train together.
            device: of this process.
            clocks: told what the run does.
        """
        self.steps = 0
        self.epochs_done = 0
        self.evaluations: list[Evaluation] = []
        self.curve: list[dict[str, float]] = []
        self._recipe = recipe
        self._stepper = stepper
        self._epochs = epochs
        self._train_loader = train_loader
        self._val_loader = val_loader
        self._interval = interval
        self._pruning = pruning
        self._checkpoints = checkpoints
        self._identity = identity
        self._ranks = ranks
        self._device = device
        self._clocks = clocks
        self._watch = Watch(epochs=epochs, ranks=ranks, clocks=clocks)
        self._agreement = Agreement(ranks)
        self._log: RunLog | None = None
        self._signals = Signals()
        self._learning_rate = 0.0
        self._is_saved = True
        self._saved_at = time.monotonic()

    def run(self, log: RunLog | None) -> None:
        """Train until the last pass is done and validated.

        Args:
            log: receives the metrics; the first process alone has one.

        Raises:
            TrainingError: the loss, in training or validation, is no longer a finite number.
            TrainingStopped: a signal came, and a checkpoint is written.
        """
        self._log = log
        self._saved_at = time.monotonic()
        with self._signals:
            self._validate_where_due()
            while self.epochs_done < self._epochs:
                self._train_epoch(self.epochs_done)
                self._validate_where_due()
        self._agreement.close()

    def _train_epoch(self, epoch: int) -> None:
        """The batches of a pass that are left, and a checkpoint behind them."""
        self._stepper.begin_epoch(epoch)
        # A larger size has a loader of its own, which is opened here.
        with self._clocks.phase("startup"):
            self._train_loader.set_epoch(epoch)
        first = self._train_loader.state_dict()["batches"]
        self._prune(epoch, is_new=first == 0)
        num_batches = len(self._train_loader)
        batches = self._watch.over(self._train_loader, epoch=epoch, first=first)
        self._clocks.switch("train")
        for index, (images, labels, rows) in enumerate(batches, first):
            progress = (epoch + index / num_batches) / self._epochs
            self._learning_rate = learning_rate(self._recipe.schedule, progress)
            self.steps += 1
            losses = self._stepper.update(
                images, labels, rows, step=self.steps, learning_rate=self._learning_rate
            )
            self._interval.add(step=self.steps, epoch=epoch, batch=index, losses=losses, rows=rows)
            if self.steps % self._recipe.run.log_every == 0:
                self._write_losses()
            is_last = index + 1 == num_batches
            self._heed(self._agreement.ask(self._request(is_last)), is_last)
        self._write_losses()
        if self._pruning is not None:
            self._pruning.end_epoch()
        self.epochs_done += 1
        self._save()

    def _prune(self, epoch: int, *, is_new: bool) -> None:
        """Choose the rows of a pass; those of a pass that is gone on with are what they were."""
        if self._pruning is None:
            return
        rows = self._pruning.begin_epoch(epoch)
        self._train_loader.set_rows(rows)
        if self._log is not None and is_new:
            self._log.write(step=self.steps, epoch=epoch, rows=len(rows))

    def _write_losses(self) -> None:
        """Write a line with the mean loss since the last one."""
        self._examine()
        if not self._interval.means:
            return
        mean = self._interval.mean()
        if self._log is not None:
            self._log.write(
                step=self.steps,
                epoch=self.epochs_done,
                loss=mean,
                learning_rate=self._learning_rate,
            )

    def _examine(self) -> None:
        """Bring losses and clocks to the host."""
        self._interval.fetch()
        self._clocks.read()

    def _request(self, is_last: bool) -> int:
        """What this process asks for: a signal's number, a checkpoint, or nothing."""
        if self._signals.number:
            return self._signals.number
        every, minutes = self._recipe.run.checkpoint_every, self._recipe.run.checkpoint_minutes
        is_due = every is not None and self.steps % every == 0
        # Clocks differ among processes, so the first one's counts.
        is_late = self._ranks.is_first and time.monotonic() - self._saved_at >= 60 * minutes
        # Behind the last batch of a pass there is a checkpoint in any case.
        if is_last or not (is_due or is_late):
            return 0
        # The answer comes a step later; until then nothing more is due.
        self._saved_at = time.monotonic()
        return _CHECKPOINT

    def _heed(self, request: int, is_last: bool) -> None:
        """Do what was asked for."""
        if not request or (request == _CHECKPOINT and is_last):
            return
        self._save()
        if request != _CHECKPOINT:
            raise stopped(request, step=self.steps, is_saved=self._is_saved)

    def _save(self) -> None:
        """Write a checkpoint."""
        # Losses first: a checkpoint of a run that went wrong would push out the good ones.
        self._examine()
        with self._clocks.phase("checkpoint"):
            generators = self._ranks.all_gather(generator_states(self._device))
            pruning = self._pruning.state_dict() if self._pruning is not None else None
            is_saved = None
            if self._ranks.is_first:
                state = self.state_dict() | {"generators": generators, "pruning": pruning}
                is_saved = self._checkpoints.save(state, step=self.steps)
            # None leaves before it is written: a launcher may end the others when one ends.
            self._is_saved = self._ranks.from_first(is_saved)
        self._saved_at = time.monotonic()

    def _validate_where_due(self) -> None:
        """Evaluate the student after the last pass, and after each that the recipe names."""
        epoch = self.epochs_done
        is_last = epoch == self._epochs
        is_validated = bool(self.curve) and self.curve[-1]["epoch"] == epoch
        if (
            epoch == 0
            or is_validated
            or not (is_last or epoch % self._recipe.run.validate_every == 0)
        ):
            return
        train_seconds = self._clocks.seconds["train"]
        with self._clocks.phase("validation"), self._stepper.autocast():
            share_buffers(self._stepper.student, self._ranks)
            batches = self._until_signal(self._val_loader)
            evaluation = evaluate(self._stepper.student, batches, ranks=self._ranks)
        self._require_finite(evaluation)
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

    def _require_finite(self, evaluation: Evaluation) -> None:
        """Refuse weights that went wrong in the last step, whose loss is of the step before."""
        if not math.isfinite(evaluation.loss):
            rate = self._recipe.schedule.learning_rate
            raise TrainingError(
                f"the loss became {evaluation.loss} in the validation after step {self.steps}. "
                f"Lower schedule.learning_rate ({rate}) or set schedule.clip_norm, and begin anew."
            )

    def _until_signal(self, batches: Loader) -> Iterator[tuple[Tensor, ...]]:
        """Batches of a validation, which a signal ends at once: a checkpoint stands before it.

        Several processes could not agree in here; they heed it after the next step.
        """
        for batch in batches:
            if self._signals.number and self._ranks.world == 1:
                raise stopped(self._signals.number, step=self.steps, is_saved=self._is_saved)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """What the rest of the run depends on, but for what all processes must be asked for."""
        return {
            "identity": self._identity,
            "steps": self.steps,
            "epochs_done": self.epochs_done,
            "learning_rate": self._learning_rate,
            "evaluations": [asdict(evaluation) for evaluation in self.evaluations],
            "curve": self.curve,
            "means": self._interval.means,
            "log_bytes": self._log.num_bytes if self._log is not None else 0,
            "clocks": self._clocks.state_dict(),
            "loader": self._train_loader.state_dict(),
            "stepper": self._stepper.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the run was that wrote a checkpoint.

        Args:
            state: what `state_dict` returned, the generators of all processes, and the losses that
                they prune by.
        """
        self.steps, self.epochs_done = state["steps"], state["epochs_done"]
        self._learning_rate = state["learning_rate"]
        self.evaluations = [Evaluation(**fields) for fields in state["evaluations"]]
        self.curve = state["curve"]
        self._interval.means = state["means"]
        self._clocks.load_state_dict(state["clocks"])
        self._train_loader.load_state_dict(state["loader"])
        self._stepper.load_state_dict(state["stepper"])
        if self._pruning is not None:
            self._pruning.load_state_dict(state["pruning"])
        set_generator_states(state["generators"][self._ranks.rank], self._device)
