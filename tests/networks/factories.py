"""What a user's own module may hold."""

from torch import nn


def linear(*, num_classes):
    return nn.Linear(12, num_classes)


def number(*, num_classes):
    return num_classes
