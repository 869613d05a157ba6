"""Students that tests name in recipes as `tests.distillation.networks:...`."""

import os
import signal

import torch
from torch import Tensor, nn

from fastprune.base.errors import InvalidValueError


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
        else:
            self.before_validation_pass()
        features = self.convolutions(images).mean(dim=(2, 3))
        return self.classifier(self.dropout(features))

    def before_pass(self, number: int) -> None:
        """Called in training; number 1 is the rehearsal's."""

    def before_validation_pass(self) -> None:
        """Called in validation, and once in the rehearsal."""


def small(*, num_classes: int) -> Small:
    return Small(num_classes)


def frozen(*, num_classes: int) -> Small:
    """With batch normalisation that sees no batch, so that its size does not matter."""
    return Small(num_classes, is_frozen=True)


def _signal_where_asked(variable: str, number: int) -> None:
    """Send this process a signal in a pass: `signal:pass`, or of one rank `signal:pass:rank`."""
    if variable not in os.environ:
        return
    name, asked, *ranks = os.environ[variable].split(":")
    if int(asked) == number and ranks in ([], [os.environ.get("RANK")]):
        os.kill(os.getpid(), signal.Signals[name])


class _Signalled(Small):
    _validation_passes = 0

    def before_pass(self, number: int) -> None:
        _signal_where_asked("SMALL_SIGNAL", number)

    def before_validation_pass(self) -> None:
        self._validation_passes += 1
        _signal_where_asked("SMALL_SIGNAL_IN_VALIDATION", self._validation_passes)


def signalled(*, num_classes: int) -> Small:
    """Sends its process a signal where the environment says so."""
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


# Batch sizes that counted teachers saw in this process, but for the empty images of a warm-up.
seen: list[int] = []


class Counted(nn.Module):
    """A small network that notes how many images it sees."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 32, 5, stride=3)
        self.fc = nn.Linear(32, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        if images.any():
            seen.append(len(images))
        return 30 * self.fc(self.convolution(images).relu().mean(dim=(2, 3)))


def counted(*, num_classes: int) -> nn.Module:
    return Counted(num_classes)
