"""One optimizer step: the teacher, the student there and back, the optimizer."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from fastprune.base.errors import ArtifactMismatch, InvalidValueError, RecipeError
from fastprune.base.ranks import Ranks
from fastprune.distillation.context import Batch, Context
from fastprune.distillation.infobatch import InfoBatch
from fastprune.distillation.learner import Learner, Outputs, require_logits
from fastprune.distillation.losses import LogitReshaper
from fastprune.distillation.objective import Objective
from fastprune.distillation.schedule import WeightAverage, make_optimizer
from fastprune.distillation.teacher import Teacher
from fastprune.networks import FeatureNetwork, build_network, load_weights
from fastprune.rows.subset import Subset
from fastprune.settings import NetworkSettings, Recipe


def make_pair(
    context: Context, *, num_classes: int, keep_ratio: float, teacher_classes: int | None = None
) -> tuple[Learner, Objective]:
    """Build the networks and the loss of a recipe.

    The student's weights depend on torch's generator alone: nothing is drawn before them.

    Args:
        context: of the run.
        num_classes: C of the student; 0 if it gives features alone.
        keep_ratio: share of the beton's rows that is trained on.
        teacher_classes: C of the teacher; None for the student's.

    Raises:
        RecipeError: the loss needs class std that the subset lacks, or features that a network
            lacks.
        ArtifactMismatch: the class std are of other classes.
        ArtifactError: a checkpoint cannot be read or does not fit its network.
    """
    recipe = context.recipe
    # Without a feature loss any classifier will do, even one whose features cannot be hooked.
    takes_features = recipe.loss.feature_weight > 0
    # First, so that no other network's random weights come before the student's.
    student, teacher = _build(recipe.student, num_classes), None
    with _explaining_missing_features(recipe):
        if recipe.teacher is not None:
            teacher_classes = num_classes if teacher_classes is None else teacher_classes
            network = _build(recipe.teacher, teacher_classes)
            teacher = FeatureNetwork(
                network, num_classes=teacher_classes, takes_features=takes_features
            )
        if takes_features:
            assert teacher is not None, "the recipe is validated"
            learner = Learner.with_projectors(
                student,
                teacher,
                num_classes=num_classes,
                image_size=recipe.data.image_size,
                projectors=recipe.loss.projectors,
            )
        else:
            learner = Learner(
                FeatureNetwork(student, num_classes=num_classes, takes_features=False)
            )
    class_std = _read_class_std(recipe, num_classes)
    reshaper = None if class_std is None else LogitReshaper(class_std)
    objective = Objective(recipe.loss, teacher, reshaper, keep_ratio=keep_ratio)
    # Beside a cache the teacher stays on the CPU until its logits are missing.
    is_cached = recipe.teacher is not None and recipe.teacher.cache is not None
    objective.teacher = None if is_cached else teacher
    # Modules move in place; the optimizer is made later, of what lies on the device.
    for module in (learner, objective):
        module.to(context.device).to(memory_format=context.memory_format)
    objective.teacher = teacher
    return learner, objective


@contextmanager
def _explaining_missing_features(recipe: Recipe) -> Iterator[None]:
    """Turn a network without features into an error that names the setting that needs them.

    Raises:
        RecipeError: a network has no layer that makes its logits.
    """
    try:
        yield
    except InvalidValueError as error:
        # Then the error is about something else.
        if recipe.loss.feature_weight == 0:
            raise
        raise RecipeError(
            f"loss.feature_weight = {recipe.loss.feature_weight} compares penultimate features, "
            f"the inputs of the classifiers, but {str(error).partition('. ')[0]}. Take other "
            "networks, or set loss.feature_weight to 0."
        ) from error


def _read_class_std(recipe: Recipe, num_classes: int) -> NDArray[np.float64] | None:
    """Return the (C,) class std of the subset; None where the recipe does not reshape by it.

    Raises:
        RecipeError: the subset has none.
        ArtifactMismatch: they are of a different number of classes.
    """
    if recipe.loss.reshaping != "class_std":
        return None
    assert recipe.data.subset is not None, "the recipe is validated"
    class_std = Subset.load(recipe.data.subset).class_std
    if class_std is None:
        raise RecipeError(
            f"loss.reshaping = 'class_std', but {recipe.data.subset} carries no class std. "
            "Make the subset with `fastprune select`, or set loss.reshaping to 'none'."
        )
    if len(class_std) != num_classes:
        raise ArtifactMismatch(
            f"{recipe.data.subset} has the class std of {len(class_std)} classes, but "
            f"{recipe.data.train} has {num_classes}. Select again from scores of this beton."
        )
    return class_std


def _build(settings: NetworkSettings, num_classes: int) -> nn.Module:
    """Build a network, with published weights or its checkpoint if it has any."""
    network = build_network(settings.network, num_classes=num_classes, weights=settings.weights)
    if settings.checkpoint is not None:
        load_weights(network, settings.checkpoint)
    return network


class Stepper:
    """Takes optimizer steps, in which the host never waits for the device."""

    def __init__(
        self,
        context: Context,
        learner: Learner,
        objective: Objective,
        teacher: Teacher,
        pruning: InfoBatch | None = None,
    ) -> None:
        """Wrap the learner for training: batch normalization, compilation, processes.

        With `pruning` the losses of rows are weighed; without it each counts once.

        Raises:
            RecipeError: run.sync_batchnorm on several processes without CUDA.
        """
        recipe = context.recipe
        self._context = context
        self._objective = objective
        self._teacher = teacher
        self._pruning = pruning
        if recipe.run.sync_batchnorm:
            synchronize_batchnorm(learner, context.ranks, context.device)
        # Compiled in place (`module.compile`), so that names in state dicts stay as they are.
        if recipe.run.compile:
            learner.compile()
            if teacher.network is not None:
                teacher.network.compile()
        self._learner = learner
        # DDP last: it registers the parameters that the learner has by then.
        self._wrapped = distribute(learner, context.ranks, context.device)
        # Includes the projectors; the teacher's parameters are frozen.
        self._optimizer = make_optimizer(learner, recipe.schedule)
        decay = recipe.schedule.ema_decay
        self._average = None if decay is None else WeightAverage(learner.student, decay=decay)

    @property
    def student(self) -> nn.Module:
        """The network to evaluate and keep: the average of the weights if there is one."""
        return self._learner.student if self._average is None else self._average.student

    def begin_epoch(self, epoch: int) -> None:
        """Put the learner into training mode, and set the loss weights of an epoch."""
        self._wrapped.train()
        self._objective.begin_epoch(epoch)

    def update(self, batch: Batch, *, step: int, learning_rate: float) -> Tensor:
        """Take a step; `step` counts this one.

        Returns:
            (B,) float32 on the device: the loss of every row, detached.
        """
        schedule = self._context.recipe.schedule
        # DDP has averaged the gradients over all processes when this returns.
        losses = self._backward(batch, self._teacher.answer)
        with self._context.timer.part("optimizer"):
            # Clipped by the norm of the averaged gradient, the same on every process.
            if schedule.clip_norm is not None:
                nn.utils.clip_grad_norm_(self._learner.parameters(), schedule.clip_norm)
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
            self._optimizer.step()
            # None instead of zeros: the next backward pass writes gradients and adds to none.
            self._optimizer.zero_grad(set_to_none=True)
            if self._average is not None:
                self._average.update(self._learner.student, step=step)
        return losses

    def _backward(
        self, batch: Batch, ask: Callable[[Batch], Outputs | None], *, is_counted: bool = True
    ) -> Tensor:
        """Compute the gradients of a batch; returns the loss of every row, not weighed."""
        context = self._context
        # Loaders give channels_last, so this copies only if the recipe wants another format.
        images = batch.images.contiguous(memory_format=context.memory_format)
        batch = batch._replace(images=images)
        with context.autocast(), context.timer.part("teacher"):
            targets = self._objective.reshape(ask(batch), batch.labels)
        with context.timer.part("student"):
            with context.autocast():
                losses: Tensor = self._objective(self._wrapped(images), targets, batch.labels)
            weighed = losses
            if self._pruning is not None and is_counted:
                # Rows that stand for skipped ones count more; the log shows unweighed losses.
                weighed = self._pruning.weigh(losses, batch.rows)
            weighed.mean().backward()
        # Detached: the graph would stay alive until the next line of the log.
        return losses.detach()

    def warm_up(
        self, *, num_classes: int, image_sizes: Sequence[int], teacher_classes: int | None = None
    ) -> None:
        """Run a step on empty images of each size and undo it, so that start-up is not timed.

        Raises:
            InvalidValueError: a network's output does not have these classes.
        """
        context = self._context
        asked = num_classes if teacher_classes is None else teacher_classes
        rows = context.recipe.data.batch_size
        # A copy: the state dict's tensors are the weights themselves.
        before = copy.deepcopy(self._learner.state_dict())
        labels = torch.zeros(rows, dtype=torch.int64, device=context.device)
        for size in image_sizes:
            images = torch.zeros((rows, 3, size, size), device=context.device)
            images = images.contiguous(memory_format=context.memory_format)
            # A whole batch: for a single image, compiled networks would be compiled twice.
            with torch.no_grad(), context.autocast():
                _, logits = self._learner.network.eval()(images)
            require_logits("student", logits, rows=rows, num_classes=num_classes)
            # Not `update`: an optimizer step would leave momentum behind.
            self._wrapped.train()
            self._backward(
                Batch(images, labels, labels),
                lambda batch: self._teacher.warm_up(batch.images, asked),
                is_counted=False,
            )
        self._optimizer.zero_grad(set_to_none=True)
        # The weights are untouched, but running statistics have seen empty images.
        self._learner.load_state_dict(before)

    def state_dict(self) -> dict[str, Any]:
        """Return weights, momentum and average."""
        # Of the learner and not of its DDP wrapper, so that names do not depend on processes.
        average = None if self._average is None else self._average.student.state_dict()
        return {
            "learner": self._learner.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "average": average,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore from `state_dict`."""
        self._learner.load_state_dict(state["learner"])
        self._optimizer.load_state_dict(state["optimizer"])
        if self._average is not None:
            self._average.student.load_state_dict(state["average"])


def synchronize_batchnorm(learner: nn.Module, ranks: Ranks, device: torch.device) -> nn.Module:
    """Make batch normalization use the batches of all processes.

    Raises:
        RecipeError: there are several processes, but not on CUDA.
    """
    if ranks.world == 1:
        return learner
    if device.type != "cuda":
        raise RecipeError(
            f"run.sync_batchnorm = true works on CUDA alone, but the {ranks.world} processes train "
            f"on {device}. Leave it out."
        )
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(learner)
    return converted


def distribute(learner: nn.Module, ranks: Ranks, device: torch.device) -> nn.Module:
    """Wrap the learner, so that every process steps along the mean of all gradients."""
    if ranks.world == 1:
        return learner
    return DistributedDataParallel(
        learner,
        device_ids=[device] if device.type == "cuda" else None,
        # Gradients live in the buckets that are sent, which saves a copy of the weights' size.
        gradient_as_bucket_view=True,
    )


def share_buffers(network: nn.Module, ranks: Ranks) -> None:
    """Give every process the first one's running statistics, which differ between processes."""
    if ranks.world > 1:
        # Integers (batch counters) too: the first process writes the student.
        for buffer in network.buffers():
            distributed.broadcast(buffer, src=0)
