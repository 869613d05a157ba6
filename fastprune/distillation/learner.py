"""The learner: the student, and the projectors that learn beside it and are dropped afterwards."""

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastprune.base.errors import InvalidValueError
from fastprune.networks import FeatureNetwork


class Outputs(NamedTuple):
    """Features and logits of a learner or a teacher for a batch.

    Attributes:
        features: (B, D) floating, in the teacher's space; D is 0 where no loss looks at them.
        logits: (B, C) floating.
    """

    features: Tensor
    logits: Tensor


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
        # A network without features has width 0.
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


class Learner(nn.Module):
    """The student network, and the projectors that compare its features with the teacher's.

    The optimizer trains it and distributed training wraps it. Only `student` is kept.
    """

    def __init__(self, network: FeatureNetwork, projectors: nn.Module | None = None) -> None:
        """Combine a student with its projectors, (B, D_s) -> (B, D_t), or None."""
        super().__init__()
        self.network = network
        self.projectors = projectors

    @classmethod
    def with_projectors(
        cls,
        student: nn.Module,
        teacher: FeatureNetwork,
        *,
        num_classes: int,
        image_size: int,
        projectors: int,
    ) -> Self:
        """Make a learner whose features are compared with a teacher's penultimate ones.

        `num_classes` is the student's C, or 0 where it has no classifier; `image_size` is in
        pixels; `projectors` is the number of maps.

        Raises:
            InvalidValueError: the student has no linear layer that makes its logits.
        """
        network = FeatureNetwork(student, num_classes=num_classes)
        widths = network.feature_width(image_size), teacher.feature_width(image_size)
        return cls(network, ProjectorEnsemble(*widths, projectors=projectors))

    @property
    def student(self) -> nn.Module:
        """The student alone: maps (B, 3, H, W) images to (B, C) logits."""
        # Without the hook's wrapper, so that its file has the network's own names.
        return self.network.network

    def forward(self, images: Tensor) -> Outputs:
        """(B, 3, H, W) images -> features, projected where they are compared, and logits."""
        features, logits = self.network(images)
        return Outputs(features if self.projectors is None else self.projectors(features), logits)


def require_logits(name: str, logits: Any, *, rows: int, num_classes: int) -> None:
    """Refuse a network whose output for a batch is not (rows, num_classes).

    Raises:
        InvalidValueError: it is something else; `name` is the network's, for the message.
    """
    # A factory may return anything: tuples, dicts, feature maps.
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if shape != (rows, num_classes):
        raise InvalidValueError(
            f"the {name} returned {shape} for {rows} images, not logits of shape "
            f"({rows}, {num_classes}). Take a network with an output for each class."
        )
