"""One optimizer step: the teacher, the student there and back, the optimizer."""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from fastprune.base.errors import RecipeError
from fastprune.base.ranks import Ranks
from fastprune.distillation.compatibility import (
    explain_missing_features,
    read_class_std,
    require_logits,
)
from fastprune.distillation.evaluation import autocast
from fastprune.distillation.infobatch import InfoBatch
from fastprune.distillation.learner import Learner, Outputs
from fastprune.distillation.losses import LogitReshaper
from fastprune.distillation.meters import PhaseTimer
from fastprune.distillation.objective import Objective
from fastprune.distillation.schedule import WeightAverage, make_optimizer
from fastprune.distillation.teacher import Holes, Teacher
from fastprune.networks import FeatureNetwork, build_network, load_weights
from fastprune.settings import NetworkSettings, Recipe


@dataclass(frozen=True)
class Context:
    """What all parts of a run work with.

    Attributes:
        recipe: settings, validated.
        ranks: the processes that train together.
        device: of this process.
        timer: where the time of this process goes.
    """

    recipe: Recipe
    ranks: Ranks
    device: torch.device
    timer: PhaseTimer

    @property
    def memory_format(self) -> torch.memory_format:
        """The order in memory of networks and images."""
        return torch.channels_last if self.recipe.run.channels_last else torch.contiguous_format

    @property
    def precision(self) -> str:
        """Arithmetic of both networks: "bf16" or "fp32".

        bf16 where the recipe asks for it, or leaves it open and CUDA has it.
        """
        asked = self.recipe.run.precision
        # Emulated bf16 is slower than float32, so "auto" takes it only where the card has it.
        has_bf16 = self.device.type == "cuda" and torch.cuda.is_bf16_supported(
            including_emulation=False
        )
        return "bf16" if asked == "bf16" or (asked == "auto" and has_bf16) else "fp32"

    @property
    def dtype(self) -> torch.dtype:
        """`precision` as a dtype."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def autocast(self) -> AbstractContextManager[None]:
        """Compute in `precision`."""
        return autocast(self.device, self.precision)


class Batch(NamedTuple):
    """What the loader gives for a step, on the device.

    Attributes:
        images: (B, 3, S, S) floating.
        labels: (B,) int64.
        rows: (B,) int64, of the beton.
        host_rows: the same on the host, for a teacher cache.
        teacher_logits: (B, C) float32, zeros where there are none; None without a teacher cache.
        holes: which of them are missing, on the host; None without a teacher cache.
    """

    images: Tensor
    labels: Tensor
    rows: Tensor
    host_rows: Tensor | None = None
    teacher_logits: Tensor | None = None
    holes: Holes | None = None

    @property
    def kind(self) -> str:
        """What a step's time depends on: the images' side, and of how many the teacher is asked."""
        if self.holes is None:
            share = "each"
        else:
            num_holes = len(self.holes.rows)
            share = "each" if num_holes == len(self.images) else "some" if num_holes else "none"
        return f"{self.images.shape[-1]} pixels, teacher asked of {share}"


def make_pair(
    context: Context, *, num_classes: int, keep_ratio: float, teacher_classes: int | None = None
) -> tuple[Learner, Objective]:
    """Build what a recipe trains and what it minimizes.

    The student's weights depend on torch's generator alone: nothing is drawn before them.

    Args:
        context: networks, losses and memory format of the recipe, and the device.
        num_classes: C of the student: the beton's; 0 for none but features.
        keep_ratio: share of the beton's rows that is trained on.
        teacher_classes: C of the teacher; None for the student's.

    Returns:
        The learner, with projectors where features are compared, and the objective with its
        teacher.

    Raises:
        RecipeError: the subset carries no class std, or a network has no features, and the loss
            asks for them.
        ArtifactMismatch: the class std are of other classes.
        ArtifactError: a checkpoint cannot be read or does not fit its network.
    """
    recipe = context.recipe
    # Without a feature loss any classifier will do, also one whose features no hook finds.
    takes_features = recipe.loss.feature_weight > 0
    # First, so that no other network's random weights come before the student's.
    student, teacher = _build(recipe.student, num_classes), None
    with explain_missing_features(recipe):
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
    class_std = read_class_std(recipe, num_classes)
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


def _build(settings: NetworkSettings, num_classes: int) -> nn.Module:
    """A network, with published weights or its checkpoint where it has any."""
    network = build_network(settings.network, num_classes=num_classes, weights=settings.weights)
    if settings.checkpoint is not None:
        load_weights(network, settings.checkpoint)
    return network


class Stepper:
    """Takes optimizer steps; nothing in them makes the host wait for the device."""

    def __init__(
        self,
        context: Context,
        learner: Learner,
        objective: Objective,
        teacher: Teacher,
        pruning: InfoBatch | None = None,
    ) -> None:
        """Wrap what is trained as the recipe says.

        Args:
            context: of the run.
            learner: trained in place.
            objective: what is minimized.
            teacher: answers to each batch.
            pruning: weighs the losses of rows; None lets each count once.

        Raises:
            RecipeError: run.sync_batchnorm away from CUDA.
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
        # Of the learner, projectors included; the teacher's parameters ask for no gradient.
        self._optimizer = make_optimizer(learner, recipe.schedule)
        decay = recipe.schedule.ema_decay
        self._average = None if decay is None else WeightAverage(learner.student, decay=decay)

    @property
    def student(self) -> nn.Module:
        """What is evaluated and kept: the average of the weights where there is one."""
        return self._learner.student if self._average is None else self._average.student

    def begin_epoch(self, epoch: int) -> None:
        """Put the learner into training mode, and the loss into its weights of an epoch."""
        self._wrapped.train()
        self._objective.begin_epoch(epoch)

    def update(self, batch: Batch, *, step: int, learning_rate: float) -> Tensor:
        """Take a step.

        Args:
            batch: of this process.
            step: optimizer steps done, this one included.
            learning_rate: of this step.

        Returns:
            (B,) float32 on the device: the loss of every row, detached.
        """
        schedule = self._context.recipe.schedule
        # Gradients are those of the mean over all processes when this returns (DDP).
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
        """The gradients of the batch; returns the loss of every row, not weighed."""
        context = self._context
        # Loaders give channels_last; nothing is copied where that is asked for.
        images = batch.images.contiguous(memory_format=context.memory_format)
        batch = batch._replace(images=images)
        with context.autocast(), context.timer.part("teacher"):
            targets = self._objective.reshape(ask(batch), batch.labels)
        with context.timer.part("student"):
            with context.autocast():
                losses: Tensor = self._objective(self._wrapped(images), targets, batch.labels)
            weighed = losses
            if self._pruning is not None and is_counted:
                # Rows that stand for skipped ones count more; what is logged stays unweighed.
                weighed = self._pruning.weigh(losses, batch.rows)
            weighed.mean().backward()
        # The graph would be kept alive until the next line of the log.
        return losses.detach()

    def warm_up(
        self, *, num_classes: int, image_sizes: Sequence[int], teacher_classes: int | None = None
    ) -> None:
        """Run steps on empty images and undo them, so that no clock counts what happens once.

        Args:
            num_classes: C of the student.
            image_sizes: sides of the images that the run has, in pixels; a step for each.
            teacher_classes: C of the teacher; None for the student's.

        Raises:
            InvalidValueError: a network gives no logits of these classes.
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
            # A whole batch: a single image would have the compiled networks compiled twice.
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
        # Running statistics have seen empty images, though the weights are untouched.
        self._learner.load_state_dict(before)

    def state_dict(self) -> dict[str, Any]:
        """Return weights, momentum and average."""
        # Of the learner and not of its DDP wrapper: any number of processes has these names.
        average = None if self._average is None else self._average.student.state_dict()
        return {
            "learner": self._learner.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "average": average,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self._learner.load_state_dict(state["learner"])
        self._optimizer.load_state_dict(state["optimizer"])
        if self._average is not None:
            self._average.student.load_state_dict(state["average"])


def synchronize_batchnorm(learner: nn.Module, ranks: Ranks, device: torch.device) -> nn.Module:
    """Let batch normalization see the batches of all processes.

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
    """Wrap what is trained, so that every process steps along the mean of all gradients."""
    if ranks.world == 1:
        return learner
    return DistributedDataParallel(
        learner,
        device_ids=[device] if device.type == "cuda" else None,
        # Gradients live in the buckets that are sent: one copy of the weights' size less.
        gradient_as_bucket_view=True,
    )


def share_buffers(network: nn.Module, ranks: Ranks) -> None:
    """Give every process the first one's running statistics, which differ after a step."""
    if ranks.world > 1:
        # Integers (batch counters) too: the first process's file is the run's.
        for buffer in network.buffers():
            distributed.broadcast(buffer, src=0)
