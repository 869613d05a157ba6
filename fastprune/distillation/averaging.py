"""The running average of a student's weights."""

import copy

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """An exponential moving average of weights and running statistics.

    torch's AveragedModel counts its updates in a tensor, which makes the host wait for a CUDA
    device at each of them; here the caller tells the step.

    Attributes:
        student: a network with the averaged weights, without gradients, in eval mode.
    """

    def __init__(self, student: nn.Module, *, decay: float) -> None:
        """Start from the student's weights.

        Args:
            student: what is averaged.
            decay: share in (0, 1) that the average keeps at each step.
        """
        self.student = copy.deepcopy(student).eval().requires_grad_(False)
        self._decay = decay

    @torch.no_grad()
    def update(self, student: nn.Module, *, step: int) -> None:
        """Move the average towards the student.

        Args:
            student: as it is after the step.
            step: steps done, >= 1; the average follows faster in the first ones, by
                min(decay, (1 + step) / (10 + step)), lest it remember untrained weights.
        """
        averages, values = [], []
        state = student.state_dict()
        for name, average in self.student.state_dict().items():
            if average.is_floating_point():
                averages.append(average)
                values.append(state[name])
            else:
                average.copy_(state[name])
        decay = min(self._decay, (1 + step) / (10 + step))
        get_ema_multi_avg_fn(decay)(averages, values, step)
