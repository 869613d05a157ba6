"""The source of a teacher's logits: its network, or a cache that the network fills."""

import logging
from collections.abc import Callable
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastprune.base.errors import ArtifactError, RecipeError
from fastprune.distillation.context import Batch, Context, Holes
from fastprune.distillation.learner import Outputs, require_logits
from fastprune.distillation.objective import Objective
from fastprune.distillation.progressive_resizing import size_at
from fastprune.loading.loader import Loader
from fastprune.networks import weights_digest
from fastprune.rows.cache_filler import CacheFiller
from fastprune.rows.teacher_cache import TeacherCache

logger = logging.getLogger(__name__)


class Teacher:
    """Asks the network in every step.

    Attributes:
        num_forwards: images that went through the network in this run, on this process.
        num_saved: images whose logits a cache had.
        fill_seconds: spent on writing a cache, beside the training.
    """

    def __init__(self, context: Context, network: nn.Module | None) -> None:
        """Use a frozen network in eval mode on the device; None for a run without a teacher."""
        self._context = context
        self.network = network
        self.num_forwards = self.num_saved = 0
        self.fill_seconds = 0.0

    def look_up(self, batch: Batch) -> Batch:
        """Add the logits that a cache has to a batch."""
        return batch

    def begin_epoch(self, slot: int) -> None:
        """Prepare for the views of a slot."""

    @torch.no_grad()
    def answer(self, batch: Batch) -> Outputs | None:
        """Return features and logits of a batch; None without a teacher."""
        if self.network is None:
            return None
        self.num_forwards += len(batch.images)
        return Outputs(*self.network(batch.images))

    @torch.no_grad()
    def warm_up(self, images: Tensor, num_classes: int) -> Outputs | None:
        """Answer empty images without counting them; refuse an output of other classes."""
        if self.network is None:
            return None
        answer = Outputs(*self.network(images))
        require_logits("teacher", answer.logits, rows=len(images), num_classes=num_classes)
        return answer

    def flush(self, *, is_epoch_done: bool = False) -> None:
        """Write the teacher's logits to the cache; a collective."""

    @property
    def cache_bytes(self) -> int:
        """Size of the cache on disk; 0 without one."""
        return 0

    def state_dict(self) -> dict[str, Any]:
        """Return the counts of all processes; a collective."""
        counts = torch.tensor([self.num_forwards, self.num_saved])
        forwards, saved = self._context.ranks.all_sum(counts).tolist()
        return {"num_forwards": forwards, "num_saved": saved, "fill_seconds": self.fill_seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue counting: on the first process, for all of them."""
        if self._context.ranks.is_first:
            for name, value in state.items():
                setattr(self, name, value)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Release files and threads."""


class CachedTeacher(Teacher):
    """Takes logits from a cache, and asks the network for those that are missing, once.

    The network moves to the device when a slot with missing logits begins, and off it when a
    complete one does.
    """

    def __init__(
        self,
        context: Context,
        network: nn.Module,
        cache: TeacherCache,
        rows: NDArray[np.int64],
    ) -> None:
        """Use a cache, and a frozen network in eval mode on the CPU.

        `rows` are trained on, over all processes.
        """
        super().__init__(context, None)
        self._asleep: nn.Module | None = network
        self._cache, self._rows = cache, rows
        self._filler = CacheFiller(cache)
        self._slot = 0
        self._is_compiled = False
        self._earlier_seconds = 0.0

    def look_up(self, batch: Batch) -> Batch:
        """Add the logits that the cache has to a batch, zeros where it has none."""
        # Right before the step: the step before may have filled a row that comes twice.
        assert batch.host_rows is not None
        rows = batch.host_rows.numpy()
        found, is_found = self._cache.lookup(rows, self._slot)
        positions = np.flatnonzero(~is_found)
        logits = torch.from_numpy(found)
        if batch.images.is_cuda:
            # From pinned memory the copy runs while the device still works on the last step.
            logits = logits.pin_memory().to(batch.images.device, non_blocking=True)
        holes = Holes(self._slot, positions, rows[positions])
        return batch._replace(teacher_logits=logits, holes=holes)

    def begin_epoch(self, slot: int) -> None:
        """Bring the network to the device where logits of the slot are missing."""
        self._slot = slot
        if self._cache.has(self._rows, slot).all():
            self._sleep()
        else:
            self._wake()

    @torch.no_grad()
    def answer(self, batch: Batch) -> Outputs:
        """Return the logits of a batch, rounded as the cache keeps them, without features.

        Raises:
            ArtifactError: the cache lost logits that it had when the epoch began.
        """
        logits, holes = batch.teacher_logits, batch.holes
        assert logits is not None
        assert holes is not None
        self.num_saved += len(batch.images) - len(holes.rows)
        if len(holes.rows):
            if self.network is None:
                raise ArtifactError(
                    f"{self._cache.path} lost logits of slot {holes.slot} while it was trained "
                    "with. Leave its files alone, and resume the run (--resume)."
                )
            self.num_forwards += len(holes.rows)
            is_all = len(holes.rows) == len(batch.images)
            places = torch.from_numpy(holes.positions).to(logits.device, non_blocking=True)
            images = batch.images if is_all else batch.images[places]
            # Rounded, so that this step sees the same logits as every later one.
            rounded = self._put(holes.rows, holes.slot, self.network(images)[1].float())
            logits = rounded if is_all else logits.index_copy(0, places, rounded)
        return Outputs(logits.new_empty(len(logits), 0), logits)

    def _put(self, rows: NDArray[np.int64], slot: int, logits: Tensor) -> Tensor:
        """Store logits, and return them as the cache will give them back."""
        # The cache has no room for rows that a grown subset added: the teacher answers them again.
        held = self._cache.holds(rows)
        # Not rounded: `put` refuses a logit beyond the dtype's range, and names it.
        copy = _host_copy(logits)
        self._filler.put(rows[held], slot, copy if held.all() else lambda: copy()[held])
        if self._cache.dtype == "uint8":
            # Rounded on the host by the reading code, so steps that fill wait for the device.
            rounded = self._cache.round_trip(logits.cpu().numpy(), rows)
            return torch.from_numpy(rounded).to(logits.device)
        # As numpy does, round to nearest even.
        return logits.half().float() if self._cache.dtype == "float16" else logits

    @property
    def cache_bytes(self) -> int:
        """Size of the cache on disk."""
        return self._cache.disk_bytes

    def warm_up(self, images: Tensor, num_classes: int) -> Outputs:
        """Answer zeros: the network is warmed up when it is first needed."""
        return Outputs(images.new_empty(len(images), 0), images.new_zeros(len(images), num_classes))

    def flush(self, *, is_epoch_done: bool = False) -> None:
        """Write the teacher's logits to the cache; a collective."""
        self._filler.flush()
        if is_epoch_done:
            # All have written once this returns.
            self._context.ranks.all_gather(None)
            if self._context.ranks.is_first:
                self._filler.flush(seal=True)
        self.fill_seconds = self._earlier_seconds + self._filler.seconds

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue counting."""
        super().load_state_dict(state)
        self._earlier_seconds = self.fill_seconds

    def __exit__(self, *exception: object) -> None:
        """Write the rest, and end the writing thread."""
        self._filler.close()

    def _wake(self) -> None:
        """Move the network to the device, compile it and warm it up."""
        if self.network is not None:
            return
        context = self._context
        with context.timer.phase("startup"):
            assert self._asleep is not None
            network, self._asleep = self._asleep, None
            network.to(context.device).to(memory_format=context.memory_format)
            if context.recipe.run.compile and not self._is_compiled:
                network.compile()
                self._is_compiled = True
            self.network = network
            data = context.recipe.data
            shape = (data.batch_size, 3, data.image_size, data.image_size)
            images = torch.zeros(shape, device=context.device)
            with torch.no_grad(), context.autocast():
                logits = network(images.contiguous(memory_format=context.memory_format))[1]
            require_logits("teacher", logits, rows=len(images), num_classes=self._cache.num_classes)

    def _sleep(self) -> None:
        """Take the network off the device."""
        if self.network is not None:
            self._asleep, self.network = self.network.cpu(), None


def make_teacher(
    context: Context,
    objective: Objective,
    loader: Loader,
    *,
    num_classes: int,
    epochs: int,
    sizes: tuple[int, ...],
) -> Teacher:
    """Make the source of logits: the network, or the recipe's cache, created if it is missing.

    Args:
        context: of the run.
        objective: holds the network, which a cached teacher takes out of it.
        loader: of the views.
        num_classes: C.
        epochs: of the run.
        sizes: of its images; the last one is the loader's.

    Raises:
        RecipeError: the cache cannot hold logits of images of these sizes.
        ArtifactMismatch: the cache was made from something else, which the error names.
        ArtifactError: the cache is damaged, or its folder cannot be written.
    """
    settings = context.recipe.teacher
    if settings is None or settings.cache is None:
        return Teacher(context, objective.teacher)
    network, objective.teacher = objective.teacher, None
    assert network is not None
    assert loader.num_views is not None, "the recipe is validated"
    policy = loader.view_identity()["view"]["augment"]["kind"]
    if len(sizes) > 1 and policy == "pad_crop":
        raise RecipeError(
            f"teacher.cache holds logits of one image size, and pad_crop's shifts are in pixels of "
            f"it, but data.first_image_size = {sizes[0]} lets images grow to {sizes[-1]}. Train at "
            "one size, or take data.augment = 'rrc', whose boxes are the same at every size."
        )
    # The same record as `difficulty.cache` writes: either may fill the cache of the other.
    teacher = {
        "weights_digest": weights_digest(network.network),
        "precision": context.precision,
    }
    cache = TeacherCache.open_or_create(
        settings.cache,
        rows=loader.rows,
        num_classes=num_classes,
        num_views=loader.num_views,
        identity=loader.view_identity() | {"teacher": teacher},
        dtype=settings.cache_dtype,
    )
    for epoch in range(epochs):
        size, slot = size_at(epoch, sizes, epochs=epochs), loader.slot_of(epoch)
        missing = (~cache.has(loader.rows, slot)).sum() if size != sizes[-1] else 0
        if missing:
            raise RecipeError(
                f"epoch {epoch + 1} shows images of {size} pixels, but the teacher looks at "
                f"{sizes[-1]}, and {settings.cache} lacks the logits of {missing:,} rows in slot "
                f"{slot}. Fill it first (fastprune cache fill), or leave data.first_image_size out."
            )
    num_outside = int((~cache.holds(loader.rows)).sum())
    if num_outside:
        logger.warning(
            "%s was made for %s rows, and has no room for %s of the rows trained on: the teacher "
            "is asked for them in every epoch",
            settings.cache,
            f"{len(cache.rows):,}",
            f"{num_outside:,}",
        )
    return CachedTeacher(context, network, cache, loader.rows)


def _host_copy(logits: Tensor) -> Callable[[], NDArray[np.float32]]:
    """Start a copy to the host; returns a function that waits for it and gives it."""
    if not logits.is_cuda:
        return logits.numpy
    host = torch.empty(logits.shape, dtype=logits.dtype, pin_memory=True)
    host.copy_(logits, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> NDArray[np.float32]:
        copied.synchronize()
        values: NDArray[np.float32] = host.numpy()
        return values

    return wait
