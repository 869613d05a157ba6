"""The betons of the distillation tests, for commands that need some."""

from tests.distillation.conftest import betons, half, teacher

__all__ = ["betons", "half", "teacher"]
