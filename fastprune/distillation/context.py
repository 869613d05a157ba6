"""The context of a run, and the batches that its steps take."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastprune.base.ranks import Ranks
from fastprune.distillation.evaluation import autocast
from fastprune.distillation.meters import PhaseTimer
from fastprune.settings import Recipe


@dataclass(frozen=True)
class Context:
    """Settings, processes, device and clock of a run, which all of its parts share.

    Attributes:
        recipe: settings, validated.
        ranks: the processes that train together.
        device: of this process.
        timer: of this process.
    """

    recipe: Recipe
    ranks: Ranks
    device: torch.device
    timer: PhaseTimer

    @property
    def memory_format(self) -> torch.memory_format:
        """Memory format of networks and images."""
        return torch.channels_last if self.recipe.run.channels_last else torch.contiguous_format

    @property
    def precision(self) -> str:
        """Arithmetic of both networks: "bf16" or "fp32"; "auto" takes bf16 where CUDA has it."""
        asked = self.recipe.run.precision
        # Emulated bf16 is slower than float32, so "auto" takes it only where it is native.
        has_bf16 = self.device.type == "cuda" and torch.cuda.is_bf16_supported(
            including_emulation=False
        )
        return "bf16" if asked == "bf16" or (asked == "auto" and has_bf16) else "fp32"

    def autocast(self) -> AbstractContextManager[None]:
        """Compute in `precision`."""
        return autocast(self.device, self.precision)


class Holes(NamedTuple):
    """Which rows of a batch have no cached logits; on the host, where no step waits for them.

    Attributes:
        slot: of the views in the batch.
        positions: (m,) int64, in the batch.
        rows: (m,) int64, of the beton.
    """

    slot: int
    positions: NDArray[np.int64]
    rows: NDArray[np.int64]


class Batch(NamedTuple):
    """A batch of the loader, on the device.

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
        """Name the work of a step: the images' side, and for how many the teacher is asked."""
        if self.holes is None:
            share = "each"
        else:
            num_holes = len(self.holes.rows)
            share = "each" if num_holes == len(self.images) else "some" if num_holes else "none"
        return f"{self.images.shape[-1]} pixels, teacher asked of {share}"
