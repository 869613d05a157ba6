"""DALI's own reader over a beton: no Python between the file and the batch.

Its rows are exactly those of the subset, each once in an epoch. Their order, which comes out of a
shuffle buffer, and their boxes are DALI's own and not those of the other orders.
"""

import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import nvidia.dali.fn
import nvidia.dali.types
import torch
from numpy.typing import NDArray
from nvidia.dali.pipeline import pipeline_def

from fastprune.beton.dali_index import write_dali_index
from fastprune.beton.reader import Beton
from fastprune.errors import LoadingError
from fastprune.loading.augment import Recipe
from fastprune.loading.dali_pipeline import require_nvjpeg
from fastprune.loading.device import Copies, cuda_index
from fastprune.loading.faults import FileWatch
from fastprune.loading.order import Plan

fn: Any = nvidia.dali.fn
types: Any = nvidia.dali.types

_SHUFFLE_BUFFER_ROWS = 1024


class NativeReader:
    """Epochs of a subset, read by DALI alone."""

    name = "dali"

    def __init__(
        self,
        beton: Beton,
        *,
        recipe: Recipe,
        image_size: int,
        num_workers: int,
        device: torch.device,
    ):
        self._beton = beton
        self._recipe = recipe
        self._image_size = image_size
        self._num_workers = num_workers
        self._device = device
        self._file = FileWatch(beton)
        folder = tempfile.mkdtemp(prefix="fastprune-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._copies = Copies()
        self._decoder_is_known = False
        self._indexed: NDArray[np.int64] | None = None
        self._index = Path(folder) / "rows.idx"

    def use(self, rows: NDArray[np.int64]) -> None:
        """Write the index that makes DALI read these rows.

        Raises:
            BetonError: the beton is not laid out for DALI; the text names the cure.
        """
        write_dali_index(self._beton.path, self._index, subset=rows)
        self._indexed = rows

    def epoch(self, plan: Plan, epoch: int) -> Iterator[tuple[torch.Tensor, NDArray[np.int64]]]:
        """Read an epoch of this rank, on its share of the subset, another one in each epoch.

        Args:
            plan: the rows, ranks, batch size and tail.
            epoch: in [0, 2**63).

        Yields:
            (n, S, S, 3) uint8 pixels that belong to the caller, and their (n,) rows.

        Raises:
            LoadingError: an image cannot be decoded, or the file changed.
        """
        if self._indexed is not plan.rows:
            self.use(plan.rows)
        if plan.tail == "exact":
            shard, remaining = plan.rank, plan.num_mine()
        else:
            shard = (plan.rank + epoch) % plan.world
            remaining = plan.num_batches() * plan.batch_size
        if remaining == 0:
            return
        pipeline = self._pipeline(plan, shard, epoch)
        for _ in range(plan.num_batches()):
            self._file.check()
            pixels, rows = self._next(pipeline)
            yield pixels[:remaining], rows[:remaining]
            remaining -= plan.batch_size

    def _pipeline(self, plan: Plan, shard: int, epoch: int) -> Any:
        """A fresh pipeline, so that no epoch begins with what the last one left over."""
        key = np.array([plan.seed, epoch], np.uint64)
        pipeline = _read(
            beton_path=str(self._beton.path),
            index_path=str(self._index),
            recipe=self._recipe,
            image_size=self._image_size,
            mixed=self._device.type == "cuda",
            shuffle_rows=_SHUFFLE_BUFFER_ROWS,
            shard=shard,
            num_shards=plan.world,
            batch_size=plan.batch_size,
            num_threads=self._num_workers,
            device_id=cuda_index(self._device),
            seed=int(np.random.Philox(key=key).random_raw() >> 33),
        )
        pipeline.build()
        return pipeline

    def _next(self, pipeline: Any) -> tuple[torch.Tensor, NDArray[np.int64]]:
        """The next batch in memory of its own."""
        try:
            pixels, names = pipeline.run()
        except RuntimeError as error:
            raise LoadingError(
                f"DALI's reader failed on {self._beton.path}: {error}\nIt does not say on which "
                f"row; find it with `fastprune check {self._beton.path} --deep`, or use "
                'order="random", which names and skips such rows.'
            ) from error
        if self._device.type == "cuda" and not self._decoder_is_known:
            require_nvjpeg()
            self._decoder_is_known = True
        owned = self._copies.of(torch.utils.dlpack.from_dlpack(pixels.as_tensor()))
        # A sample's source is path:offset:name, and the index names every sample by its row.
        rows = [int(bytes(names.at(i)).rsplit(b":", 1)[1]) for i in range(len(names))]
        return owned, np.array(rows, np.int64)


@pipeline_def
def _read(
    beton_path: str,
    index_path: str,
    recipe: Recipe,
    image_size: int,
    mixed: bool,
    shuffle_rows: int,
    shard: int,
    num_shards: int,
) -> Any:
    """The beton -> decoded, augmented pixels (S, S, 3) and the name of each row."""
    jpegs, _ = fn.readers.webdataset(
        paths=[beton_path],
        index_paths=[index_path],
        ext=["jpg", "cls"],
        dtypes=[types.UINT8, types.INT64],
        missing_component_behavior="error",
        random_shuffle=True,
        initial_fill=shuffle_rows,
        shard_id=shard,
        num_shards=num_shards,
    )
    images = _augmented(jpegs, recipe, image_size, "mixed" if mixed else "cpu")
    return images, fn.get_property(jpegs, key="source_info")


def _augmented(jpegs: Any, recipe: Recipe, size: int, device: str) -> Any:
    """The recipe in DALI's operators and with its random numbers."""
    decoding = {
        "device": device,
        "output_type": types.RGB,
        "adjust_orientation": False,
        "jpeg_fancy_upsampling": True,
    }
    resizing = {"interp_type": types.INTERP_LINEAR, "antialias": True}
    if recipe.kind == "rrc":
        images = fn.decoders.image_random_crop(
            jpegs,
            random_area=list(recipe.scale),
            random_aspect_ratio=list(recipe.ratio),
            **decoding,
        )
        images = fn.resize(images, size=[size, size], **resizing)
        return fn.flip(images, horizontal=fn.random.coin_flip())
    images = fn.decoders.image(jpegs, **decoding)
    if recipe.kind == "center":
        images = fn.resize(images, resize_shorter=round(size / recipe.center_ratio), **resizing)
        return fn.crop(images, crop=[size, size])
    images = fn.resize(images, size=[size, size], **resizing)
    if recipe.kind == "pad_crop":
        choices = [float(shift) for shift in range(-recipe.padding, recipe.padding + 1)]
        start = fn.cast(fn.random.uniform(values=choices, shape=[2]), dtype=types.INT32)
        images = fn.slice(
            images, start=start, shape=[size, size], axes=[0, 1], out_of_bounds_policy="pad"
        )
        images = fn.flip(images, horizontal=fn.random.coin_flip())
    return images
