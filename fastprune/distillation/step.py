"""One optimiser step: the teacher, the student there and back, the optimiser."""

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from fastprune.distillation.averaging import WeightAverage
from fastprune.distillation.clocks import Clocks
from fastprune.distillation.infobatch import InfoBatch
from fastprune.distillation.learner import Learner
from fastprune.distillation.objective import Objective
from fastprune.distillation.schedule import make_optimizer
from fastprune.distributed import Ranks
from fastprune.errors import InvalidValueError, RecipeError
from fastprune.recipe import Recipe


class Stepper:
    """Takes optimiser steps; nothing in them makes the host wait for the device."""

    def __init__(
        self,
        recipe: Recipe,
        learner: Learner,
        objective: Objective,
        pruning: InfoBatch | None = None,
        *,
        ranks: Ranks,
        device: torch.device,
        clocks: Clocks,
    ) -> None:
        """Wrap what is trained as the recipe says.

        Args:
            recipe: schedule, precision and the like.
            learner: trained in place.
            objective: what is minimised.
            pruning: weighs the losses of rows; None lets each count once.
            ranks: the processes that train together.
            device: where learner, objective and batches are.
            clocks: told of the parts of each step.

        Raises:
            RecipeError: run.sync_batchnorm away from CUDA.
        """
        self._recipe = recipe
        self._objective = objective
        self._pruning = pruning
        self._device = device
        self._clocks = clocks
        self._layout = torch.channels_last if recipe.run.channels_last else torch.contiguous_format
        if recipe.run.sync_batchnorm:
            synchronize_batchnorm(learner, ranks, device)
        if recipe.run.compile:
            learner.compile()
            if objective.teacher is not None:
                objective.teacher.compile()
        self._learner = learner
        self._wrapped = distribute(learner, ranks, device)
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

    def update(
        self, images: Tensor, labels: Tensor, rows: Tensor, *, step: int, learning_rate: float
    ) -> Tensor:
        """Take a step.

        Args:
            images: (B, 3, S, S) on the device.
            labels: (B,) int64 on the device.
            rows: (B,) int64 on the device, of the beton.
            step: optimiser steps done, this one included.
            learning_rate: of this step.

        Returns:
            (B,) float32 on the device: the loss of every row, detached.
        """
        losses = self._backward(images, labels, rows)
        with self._clocks.part("optimizer"):
            if self._recipe.schedule.clip_norm is not None:
                nn.utils.clip_grad_norm_(
                    self._learner.parameters(), self._recipe.schedule.clip_norm
                )
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            if self._average is not None:
                self._average.update(self._learner.student, step=step)
        return losses

    def _backward(self, images: Tensor, labels: Tensor, rows: Tensor | None = None) -> Tensor:
        """The gradients of the batch; returns the loss of every row, not weighed."""
        # Loaders give channels_last; nothing is copied where that is asked for.
        images = images.contiguous(memory_format=self._layout)
        with self.autocast(), self._clocks.part("teacher"):
            targets = self._objective.teach(images, labels)
        with self._clocks.part("student"):
            with self.autocast():
                losses: Tensor = self._objective(self._wrapped(images), targets, labels)
            if self._pruning is None or rows is None:
                losses.mean().backward()
            else:
                self._pruning.weigh(losses, rows).mean().backward()
        return losses.detach()

    def rehearse(self, *, num_classes: int, image_sizes: Sequence[int]) -> None:
        """Run steps on empty images and undo them, so that no clock counts what happens once.

        Args:
            num_classes: C.
            image_sizes: sides of the images that the run has, in pixels; a step for each.

        Raises:
            InvalidValueError: a network gives no logits of these classes.
        """
        rows = self._recipe.data.batch_size
        before = copy.deepcopy(self._learner.state_dict())
        labels = torch.zeros(rows, dtype=torch.int64, device=self._device)
        for size in image_sizes:
            images = torch.zeros((rows, 3, size, size), device=self._device)
            images = images.contiguous(memory_format=self._layout)
            # A whole batch: a single image would have the compiled teacher compiled twice.
            self._require_logits(images, num_classes)
            self._wrapped.train()
            self._backward(images, labels)
        self._optimizer.zero_grad(set_to_none=True)
        self._learner.load_state_dict(before)

    @torch.no_grad()
    def _require_logits(self, images: Tensor, num_classes: int) -> None:
        """Refuse networks whose outputs for B images are not (B, C)."""
        networks = {"student": self._learner.student.eval(), "teacher": self._objective.teacher}
        for name, network in networks.items():
            if network is None:
                continue
            with self.autocast():
                answer = network(images)
            logits = answer[1] if isinstance(answer, tuple) and len(answer) == 2 else answer
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            if shape != (len(images), num_classes):
                raise InvalidValueError(
                    f"the {name} returned {shape} for {len(images)} images, not logits of shape "
                    f"({len(images)}, {num_classes}). Take a network with an output for each class."
                )

    def autocast(self) -> AbstractContextManager[None]:
        """bf16 where the recipe asks for it, or leaves it open and CUDA has it; else float32."""
        precision = self._recipe.run.precision
        enabled = precision == "bf16" or (
            precision == "auto"
            and self._device.type == "cuda"
            and torch.cuda.is_bf16_supported(including_emulation=False)
        )
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=enabled)

    def state_dict(self) -> dict[str, Any]:
        """Weights, momentum and average."""
        average = None if self._average is None else self._average.student.state_dict()
        return {
            "learner": self._learner.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "average": average,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what `state_dict` returned."""
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
        gradient_as_bucket_view=True,
    )


def share_buffers(network: nn.Module, ranks: Ranks) -> None:
    """Give every process the first one's running statistics, which differ after a step."""
    if ranks.world > 1:
        for buffer in network.buffers():
            distributed.broadcast(buffer, src=0)
