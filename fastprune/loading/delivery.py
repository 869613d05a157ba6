"""From decoded pixels to the batch that the caller gets."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastprune.loading.layouts import ContrastRows, Transform, arranged, transformed
from fastprune.loading.pixels import Normalizer


@dataclass(frozen=True)
class Delivery:
    """Puts batches together.

    Attributes:
        layout: one of `layouts.LAYOUTS`.
        labels: (N,) int64, of every row of the beton.
        normalize: brings pixels to the device and normalises them there.
        seed: of the transform and the contrast rows.
        transform: applied to each image, or to each second view; None for none.
        contrast: draws contrast rows for the layout that has them.
    """

    layout: str
    labels: NDArray[np.int64]
    normalize: Normalizer
    seed: int
    transform: Transform | None
    contrast: ContrastRows | None = None

    @property
    def num_views(self) -> int:
        """Views of each row in a batch."""
        return 2 if self.layout == "two_view" else 1

    def __call__(
        self, pixels: torch.Tensor, rows: NDArray[np.int64], *, epoch: int
    ) -> tuple[Any, ...]:
        """Put one batch together.

        Args:
            pixels: (num_views * B, S, S, 3) uint8, all first views before all second ones.
            rows: (num_views * B,) int64, in the same order.
            epoch: in [0, 2**63).

        Returns:
            The tuple of the layout, on the device.
        """
        *earlier, pixels = pixels.to(self.normalize.device, non_blocking=True).chunk(self.num_views)
        rows = rows[: len(pixels)]
        if self.transform is not None:
            pixels = transformed(pixels, self.transform, rows, seed=self.seed, epoch=epoch)
        views = (*map(self.normalize, earlier), self.normalize(pixels))
        labels = self.labels[rows]
        contrast = None
        if self.contrast is not None:
            contrast = self._tensor(self.contrast.draw(rows, labels, epoch=epoch))
        images = views if self.num_views > 1 else views[0]
        return arranged(self.layout, images, self._tensor(labels), self._tensor(rows), contrast)

    def _tensor(self, numbers: NDArray[np.int64]) -> torch.Tensor:
        """Numbers on the device."""
        return torch.from_numpy(numbers).to(self.normalize.device)
