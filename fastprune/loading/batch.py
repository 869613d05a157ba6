"""From decoded pixels to the batch a training loop gets: to the device, normalized, by field."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fastprune.base.compiled import cached
from fastprune.base.errors import InvalidValueError
from fastprune.base.random_streams import view_number
from fastprune.decoding.memory import BatchMemory
from fastprune.loading.contrast import ContrastRows, contrast_batches
from fastprune.loading.sending import Parts, one_ahead, send
from fastprune.rows.teacher_cache import TeacherCache

Transform = Callable[[torch.Tensor], torch.Tensor]


class Batch(NamedTuple):
    """A batch between two stages of an epoch.

    Attributes:
        number: its place in the epoch, from 1: the loader's position once it is given.
        rows: (B,) int64, on the host; without the rows that were left out.
        parts: pixels and other columns by name, maybe still on their way to the device.
    """

    number: int
    rows: NDArray[np.int64]
    parts: Parts


class Given(NamedTuple):
    """A batch as the caller gets it, and its place in the epoch."""

    number: int
    values: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Collate:
    """Puts the asked fields together; its methods are the stages behind the decoder.

    Attributes:
        fields: of `settings.LoaderSettings`, in the order of the batch's tuple.
        labels: (N,) int64, of every row of the beton.
        normalize: brings pixels to the device and normalizes them there.
        seed: of the transform and the contrast rows.
        transform: applied to each image, or to the second ones alone; None for none.
        contrast: draws contrast rows; None without that field.
        cache: holds the teacher's logits; None without that field.
    """

    fields: tuple[str, ...]
    labels: NDArray[np.int64]
    normalize: "Normalizer"
    seed: int
    transform: Transform | None
    contrast: ContrastRows | None = None
    cache: TeacherCache | None = None

    @property
    def views_per_row(self) -> int:
        """Views of each row in a batch."""
        return 2 if "second_images" in self.fields else 1

    def view_identity(self) -> dict[str, Any]:
        """Return the settings that decide a view's pixels, as JSON values."""
        return {
            "mean": list(self.normalize.mean),
            "std": list(self.normalize.std),
            "transform": None if self.transform is None else repr(self.transform),
        }

    def keeping(self, rows: NDArray[np.int64], *, num_negatives: int) -> "Collate":
        """Draw contrast rows from these rows (K,), if that field is asked for."""
        if "contrast_rows" not in self.fields:
            return self
        labels = self.labels[rows]
        contrast = ContrastRows(rows, labels, num_negatives=num_negatives, seed=self.seed)
        return replace(self, contrast=contrast)

    def columns(
        self,
        batches: Sequence[NDArray[np.int64]],
        decoded: Iterator[tuple[torch.Tensor, NDArray[np.int64]]],
        *,
        epoch: int,
        first: int,
        num_workers: int,
    ) -> Iterator[Batch]:
        """Put labels and rows beside the pixels.

        Args:
            batches: the rows of each batch, as the sampler gives them.
            decoded: of each batch, pixels (views_per_row * B, S, S, 3) uint8, all first views
                before all second ones, and rows (views_per_row * B,) int64 in the same order.
            epoch: in [0, 2**63).
            first: number of the first batch.
            num_workers: threads that may draw contrast rows.
        """
        drawn: Iterator[torch.Tensor | None] = itertools.repeat(None)
        if self.contrast is not None:
            drawn = contrast_batches(
                self.contrast, self.labels, batches, epoch=epoch, num_workers=num_workers
            )
        # `map`, here and below: the variable of a loop would keep a batch alive that the caller
        # has let go of.
        return map(self._put_together, itertools.count(first), batches, decoded, drawn)

    def finished(self, batches: Iterator[Batch], *, slot: int) -> Iterator[Given]:
        """Send batches to the device, on a GPU one ahead of the caller, and normalize them there.

        Args:
            batches: on the host.
            slot: in [0, 2**63), of the views: if a view recurs, all that belongs to it does.
        """
        sent = map(self._send, batches)
        ahead = one_ahead(sent) if self.normalize.device.type == "cuda" else sent
        return map(partial(self._finish, slot=slot), ahead)

    def _put_together(
        self,
        number: int,
        asked: NDArray[np.int64],
        decoded: tuple[torch.Tensor, NDArray[np.int64]],
        drawn: torch.Tensor | None,
    ) -> Batch:
        pixels, rows = decoded
        rows = rows[: len(rows) // self.views_per_row]
        columns = {"pixels": pixels, "labels": torch.from_numpy(self.labels[rows])}
        if "rows" in self.fields:
            columns["rows"] = torch.from_numpy(rows)
        if drawn is not None:
            kept = torch.from_numpy(np.isin(asked, rows))  # all but those left out
            columns["contrast_rows"] = drawn if len(rows) == len(asked) else drawn[kept]
        return Batch(number, rows, Parts(columns))

    def _send(self, batch: Batch) -> Batch:
        return batch._replace(parts=send(batch.parts, self.normalize.device))

    def _finish(self, batch: Batch, *, slot: int) -> Given:
        """Make of a sent batch what the caller gets, in the current stream."""
        values = batch.parts.received()
        *earlier, last = values["pixels"].chunk(self.views_per_row)
        if self.transform is not None:
            last = transformed(last, self.transform, batch.rows, seed=self.seed, slot=slot)
        views = map(self.normalize, [*earlier, last])
        values |= dict(zip(("images", "second_images"), views, strict=False))
        if self.cache is not None:
            values["teacher_logits"] = self._teacher_logits(self.cache, batch.rows, slot)
        if "host_rows" in self.fields:
            values["host_rows"] = torch.from_numpy(batch.rows)
        return Given(batch.number, tuple(values[name] for name in self.fields))

    def _teacher_logits(
        self, cache: TeacherCache, rows: NDArray[np.int64], slot: int
    ) -> torch.Tensor:
        logits = torch.from_numpy(cache.logits(rows, slot))
        device = self.normalize.device
        # From pinned memory the copy runs while the device still works on the last step.
        return (
            logits.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else logits
        )


@dataclass(frozen=True)
class Normalizer:
    """Brings pixels to the device and normalizes them there.

    Attributes:
        device: where batches are delivered.
        mean: per channel, of pixel values in [0, 1].
        std: per channel, of pixel values in [0, 1].
        dtype: torch.float32, torch.float16, torch.bfloat16, or torch.uint8 for pixels as they are.
    """

    device: torch.device
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: torch.dtype
    _memory: BatchMemory = field(default_factory=BatchMemory)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalize a batch.

        Args:
            pixels: (B, S, S, 3) uint8.

        Returns:
            (B, 3, S, S) on the device, channels_last: (pixel / 255 - mean) / std, or uint8.
        """
        pixels = pixels.to(self.device, non_blocking=True)
        if self.dtype == torch.uint8:
            return pixels.permute(0, 3, 1, 2)
        batch, size = pixels.shape[:2]
        # Whole lines of S x 3 values, because a last axis of three does not vectorize.
        lines = pixels.reshape(batch * size, size * 3)
        scale, shift = _scale_and_shift(self.mean, self.std, size, pixels.device)
        if pixels.is_cuda:
            lines = lines.to(torch.float32).mul_(scale).add_(shift)
        else:
            floats = self._memory.take(tuple(lines.shape), torch.float32)
            _normalize(lines.numpy(), scale.numpy(), shift.numpy(), floats.numpy())
            lines = floats
        # The bytes lie as (B, S, S, 3), which is what channels_last means for (B, 3, S, S).
        return lines.to(self.dtype).view(batch, size, size, 3).permute(0, 3, 1, 2)


@cached(Path(__file__), nogil=True)
def _normalize(lines: Any, scale: Any, shift: Any, floats: Any) -> None:
    """Fill `floats` with lines * scale + shift, in one pass and without waking torch's threads."""
    for i in range(lines.shape[0]):
        for k in range(lines.shape[1]):
            floats[i, k] = lines[i, k] * scale[k] + shift[k]


@lru_cache(maxsize=16)
def _scale_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factor and the addend of each of a line's S x 3 pixel values."""
    scale = 1 / (255 * torch.tensor(std))
    shift = -torch.tensor(mean) * 255 * scale
    return scale.repeat(size).to(device), shift.repeat(size).to(device)


def transformed(
    pixels: torch.Tensor, transform: Transform, rows: NDArray[np.int64], *, seed: int, slot: int
) -> torch.Tensor:
    """Apply a random transform to each image, seeded by (seed, slot, row).

    Args:
        pixels: (B, S, S, 3) uint8, on any device.
        transform: from (3, S, S) uint8 to (3, S, S) uint8, drawing from torch's generators, such as
            `torchvision.transforms.v2.RandAugment()`.
        rows: (B,) int64.
        seed: in [0, 2**63).
        slot: in [0, 2**63).

    Returns:
        (B, S, S, 3) uint8 on the same device.
    """
    devices = [pixels.device] if pixels.is_cuda else []
    images = []
    with torch.random.fork_rng(devices):
        for row, image in zip(rows, pixels, strict=True):
            number = view_number(seed, int(row), slot)
            # Not torch.manual_seed, which reseeds every GPU, also those whose state is not kept.
            torch.default_generator.manual_seed(number)
            if pixels.is_cuda:
                with torch.cuda.device(pixels.device):
                    torch.cuda.manual_seed(number)
            images.append(transform(image.permute(2, 0, 1)))
    return torch.stack(images).permute(0, 2, 3, 1).contiguous()


def choose_device(name: str | torch.device) -> torch.device:
    """Return the device asked for; "auto" is CUDA where it is there, else the CPU.

    Raises:
        InvalidValueError: no such device, or CUDA is asked for where torch sees none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InvalidValueError(
            f"torch does not know the device {name!r}. Use auto, cpu, cuda or cuda:1."
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InvalidValueError(f"device {name!r}: torch sees no CUDA device here. Use cpu.")
    return device
