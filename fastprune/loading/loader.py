"""The loader: batches of a beton's kept rows, ready to train on."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastprune.beton.reader import open_beton
from fastprune.errors import InvalidValueError
from fastprune.loading.augment import AUGMENTS, Recipe
from fastprune.loading.device import choose_device
from fastprune.loading.engine import make_engine
from fastprune.loading.kept import SubsetLike, kept_rows
from fastprune.loading.order import ORDERS, TAILS, Plan
from fastprune.loading.pixels import IMAGENET_MEAN, IMAGENET_STD, Normalizer

LAYOUTS = ("xy", "xyi")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class KeptImages:
    """What other codebases ask of `loader.dataset`.

    Attributes:
        targets: (K,) int64, the label of every kept row.
        classes: name of every class; the label itself where the beton knows no names.
    """

    targets: NDArray[np.int64]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.targets)


class Loader:
    """Batches of the kept rows of a beton.

    Each `iter()` is one epoch: the next one, or the one told by `set_epoch`. What an epoch holds,
    and how each image is cropped, depends on (seed, epoch, subset) alone: not on the number of
    workers or ranks, and not on where a run was resumed. Batches belong to the caller, and
    iterators may be left at any time.

    Attributes:
        beton: the open beton.
        dataset: labels and class names of the kept rows, for code that asks for `loader.dataset`.
        batch_size: rows per batch and rank.
        device: where batches are delivered.
    """

    def __init__(
        self,
        beton: str | Path,
        subset: SubsetLike = None,
        *,
        batch_size: int = 256,
        train: bool = True,
        backend: str = "auto",
        device: str | torch.device = "auto",
        image_size: int = 224,
        augment: str | None = None,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        dtype: torch.dtype = torch.float32,
        order: str | None = None,
        seed: int = 0,
        tail: str | None = None,
        layout: str = "xy",
        raw: bool = False,
        num_workers: int | None = None,
        distributed: str | tuple[int, int] | None = "auto",
    ):
        """Open the beton, check the subset against it, and start the engine.

        Args:
            beton: the file.
            subset: the kept rows: a file, a `Subset`, an array of rows, or None for all rows.
            batch_size: rows per batch and rank.
            train: chooses the defaults of `augment`, `order` and `tail`.
            backend: "ffcv" decodes on the CPU; "auto" takes what is installed.
            device: where batches are delivered; "auto" is CUDA where it is there, else the CPU.
            image_size: S, side of the square images in a batch, in pixels.
            augment: "rrc" (RandomResizedCrop and flip; default for training above 64 pixels),
                "pad_crop" (shift and flip; default for training up to 64 pixels), "center" (the
                central square, 0.875 of the shorter side above 64 pixels, all of it up to there;
                default for evaluation), or "none" (the whole image).
            mean: per channel, of pixel values in [0, 1].
            std: per channel, of pixel values in [0, 1].
            dtype: of the images: torch.float32, torch.float16 or torch.bfloat16.
            order: "random" (default for training) or "sequential".
            seed: of order and views.
            tail: what becomes of rows that fill no batch: "drop" (default for training), "pad"
                (repeats rows, see `num_repeated`) or "exact" (uneven last batches; the default for
                evaluation).
            layout: "xy" for (images, labels), "xyi" for (images, labels, rows).
            raw: deliver uint8 pixels, not normalised.
            num_workers: decoding threads; None for one per usable CPU.
            distributed: "auto" shares the epoch among torch.distributed's ranks when the process
                group is there; (rank, world) names them; None gives this process all rows.

        Raises:
            BetonError: the beton is missing or damaged.
            ArtifactMismatch: the subset was made from other images.
            InvalidValueError: an argument is outside its domain, or there is no full batch.
            MissingDependencyError: the engine's package is not installed.
        """
        _require_one_of("augment", augment, (None, *AUGMENTS))
        _require_one_of("order", order, (None, *ORDERS))
        _require_one_of("tail", tail, (None, *TAILS))
        _require_one_of("layout", layout, LAYOUTS)
        _require_one_of("dtype", dtype, _DTYPES)
        _require_at_least("batch_size", batch_size, 1)
        _require_at_least("image_size", image_size, 1)
        _require_at_least("seed", seed, 0)
        if num_workers is not None:
            _require_at_least("num_workers", num_workers, 1)
        self.batch_size = batch_size
        self.beton = open_beton(beton)
        self._order = order or ("random" if train else "sequential")
        self._tail = tail or ("drop" if train else "exact")
        self._layout = layout
        self._seed = seed
        self._distributed = distributed
        self._recipe = Recipe.make(augment, image_size=image_size, train=train)
        self.device = choose_device(device)
        self._normalize = Normalizer(self.device, mean, std, None if raw else dtype)
        self._next_epoch = 0
        self._use(kept_rows(subset, self.beton))
        self._engine = make_engine(
            backend,
            self.beton,
            image_size=image_size,
            num_workers=num_workers or len(os.sched_getaffinity(0)),
            device=self.device,
        )

    @property
    def rows(self) -> NDArray[np.int64]:
        """The kept rows: (K,) int64, sorted and unique."""
        return self._rows

    @property
    def num_classes(self) -> int:
        """Classes in the beton, also those of which no row is kept."""
        return self.beton.num_classes

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Name of every class; None where the beton has no manifest with names."""
        return self.beton.class_names

    @property
    def num_repeated(self) -> int:
        """Rows that an epoch repeats over all ranks to fill its batches; 0 but for tail="pad"."""
        return self._plan().num_repeated()

    @property
    def num_warnings(self) -> int:
        """Images so far that the decoder complained of and decoded all the same."""
        return self._engine.num_warnings

    def __len__(self) -> int:
        """Batches of this rank in an epoch."""
        return self._plan().num_batches()

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        """Start the next epoch, or the one told by `set_epoch`.

        Yields:
            images (B, 3, S, S) on the device, channels_last; labels (B,) int64 on the device; for
            "xyi" also the rows of the beton, (B,) int64 on the device.

        Raises:
            LoadingError: a row cannot be decoded, a decoding thread died, or the file changed.
        """
        epoch, self._next_epoch = self._next_epoch, self._next_epoch + 1
        return self._epoch(epoch, self._plan().batches(epoch))

    def set_epoch(self, epoch: int) -> None:
        """Name the epoch that the next `iter()` runs.

        Raises:
            InvalidValueError: the epoch is negative.
        """
        _require_at_least("epoch", epoch, 0)
        self._next_epoch = epoch

    def warm_up(self) -> None:
        """Compile and decode one batch that nobody sees, so that no clock counts it later."""
        rows = self._rows[: self.batch_size]
        for pixels, decoded in self._engine.decode([rows], partial(self._views, epoch=0)):
            self._deliver(pixels, decoded)

    def _use(self, rows: NDArray[np.int64]) -> None:
        """Make these the kept rows."""
        self._rows = rows
        names = self.beton.class_names
        self.dataset = KeptImages(
            targets=self.beton.labels[rows],
            classes=names or tuple(str(label) for label in range(self.beton.num_classes)),
        )
        self._plan()

    def _plan(self) -> Plan:
        """The epochs of this rank, as many ranks as there are now."""
        rank, world = _rank_and_world(self._distributed)
        plan = Plan(self._rows, self.batch_size, self._order, self._seed, self._tail, rank, world)
        if self._tail == "drop" and plan.num_batches() == 0:
            ranks = f" on each of {world} ranks" if world > 1 else ""
            raise InvalidValueError(
                f"{len(self._rows):,} kept rows of {self.beton.path} fill no batch of "
                f'{self.batch_size:,}{ranks}. Use a smaller batch_size, or tail="pad" or "exact".'
            )
        return plan

    def _epoch(
        self, epoch: int, batches: list[NDArray[np.int64]]
    ) -> Iterator[tuple[torch.Tensor, ...]]:
        """Decode and deliver these batches."""
        for pixels, rows in self._engine.decode(batches, partial(self._views, epoch=epoch)):
            yield self._deliver(pixels, rows)

    def _views(self, rows: NDArray[np.int64], *, epoch: int) -> NDArray[np.int32]:
        """One view of each row."""
        return self._recipe.views(
            rows,
            self.beton.widths[rows].astype(np.int64),
            self.beton.heights[rows].astype(np.int64),
            seed=self._seed,
            epoch=epoch,
        )

    def _deliver(self, pixels: torch.Tensor, rows: NDArray[np.int64]) -> tuple[torch.Tensor, ...]:
        """Put a decoded batch together as the layout says."""
        columns = (
            [self.beton.labels[rows], rows] if self._layout == "xyi" else [self.beton.labels[rows]]
        )
        numbers = (torch.from_numpy(column) for column in columns)
        return self._normalize(pixels), *(column.to(self.device) for column in numbers)


def _rank_and_world(distributed: str | tuple[int, int] | None) -> tuple[int, int]:
    """This process among those that share an epoch."""
    if distributed is None:
        return 0, 1
    if distributed == "auto":
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1
    match distributed:
        case (int(rank), int(world)) if 0 <= rank < world:
            return rank, world
    raise InvalidValueError(
        f'distributed must be "auto", None or (rank, world) with 0 <= rank < world, not '
        f"{distributed!r}."
    )


def _require_one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Refuse a value that is none of those allowed."""
    if value not in allowed:
        choices = ", ".join(repr(choice) for choice in allowed)
        raise InvalidValueError(f"{name} must be one of {choices}, not {value!r}.")


def _require_at_least(name: str, value: int, least: int) -> None:
    """Refuse a number below its domain."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise InvalidValueError(f"{name} must be an integer >= {least}, not {value!r}.")
