"""What is trained: the student, and what learns beside it and is thrown away afterwards."""

from typing import NamedTuple, Self

from torch import Tensor, nn

from fastprune.distillation.projectors import ProjectorEnsemble
from fastprune.networks import FeatureNetwork


class Outputs(NamedTuple):
    """What a learner says of a batch.

    Attributes:
        logits: (B, C) floating, the student's.
        features: (B, D) floating, the student's features in the teacher's space; None where no
            loss looks at them.
    """

    logits: Tensor
    features: Tensor | None = None


class Learner(nn.Module):
    """The student network, and the projectors that compare its features with the teacher's.

    This is what the optimiser trains and what distributed training wraps. Only `student` is kept.
    """

    def __init__(self, network: nn.Module, projectors: nn.Module | None = None) -> None:
        """Put together what is trained.

        Args:
            network: the student, or with projectors a `FeatureNetwork` around it.
            projectors: maps the student's features (B, D_s) to the teacher's (B, D_t); None
                without a feature loss.
        """
        super().__init__()
        assert isinstance(network, FeatureNetwork) == (projectors is not None)
        self.network = network
        self.projectors = projectors

    @classmethod
    def with_projectors(
        cls, student: nn.Module, teacher: FeatureNetwork, *, num_classes: int, projectors: int
    ) -> Self:
        """A learner whose features are compared with a teacher's penultimate ones.

        Args:
            student: maps (B, 3, H, W) images to (B, C) logits.
            teacher: hooked at the input of its classifier.
            num_classes: C.
            projectors: maps in the ensemble.

        Raises:
            InvalidValueError: the student has no linear layer that makes its logits.
        """
        network = FeatureNetwork(student, num_classes=num_classes)
        widths = network.classifier_width, teacher.classifier_width
        return cls(network, ProjectorEnsemble(*widths, projectors=projectors))

    @property
    def student(self) -> nn.Module:
        """The student alone: maps (B, 3, H, W) images to (B, C) logits."""
        return self.network.network if isinstance(self.network, FeatureNetwork) else self.network

    def forward(self, images: Tensor) -> Outputs:
        """(B, 3, H, W) images -> logits, and projected features where they are compared."""
        if self.projectors is None:
            return Outputs(self.network(images))
        features, logits = self.network(images)
        return Outputs(logits, self.projectors(features))
