"""From decoded pixels to the batch a training loop gets: to the device, normalized, arranged."""

import contextlib
import math
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastprune.compile_cache import cached
from fastprune.errors import InvalidValueError
from fastprune.loading.cached_logits import CachedLogits

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
        cached: looks up the teacher's logits for the layouts that have them.
    """

    layout: str
    labels: NDArray[np.int64]
    normalize: "Normalizer"
    seed: int
    transform: Transform | None
    contrast: "ContrastRows | None" = None
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

    def __call__(
        self, pixels: torch.Tensor, rows: NDArray[np.int64], *, epoch: int, slot: int
    ) -> tuple[Any, ...]:
        """Put one batch together.

        Args:
            pixels: (views_per_row * B, S, S, 3) uint8, all first views before all second ones.
            rows: (views_per_row * B,) int64, in the same order.
            epoch: in [0, 2**63), of the contrast rows.
            slot: in [0, 2**63), of the views: what recurs with a view, recurs as a whole.

        Returns:
            On the device, "xy": (images, labels); "xyi": (images, labels, rows); "xyit": (images,
            labels, rows, teacher's logits), and `Holes` where they are marked; "xy_supp":
            (images, labels, {"rows": rows}); "xyi_contrast": (images, labels, rows, contrast
            rows); "two_view": ((images, images), labels, rows).
        """
        pixels = pixels.to(self.normalize.device, non_blocking=True)
        *earlier, pixels = pixels.chunk(self.views_per_row)
        rows = rows[: len(pixels)]
        if self.transform is not None:
            pixels = transformed(pixels, self.transform, rows, seed=self.seed, slot=slot)
        views = (*map(self.normalize, earlier), self.normalize(pixels))
        images = views if self.layout == "two_view" else views[0]
        labels = self.labels[rows]
        columns = [labels] if self.layout == "xy" else [labels, rows]
        if self.contrast is not None:
            columns.append(self.contrast.draw(rows, labels, epoch=epoch))
        batch = [_send(column, self.normalize.device) for column in columns]
        supplement: dict[str, Any] = {"rows": batch[-1]}
        if self.cached is not None:
            logits, holes = self.cached.look_up(rows, slot)
            if self.layout == "xyit":
                return images, *batch, logits, *([holes] if self.cached.marks_holes else [])
            # Where torchdistill looks for what its teacher said; "." is the whole network.
            extracted = {".": {"output": logits}}
            supplement["cached_data"] = {"teacher_outputs": logits, "extracted_outputs": extracted}
        return (images, batch[0], supplement) if self.layout == "xy_supp" else (images, *batch)


def _send(column: NDArray[np.int64], device: torch.device) -> torch.Tensor:
    """Numbers of a batch on the device; the host does not wait for their copy."""
    tensor = torch.from_numpy(column)
    # From pageable memory the copy would wait for all the work that the device has to do.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


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
    _memory: "BatchMemory" = field(default_factory=lambda: BatchMemory())

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
            number = int(_stream(seed, int(row), slot).random_raw() >> np.uint64(1))
            # Not torch.manual_seed, which reseeds every GPU, also those whose state is not kept.
            torch.default_generator.manual_seed(number)
            if pixels.is_cuda:
                with torch.cuda.device(pixels.device):
                    torch.cuda.manual_seed(number)
            images.append(transform(image.permute(2, 0, 1)))
    return torch.stack(images).permute(0, 2, 3, 1).contiguous()


class ContrastRows:
    """Draws the rows that contrastive representation distillation compares a row with.

    The first is the row itself, the others are kept rows of other classes, drawn with replacement;
    a pure function of (seed, epoch, row).

    Source: Tian et al. 2020, "Contrastive Representation Distillation".
    """

    def __init__(
        self, rows: NDArray[np.int64], labels: NDArray[np.int64], *, num_negatives: int, seed: int
    ):
        """Sort the rows by class.

        Args:
            rows: (K,) int64, the kept rows.
            labels: (K,) int64, their labels.
            num_negatives: rows of other classes to draw for each row.
            seed: in [0, 2**63).

        Raises:
            InvalidValueError: all rows are of one class.
        """
        by_class = np.argsort(labels, kind="stable")
        self._rows = rows[by_class]
        classes, self._start, self._count = np.unique(
            labels[by_class], return_index=True, return_counts=True
        )
        if len(classes) < 2:
            raise InvalidValueError(
                'layout="xyi_contrast" needs kept rows of at least two classes, but all are of '
                f"class {classes[0]}. Keep more classes, or use another layout."
            )
        self._classes = classes
        self._num_negatives = num_negatives
        self._seed = seed

    def draw(
        self, rows: NDArray[np.int64], labels: NDArray[np.int64], *, epoch: int
    ) -> NDArray[np.int64]:
        """Draw the contrast rows of a batch: (B, 1 + num_negatives) int64."""
        drawn = np.empty((len(rows), 1 + self._num_negatives), np.int64)
        drawn[:, 0] = rows
        which = np.searchsorted(self._classes, labels)
        for i, c in enumerate(which):
            start, count = self._start[c], self._count[c]
            raw = _stream(self._seed, int(rows[i]), epoch).random_raw(self._num_negatives)
            # A position among the rows of other classes, by the top 32 bits; those of the own
            # class, which lie together, are stepped over.
            others = np.uint64(len(self._rows) - count)
            position = ((raw >> np.uint64(32)) * others >> np.uint64(32)).astype(np.int64)
            drawn[i, 1:] = self._rows[position + count * (position >= start)]
        return drawn


def _stream(seed: int, row: int, epoch_or_slot: int) -> np.random.Philox:
    """Start random numbers that no other (seed, row, epoch or slot) shares."""
    # The last counter word sets them apart from the orders' streams, which start at 0.
    counter = np.array([0, 0, epoch_or_slot, 1], np.uint64)
    return np.random.Philox(key=np.array([seed, row], np.uint64), counter=counter)


class BatchMemory:
    """Lends tensors on the CPU whose memory comes back when the last reference to it goes.

    The system hands out large blocks page by page on first touch, which takes longer than filling
    them. A batch that the caller still holds, or a view of it, is never given out again.
    """

    def __init__(self, *, most_free: int = 4):
        self._free: list[np.ndarray[tuple[int], np.dtype[np.uint8]]] = []
        self._most_free = most_free

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return an uninitialized tensor.

        Args:
            shape: of the tensor.
            dtype: of the tensor.

        Returns:
            A contiguous tensor on the CPU.
        """
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes == 0:
            return torch.empty(shape, dtype=dtype)
        block = self._fitting(num_bytes)
        # The tensor holds this array, which dies with the tensor's storage.
        lent = block[:num_bytes]
        weakref.finalize(lent, self._give_back, block).atexit = False
        return torch.from_numpy(lent).view(dtype).view(shape)

    def _fitting(self, num_bytes: int) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
        """Return a free block that is large enough, or a new one."""
        # Asked for before it is looked at: iterators in other threads take from the list, too.
        with contextlib.suppress(IndexError):
            while len(block := self._free.pop()) < num_bytes:
                pass
            return block
        return np.empty(num_bytes, np.uint8)

    def _give_back(self, block: "np.ndarray[tuple[int], np.dtype[np.uint8]]") -> None:
        """Keep a block for the next batch, unless there are plenty."""
        if len(self._free) < self._most_free:
            self._free.append(block)


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
