"""Students that tests name in recipes as `tests.distillation.networks:...`."""

import os
import signal

import torch
from torch import Tensor, nn

from fastprune.errors import InvalidValueError


class Small(nn.Module):
    """Two convolutions with batch normalisation, dropout, and something to do at a forward pass."""

    def __init__(self, num_classes: int, *, is_frozen: bool = False) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 64, 3, stride=2, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
        )
        self.dropout = nn.Dropout(0.0 if is_frozen else 0.2)
        self.classifier = nn.Linear(64, num_classes)
        self._is_frozen = is_frozen
        self._passes = 0

    def train(self, mode: bool = True) -> "Small":
        super().train(mode)
        if self._is_frozen:
            self.convolutions.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self._passes += 1
            self.before_pass(self._passes)
        features = self.convolutions(images).mean(dim=(2, 3))
        return self.classifier(self.dropout(features))

    def before_pass(self, number: int) -> None:
        """Called in training; number 1 is the rehearsal's."""


def small(*, num_classes: int) -> Small:
    return Small(num_classes)


def frozen(*, num_classes: int) -> Small:
    """With batch normalisation that sees no batch, so that its size does not matter."""
    return Small(num_classes, is_frozen=True)


class _Signalled(Small):
    """Sends its process a signal in a pass, both named in the environment as `signal:pass`."""

    def before_pass(self, number: int) -> None:
        asked = os.environ.get("SMALL_SIGNAL")
        if asked and int(asked.split(":")[1]) == number:
            os.kill(os.getpid(), signal.Signals[asked.split(":")[0]])


def signalled(*, num_classes: int) -> Small:
    return _Signalled(num_classes)


class _Greedy(Small):
    def before_pass(self, number: int) -> None:
        torch.empty(2**60)


def greedy(*, num_classes: int) -> Small:
    """Allocates more than there is."""
    return _Greedy(num_classes)


class _BrokenOnOneRank(Small):
    def before_pass(self, number: int) -> None:
        if os.environ["RANK"] == "1" and number == 4:
            raise InvalidValueError("broken on purpose.")


def broken_on_one_rank(*, num_classes: int) -> Small:
    return _BrokenOnOneRank(num_classes)


def wrong_shape(*, num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, num_classes, 3), nn.ReLU())
