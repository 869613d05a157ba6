"""For training loops around `ffcv.Loader`: our view decoder as FFCV's field decoder.

    from fastprune.adapters.ffcv import ViewDecoder, ViewOrder

    decoder = ViewDecoder(224, seed=1)
    loader = ffcv.Loader("train.beton", batch_size=256, num_workers=8,
                         order=ViewOrder(decoder),  # or any order of FFCV's
                         pipelines={"image": [decoder, ToTensor(), ...], "label": [...]})

FFCV's thread dies silently of an error, and its consumer waits forever. So a row that cannot be
decoded becomes black pixels, and `decoder.failures` holds the row and the reason.
"""

import copy
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from fastprune.base.checks import require_at_least, require_one_of
from fastprune.base.errors import InvalidValueError, MissingDependencyError
from fastprune.base.threads import ThreadDiedError, WorkerThreads
from fastprune.decoding.cpu import chunks
from fastprune.decoding.pixels import Outcome, RowDecoder, StoredImages
from fastprune.loading.crops import AUGMENTS, CropPolicy
from fastprune.loading.sampler import EpochSampler, this_rank

try:
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.traversal_order.base import TraversalOrder
except ImportError as error:
    raise MissingDependencyError(
        f"this needs the package ffcv ({error}), which is built from source: `fastprune doctor` "
        'shows how. backend="cpu" decodes the same views without it.'
    ) from error

# By number, because what FFCV compiles may capture a number, but would pickle a decoder.
_DECODERS: "weakref.WeakValueDictionary[int, ViewDecoder]" = weakref.WeakValueDictionary()

_SIDES = ("width", "height")

DrawViews = Callable[[NDArray[np.int64]], NDArray[np.int32]]


@dataclass(frozen=True)
class _Epoch:
    """An epoch under a `ViewOrder`: its order, its views, and its failures by row."""

    order: "weakref.ref[NDArray[np.int64]]"
    draw_views: DrawViews
    failures: dict[int, str] = field(default_factory=dict)


class ViewDecoder(SimpleRGBImageDecoder):
    """Decodes a view of each row: (S, S, 3) uint8, the pixels of `Loader(backend="cpu")`.

    A view is a pure function of (seed, epoch, row). Under a `ViewOrder` the epoch is FFCV's. Under
    any other order the decoder counts how often it decoded the row before: the same number as long
    as every epoch is whole, and no view is repeated either way.

    Replaces FFCV's `RandomResizedCropRGBImageDecoder` and `RandomHorizontalFlip`.

    Attributes:
        failures: why a row could not be decoded, by row; its pixels were black.
        num_decoded_whole: views so far of JPEGs that Pillow had to decode, most of them
            progressive.
    """

    def __init__(self, size: int | tuple[int, int], *, seed: int = 0, augment: str = "rrc"):
        """Check the arguments.

        Args:
            size: S, side of the square output in pixels; FFCV's (S, S) is accepted too.
            seed: of the views, in [0, 2**63).
            augment: "rrc", "pad_crop", "center" or "none", as in `Loader`.
        """
        super().__init__()
        side, *others = size if isinstance(size, tuple | list) else (size,)
        if others not in ([], [side]):
            raise InvalidValueError(f"size must be one number or a square, not {size!r}.")
        require_at_least("size", side, 1)
        require_at_least("seed", seed, 0)
        require_one_of("augment", augment, AUGMENTS)
        self.failures: dict[int, str] = {}
        self.num_decoded_whole = 0
        self._image_size = side
        self._seed = seed
        self._policy = CropPolicy.make(augment, image_size=side, train=True)
        self._decoder = RowDecoder(side)
        self._threads: WorkerThreads | None = None
        self._visits = np.empty(0, np.int64)
        self._epochs: list[_Epoch] = []
        _DECODERS[id(self)] = self

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, Any]:
        """Tell FFCV the shape of a row."""
        shape, dtype = (self._image_size, self._image_size, 3), np.dtype("u1")
        state = replace(previous_state, jit_mode=True, shape=shape, dtype=dtype)
        return state, AllocationQuery(shape, dtype)

    def generate_code(self) -> Callable[..., Any]:
        """Return what FFCV compiles and calls with each batch."""
        number = id(self)

        def decode(batch_indices, destination, metadata, storage_state):  # type: ignore[no-untyped-def]
            _call_back(number, batch_indices, destination, metadata, storage_state)
            return destination[: len(batch_indices)]

        return decode

    def remember(self, order: NDArray[np.int64], draw_views: DrawViews) -> dict[int, str]:
        """Decode the batches that FFCV cuts from this array of an epoch's rows with these views.

        Returns:
            The dict that this epoch's failures will be added to, by row.
        """
        # Weak, so that an epoch ends with FFCV's iterator, which alone keeps the order alive.
        epoch = _Epoch(weakref.ref(order), draw_views)
        self._epochs = [*(e for e in self._epochs if e.order() is not None), epoch]
        return epoch.failures

    def views(self, rows: NDArray[np.int64], *, epoch: int) -> NDArray[np.int32]:
        """Return the views (n, 7) of rows in an epoch, see `crops.CropPolicy.views`."""
        widths, heights = (self.metadata[side][rows].astype(np.int64) for side in _SIDES)
        return self._policy.views(rows, widths, heights, seed=self._seed, slot=epoch)

    def decode_batch(
        self, batch: NDArray[Any], pixels: NDArray[np.uint8], metadata: Any, storage: Any
    ) -> None:
        """Fill `pixels` with the views of a batch; never raises, see `failures`."""
        rows, pixels = batch.astype(np.int64), pixels[: len(batch)]
        # FFCV's batches are slices of the order it was given. Nothing else tells their epoch here,
        # and batches of two live iterators may arrive in turn.
        epochs = [epoch for epoch in self._epochs if _is_part(batch, epoch.order())]
        try:
            views = epochs[0].draw_views(rows) if epochs else self._next_views(rows, metadata)
            failures = self._decode(rows, views, pixels, _stored_images(metadata[rows], storage))
        except (Exception, ThreadDiedError) as error:
            # A pool with a dead thread would fail every batch; the next one starts its own.
            self._threads = None
            pixels[:] = 0
            failures = dict.fromkeys(rows.tolist(), f"{type(error).__name__}: {error}")
        for known in (self.failures, *(epoch.failures for epoch in epochs)):
            known.update(failures)

    def _decode(
        self,
        rows: NDArray[np.int64],
        views: NDArray[np.int32],
        pixels: NDArray[np.uint8],
        stored: StoredImages,
    ) -> dict[int, str]:
        """Decode on as many threads as FFCV was given; return the failures by row."""
        # FFCV has set Numba's number for its thread, in which this runs.
        num_threads = numba.get_num_threads()
        if self._threads is None:
            self._threads = WorkerThreads(num_threads, name="fastprune-view")
        outcomes: dict[int, Outcome] = {}

        def decode_part(part: slice) -> None:
            outcomes[part.start] = self._decoder.decode(stored[part], views[part], pixels[part])

        parts = chunks(len(rows), num_threads, self._image_size)
        for future in [self._threads.submit(decode_part, part) for part in parts]:
            self._threads.wait(future)
        failures = {}
        for start, outcome in outcomes.items():
            self.num_decoded_whole += len(outcome.whole_kinds)
            for at, reason in outcome.faults.items():
                pixels[start + at] = 0
                failures[int(rows[start + at])] = reason
        return failures

    def _next_views(self, rows: NDArray[np.int64], metadata: Any) -> NDArray[np.int32]:
        """Draw the views of rows outside a `ViewOrder`: each row's epoch is its count of visits."""
        if len(self._visits) != len(metadata):
            self._visits = np.zeros(len(metadata), np.int64)
        slots = self._visits[rows]
        self._visits[rows] += 1
        views = np.empty((len(rows), 7), np.int32)
        for slot in np.unique(slots).tolist():
            now = slots == slot
            views[now] = self.views(rows[now], epoch=slot)
        return views


