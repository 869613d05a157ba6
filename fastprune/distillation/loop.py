"""The training loop: epochs, steps, and the clocks that say where the time went."""

import copy
import logging
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from fastprune.distillation.evaluation import Evaluation, evaluate
from fastprune.distillation.learner import Learner
from fastprune.distillation.objective import Objective
from fastprune.distillation.runlog import RunLog
from fastprune.distillation.schedule import make_optimizer, make_scheduler
from fastprune.errors import TrainingError
from fastprune.loading.loader import Loader
from fastprune.progress import track
from fastprune.recipe import Recipe

logger = logging.getLogger(__name__)


class TrainingLoop:
    """A student on its way through the epochs of a recipe.

    Args:
        recipe: schedule, precision and intervals.
        learner: the student and what learns with it, trained in place.
        objective: what is minimised.
        train_loader: yields (images, labels).
        val_loader: yields (images, labels), every row once.
        device: where the student and the batches are.
        log: receives the metrics.

    Attributes:
        train_seconds: spent in epochs so far, validation apart.
        wait_seconds: the part of train_seconds that was spent waiting for batches.
        validation_seconds: spent in validations so far.
        evaluations: one per validation.
        curve: one dict per validation: epoch, train_seconds so far, top1, val_loss.
    """

    def __init__(
        self,
        recipe: Recipe,
        learner: Learner,
        objective: Objective,
        *,
        train_loader: Loader,
        val_loader: Loader,
        device: torch.device,
        log: RunLog,
    ) -> None:
        self.train_seconds = 0.0
        self.wait_seconds = 0.0
        self.validation_seconds = 0.0
        self.evaluations: list[Evaluation] = []
        self.curve: list[dict[str, float]] = []
        self._recipe = recipe
        self._learner = learner
        self._objective = objective
        self._train_loader = train_loader
        self._val_loader = val_loader
        self._device = device
        self._log = log
        self._step = 0
        self._learning_rate = recipe.schedule.learning_rate
        self._optimizer = make_optimizer(learner, recipe.schedule)
        self._scheduler = make_scheduler(
            self._optimizer, recipe.schedule, steps_per_epoch=len(train_loader)
        )

    def run(self) -> None:
        """Train for all epochs of the recipe.

        Raises:
            TrainingError: the loss is no longer a finite number.
        """
        epochs = self._recipe.schedule.epochs
        for epoch in range(epochs):
            self._train_epoch(epoch)
            if epoch + 1 == epochs or (epoch + 1) % self._recipe.run.validate_every == 0:
                self._validate(epoch)

    def rehearse(self) -> None:
        """Run a step on a copy that is thrown away, so that no clock counts what happens once."""
        data = self._recipe.data
        learner = copy.deepcopy(self._learner).train()
        images = torch.zeros(
            (data.batch_size, 3, data.image_size, data.image_size), device=self._device
        ).to(memory_format=torch.channels_last)
        labels = torch.zeros(data.batch_size, dtype=torch.int64, device=self._device)
        with self._autocast():
            targets = self._objective.teach(images, labels)
            loss = self._objective(learner(images), targets, labels).mean()
        loss.backward()

    def _train_epoch(self, epoch: int) -> None:
        """One pass over the rows; losses stay on the device between two lines of the log."""
        self._learner.train()
        self._train_loader.set_epoch(epoch)
        started = time.perf_counter()
        losses: list[Tensor] = []
        batches = track(
            self._timed_batches(),
            description=f"epoch {epoch + 1}/{self._recipe.schedule.epochs}",
            total=len(self._train_loader) * self._train_loader.batch_size,
            unit="images",
            step=self._train_loader.batch_size,
        )
        for images, labels in batches:
            losses.append(self._update(images, labels))
            self._step += 1
            if self._step % self._recipe.run.log_every == 0:
                self._log_losses(epoch, losses)
        self._log_losses(epoch, losses)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.train_seconds += time.perf_counter() - started

    def _timed_batches(self) -> Iterator[tuple[Tensor, ...]]:
        """The batches of an epoch; the time until each arrives is waiting time."""
        asked = time.perf_counter()
        for batch in self._train_loader:
            self.wait_seconds += time.perf_counter() - asked
            yield batch
            asked = time.perf_counter()
        self.wait_seconds += time.perf_counter() - asked

    def _update(self, images: Tensor, labels: Tensor) -> Tensor:
        """One optimiser step; returns the loss, still on the device."""
        with self._autocast():
            targets = self._objective.teach(images, labels)
            rows: Tensor = self._objective(self._learner(images), targets, labels)
            loss = rows.mean()
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()
        self._learning_rate = float(self._scheduler.get_last_lr()[0])
        self._scheduler.step()
        return loss.detach()

    def _log_losses(self, epoch: int, losses: list[Tensor]) -> None:
        """Write the mean of the losses since the last line, and forget them."""
        if not losses:
            return
        mean = float(torch.stack(losses).mean())
        losses.clear()
        if not math.isfinite(mean):
            rate = self._recipe.schedule.learning_rate
            raise TrainingError(
                f"the loss became {mean} by step {self._step} (epoch {epoch + 1}). Lower "
                f"schedule.learning_rate ({rate}), and look whether the images are as expected."
            )
        self._log.write(step=self._step, epoch=epoch, loss=mean, learning_rate=self._learning_rate)

    def _validate(self, epoch: int) -> None:
        """Evaluate the student and add a point to the curve."""
        started = time.perf_counter()
        with self._autocast():
            evaluation = evaluate(self._learner.student, self._val_loader)
        self.validation_seconds += time.perf_counter() - started
        self.evaluations.append(evaluation)
        point = {"top1": evaluation.top1, "val_loss": evaluation.loss}
        self.curve.append({"epoch": epoch + 1, "train_seconds": self.train_seconds, **point})
        self._log.write(step=self._step, epoch=epoch + 1, **point)
        logger.info(
            "epoch %d/%d: top-1 %.1f%%, %.0f s of training",
            epoch + 1,
            self._recipe.schedule.epochs,
            100 * evaluation.top1,
            self.train_seconds,
        )

    def _autocast(self) -> AbstractContextManager[None]:
        """bf16 where the recipe asks for it and CUDA has it; else plain float32."""
        precision = self._recipe.run.precision
        enabled = self._device.type == "cuda" and (
            precision == "bf16" or (precision == "auto" and torch.cuda.is_bf16_supported())
        )
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=enabled)
