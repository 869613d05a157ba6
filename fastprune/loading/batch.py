"""From decoded pixels to the batch a training loop gets: to the device, normalized, arranged."""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastprune.base.compiled import cached
from fastprune.base.errors import InvalidValueError
from fastprune.decoding.memory import BatchMemory
from fastprune.loading.cached_logits import CachedLogits
from fastprune.loading.contrast import ContrastRows, DrawnAhead
from fastprune.loading.sending import Sent, one_ahead, send

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

LAYOUTS = ("xy", "xyi", "xyit", "xy_supp", "xyi_contrast", "two_view")

Transform = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Collate:
    """Puts batches together.

    Attributes:
        layout: one of `LAYOUTS`.
        labels: (N,) int64, of every row of the beton.
        normalize: brings pixels to the device and normalizes them there.
        seed: of the transform and the contrast rows.
        transform: applied to each image, or to each second view; None for none.
        contrast: draws contrast rows for the layout that has them.
        drawn: those of an epoch's batches.
        cached: looks up the teacher's logits for the layouts that have them.
    """

    layout: str
    labels: NDArray[np.int64]
    normalize: "Normalizer"
    seed: int
    transform: Transform | None
    contrast: ContrastRows | None = None
    drawn: DrawnAhead | None = None
    cached: CachedLogits | None = None

    @property
    def views_per_row(self) -> int:
        """Views of each row in a batch."""
        return 2 if self.layout == "two_view" else 1

    def view_identity(self) -> dict[str, Any]:
        """Return what these settings decide of a view's pixels, as JSON values."""
        return {
            "mean": list(self.normalize.mean),
            "std": list(self.normalize.std),
            "transform": None if self.transform is None else repr(self.transform),
        }

    def keeping(self, rows: NDArray[np.int64], *, num_negatives: int) -> "Collate":
        """Draw contrast rows from these rows (K,), where the layout has any."""
        if self.layout != "xyi_contrast":
            return self
        labels = self.labels[rows]
        contrast = ContrastRows(rows, labels, num_negatives=num_negatives, seed=self.seed)
        return replace(self, contrast=contrast)

    def beginning(
        self, batches: Sequence[NDArray[np.int64]], *, epoch: int, num_workers: int
    ) -> "Collate":
        """Draw the contrast rows of these batches from now on, where the layout has any."""
        if self.contrast is None:
            return self
        drawn = DrawnAhead(
            self.contrast, self.labels, batches, epoch=epoch, num_workers=num_workers
        )
        return replace(self, drawn=drawn)

    def __call__(
        self, decoded: Iterator[tuple[torch.Tensor, NDArray[np.int64]]], *, slot: int
    ) -> Iterator[tuple[Any, ...]]:
        """Put batches together; on a GPU each is sent a batch ahead of the caller.

        Args:
            decoded: pixels (views_per_row * B, S, S, 3) uint8, all first views before all second
                ones, and rows (views_per_row * B,) int64, in the same order.
            slot: in [0, 2**63), of the views: what recurs with a view, recurs as a whole.

        Yields:
            On the device, "xy": (images, labels); "xyi": (images, labels, rows); "xyit": (images,
            labels, rows, teacher's logits), and `Holes` where they are marked; "xy_supp":
            (images, labels, {"rows": rows}); "xyi_contrast": (images, labels, rows, contrast
            rows); "two_view": ((images, images), labels, rows).
        """
        sent = itertools.starmap(self._send, decoded)
        # A `map`, which keeps no batch that its caller has let go of.
        yield from map(
            partial(self._finish, slot=slot),
            one_ahead(sent) if self.normalize.device.type == "cuda" else sent,
        )

    def _send(self, pixels: torch.Tensor, rows: NDArray[np.int64]) -> Sent:
        """Begin to copy a batch to the device."""
        rows = rows[: len(pixels) // self.views_per_row]
        labels = self.labels[rows]
        columns = [labels] if self.layout == "xy" else [labels, rows]
        parts = [pixels, *map(torch.from_numpy, columns)]
        if self.drawn is not None:
            parts.append(self.drawn.take(rows))
        return send(rows, parts, self.normalize.device)

    def _finish(self, sent: Sent, *, slot: int) -> tuple[Any, ...]:
        """Make of what was sent the batch that the caller gets, in the current stream."""
        pixels, *batch = sent.receive()
        *earlier, pixels = pixels.chunk(self.views_per_row)
        if self.transform is not None:
            pixels = transformed(pixels, self.transform, sent.rows, seed=self.seed, slot=slot)
        views = (*map(self.normalize, earlier), self.normalize(pixels))
        images = views if self.layout == "two_view" else views[0]
        supplement: dict[str, Any] = {"rows": batch[-1]}
        if self.cached is not None:
            # Not a batch ahead: what is missing of a row that comes twice may be put in between.
            logits, holes = self.cached.look_up(sent.rows, slot)
            if self.layout == "xyit":
                return images, *batch, logits, *([holes] if self.cached.marks_holes else [])
            # Where torchdistill looks for what its teacher said; "." is the whole network.
            extracted = {".": {"output": logits}}
            supplement["cached_data"] = {"teacher_outputs": logits, "extracted_outputs": extracted}
        return (images, batch[0], supplement) if self.layout == "xy_supp" else (images, *batch)


@dataclass(frozen=True)
class Normalizer:
    """Brings pixels to the device and normalizes them there.

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
        """Normalize a batch.

        Args:
            pixels: (B, S, S, 3) uint8.

        Returns:
            (B, 3, S, S) on the device, channels_last: (pixel / 255 - mean) / std, or uint8.
        """
        pixels = pixels.to(self.device, non_blocking=True)
        if self.dtype is None:
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
    """Return what a line of S x 3 pixel values is multiplied by, and what is added."""
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
            # torch takes seeds of 63 bits.
            number = int(_raw(seed, int(row), slot) >> np.uint64(1))
            # Not torch.manual_seed, which reseeds every GPU, also those whose state is not kept.
            torch.default_generator.manual_seed(number)
            if pixels.is_cuda:
                with torch.cuda.device(pixels.device):
                    torch.cuda.manual_seed(number)
            images.append(transform(image.permute(2, 0, 1)))
    return torch.stack(images).permute(0, 2, 3, 1).contiguous()


def _raw(seed: int, row: int, slot: int) -> np.uint64:
    """Draw a random number that no other (seed, row, slot) shares."""
    # The last counter word sets it apart from the orders' streams, which start at 0.
    counter = np.array([0, 0, slot, 1], np.uint64)
    key = np.array([seed, row], np.uint64)
    number: np.uint64 = np.random.Philox(key=key, counter=counter).random_raw(1)[0]
    return number


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
            f"device {name!r} is none of torch's. Say auto, cpu, cuda or cuda:1."
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InvalidValueError(f"device {name!r}: torch sees no CUDA device here. Say cpu.")
    return device


def cuda_index(device: torch.device) -> int | None:
    """Return a CUDA device's number, the current one where it names none; None for the CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


class Copies:
    """Copies tensors whose memory their library uses again as soon as they are dropped.

    A copy on a GPU waits in torch's stream behind the work of the caller. The library, which works
    in other streams, would not wait for it, so a tensor is held until its copy is made.
    """

    def __init__(self, *, most_held: int = 2):
        self._held: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()
        self._most_held = most_held

    def of(self, lent: torch.Tensor) -> torch.Tensor:
        """Return a copy that belongs to the caller."""
        owned = lent.clone()
        if lent.is_cuda:
            made = torch.cuda.Event()
            made.record(torch.cuda.current_stream(lent.device))
            self._held.append((lent, made))
            if len(self._held) > self._most_held:
                self._held[0][1].synchronize()
            while self._held and self._held[0][1].query():
                self._held.popleft()
        return owned