class ViewOrder(TraversalOrder):
    """The order of `Loader(order="random")` for an `ffcv.Loader`, which knows its epoch.

    `ffcv.Loader(..., order=ViewOrder(decoder), indices=subset)`; with `distributed=True` every rank
    takes its share of torch.distributed's process group, and rows are repeated to fill the last
    round. FFCV leaves out the last, smaller batch unless `drop_last=False`.
    """

    def __init__(self, decoder: ViewDecoder, *, seed: int = 0):
        """Pair an order, with its seed in [0, 2**63), with the decoder in the loader's pipeline."""
        self._decoder = decoder
        self._order_seed = seed

    def __call__(self, loader: Any) -> "ViewOrder":
        """Bind the order to a loader: FFCV calls its `order` argument as if it were a class."""
        bound = copy.copy(self)
        TraversalOrder.__init__(bound, loader)
        return bound

    def sample_order(self, epoch: int) -> NDArray[np.int64]:
        """Return this rank's rows in the order of an epoch."""
        rank, world = this_rank("auto" if self.distributed else None)
        sampler = EpochSampler(
            rows=np.unique(self.indices).astype(np.int64),
            num_rows=self.loader.reader.num_samples,
            batch_size=1,
            order="random",
            seed=self._order_seed,
            tail="pad",
            rank=rank,
            world=world,
        )
        order = sampler.rank_rows(epoch)
        self._decoder.remember(order, partial(self._decoder.views, epoch=epoch))
        return order


@numba.njit
def _call_back(number, batch, pixels, metadata, storage):  # type: ignore[no-untyped-def]
    """Return to Python from the code that FFCV compiles."""
    # FFCV compiles its code again in every process. Our decoder comes compiled from the cache, and
    # only Python knows the epoch and the threads.
    with numba.objmode():
        _decode_batch(number, batch, pixels, metadata, storage)


def _decode_batch(number: int, batch: Any, pixels: Any, metadata: Any, storage: Any) -> None:
    """Hand a batch to the decoder of that number, in FFCV's thread."""
    _DECODERS[number].decode_batch(batch, pixels, metadata, storage)


def _is_part(batch: NDArray[Any], order: NDArray[np.int64] | None) -> bool:
    return order is not None and np.may_share_memory(order, batch)


def _stored_images(fields: Any, storage: Any) -> StoredImages:
    """Find rows in the memory of FFCV's map of the file, or of its cache of pages."""
    content, addresses, num_bytes, *page_to_slot = storage
    pointers = fields["data_ptr"]
    # As FFCV does: the allocation table, sorted by address, knows how long each image is.
    sizes = num_bytes[np.searchsorted(addresses, pointers)].astype(np.int64)
    offsets = pointers.astype(np.int64)
    if page_to_slot:  # os_cache=False
        page, within = np.divmod(offsets, content.shape[1])
        offsets = page_to_slot[0][page].astype(np.int64) * content.shape[1] + within
    content = content.reshape(-1)
    content.flags.writeable = False  # as compiled for
    sides = np.stack([fields["height"], fields["width"]], axis=1)
    return StoredImages(content, offsets, sizes, fields["mode"].copy(), sides)
