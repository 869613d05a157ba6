"""From the student's features to the teacher's space."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastprune.errors import InvalidValueError


class ProjectorEnsemble(nn.Module):
    """The mean of several linear maps from student to teacher features, each cut at zero.

    The maps start at different random weights and are trained with the student, so their mean is
    a steadier guide than any one of them. Cutting each at zero keeps the mean from being a single
    linear map, and lands where the features of a network lie that ends in a ReLU.

    Args:
        student_width: D_s, numbers in a feature of the student.
        teacher_width: D_t, numbers in a feature of the teacher.
        projectors: how many maps.

    Raises:
        InvalidValueError: a width or the number of maps is below one.

    Source: Chen et al. 2022, "Improved Feature Distillation via Projector Ensemble".
    """

    def __init__(self, student_width: int, teacher_width: int, *, projectors: int = 3) -> None:
        super().__init__()
        given = {
            "student_width": student_width,
            "teacher_width": teacher_width,
            "projectors": projectors,
        }
        for name, value in given.items():
            if value < 1:
                raise InvalidValueError(f"{name} ({value}) must be at least 1.")
        self.maps = nn.ModuleList(
            nn.Linear(student_width, teacher_width) for _ in range(projectors)
        )

    def forward(self, features: Tensor) -> Tensor:
        """(B, D_s) -> (B, D_t)."""
        projected = [functional.relu(one(features)) for one in self.maps]
        return torch.stack(projected).mean(dim=0)
