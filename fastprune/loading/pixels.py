"""From decoded pixels to what a network reads."""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from numba import njit

from fastprune.loading.memory import BatchMemory

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Normalizer:
    """Brings pixels to the device and normalises them there.

    Attributes:
        device: where batches are delivered.
        mean: per channel, of pixel values in [0, 1].
        std: per channel, of pixel values in [0, 1].
        dtype: torch.float32, torch.float16 or torch.bfloat16; None leaves uint8.
    """

    device: torch.device
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: torch.dtype | None
    _memory: BatchMemory = field(default_factory=BatchMemory)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalise a batch.

        Args:
            pixels: (B, S, S, 3) uint8.

        Returns:
            (B, 3, S, S) on the device, channels_last: (pixel / 255 - mean) / std, or uint8.
        """
        pixels = pixels.to(self.device, non_blocking=True)
        if self.dtype is None:
            return pixels.permute(0, 3, 1, 2)
        batch, size = pixels.shape[:2]
        # Whole lines of S x 3 values, because a last axis of three does not vectorise.
        lines = pixels.reshape(batch * size, size * 3)
        scale, shift = _scale_and_shift(self.mean, self.std, size, pixels.device)
        if pixels.is_cuda:
            lines = lines.to(torch.float32).mul_(scale).add_(shift)
        else:
            floats = self._memory.take(tuple(lines.shape), torch.float32)
            _normalize(lines.numpy(), scale.numpy(), shift.numpy(), floats.numpy())
            lines = floats
        return lines.to(self.dtype).view(batch, size, size, 3).permute(0, 3, 1, 2)


@njit(cache=True, nogil=True)
def _normalize(lines: Any, scale: Any, shift: Any, floats: Any) -> None:
    """Fill `floats` with lines * scale + shift, in one pass and without waking torch's threads."""
    for i in range(lines.shape[0]):
        for k in range(lines.shape[1]):
            floats[i, k] = lines[i, k] * scale[k] + shift[k]


@lru_cache(maxsize=16)
def _scale_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a line of S x 3 pixel values is multiplied by, and what is added, on the device."""
    scale = 1 / (255 * torch.tensor(std))
    shift = -torch.tensor(mean) * 255 * scale
    return scale.repeat(size).to(device), shift.repeat(size).to(device)
