"""The DALI engine: decode batches on the GPU (nvJPEG) or, without one, on the CPU.

The order and the boxes are ours: `external_source` hands over slices of the mapped file with a crop
window each, and `decoders.image_slice` decodes what lies in the window.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastprune.beton.layout import JPG
from fastprune.beton.reader import Beton
from fastprune.errors import BetonError, JpegError, LoadingError, MissingDependencyError
from fastprune.jpeg.headers import read_header
from fastprune.loading.augment import FLIP, HEIGHT, LEFT, SHIFT_DOWN, SHIFT_RIGHT, TOP, WIDTH
from fastprune.loading.device import Copies, cuda_index
from fastprune.loading.faults import FileWatch, RowFaults

try:
    import nvidia.dali.fn
    import nvidia.dali.types
    from nvidia.dali.pipeline import pipeline_def
except ImportError as error:
    raise MissingDependencyError(
        f'backend="dali" needs NVIDIA DALI ({error}). Install it with: '
        "pip install fastprune[dali-cuda13]"
    ) from error

# Their stubs know neither dictionaries of arguments nor the constants.
fn: Any = nvidia.dali.fn
types: Any = nvidia.dali.types

_LOG = logging.getLogger(__name__)
_BATCHES_AHEAD = 2


class DaliEngine:
    """Decodes given rows of one beton with given views by DALI; see `engine.Engine`."""

    name = "dali"

    def __init__(
        self,
        beton: Beton,
        *,
        image_size: int,
        num_workers: int,
        device: torch.device,
        faults: RowFaults,
    ):
        self._beton = beton
        self._image_size = image_size
        self._num_workers = num_workers
        self._device = device
        self._faults = faults
        self._file = FileWatch(beton)
        self._copies = Copies()
        self._decoder_is_known = False
        self._header_was_read = np.zeros(beton.num_rows, np.bool_)
        _require_jpegs(beton)

    def decode(
        self,
        batches: Sequence[NDArray[np.int64]],
        draw_views: Callable[[NDArray[np.int64]], NDArray[np.int32]],
    ) -> Iterator[tuple[torch.Tensor, NDArray[np.int64]]]:
        """Decode batches in order, two ahead of the caller; see `engine.Engine.decode`."""
        waiting = deque(batches)
        unusable: set[int] = set()
        while waiting:
            try:
                for pixels, rows in self._run(list(waiting), draw_views, unusable):
                    waiting.popleft()
                    yield pixels, rows
            except RuntimeError as error:
                # DALI neither names the row that failed nor continues after it.
                found: dict[int, str] = {}
                for rows in list(waiting)[: _BATCHES_AHEAD + 1]:
                    unknown = set(rows.tolist()) - unusable - found.keys()
                    found |= self._find_unusable(sorted(unknown))
                if not found:
                    raise LoadingError(
                        f"DALI failed on {self._beton.path}: {_reason(error)}. Start the epoch "
                        "again, or resume it from a state_dict."
                    ) from error
                for row, reason in found.items():
                    self._faults.report(row, reason)
                unusable.update(found)

    def _run(
        self,
        batches: list[NDArray[np.int64]],
        draw_views: Callable[[NDArray[np.int64]], NDArray[np.int32]],
        unusable: set[int],
    ) -> Iterator[tuple[torch.Tensor, NDArray[np.int64]]]:
        """One pipeline over these batches without the unusable rows."""
        fed: deque[NDArray[np.int64]] = deque()
        samples = self._samples(batches, draw_views, unusable, fed)
        pipeline = self._pipeline(samples, max(map(len, batches)))
        while True:
            pixels = self._next_pixels(pipeline)
            while fed and len(fed[0]) == 0:
                size = self._image_size
                yield torch.empty((0, size, size, 3), dtype=torch.uint8), fed.popleft()
            if pixels is None:
                return
            yield pixels, fed.popleft()

    def _samples(
        self,
        batches: list[NDArray[np.int64]],
        draw_views: Callable[[NDArray[np.int64]], NDArray[np.int32]],
        unusable: set[int],
        fed: deque[NDArray[np.int64]],
    ) -> Iterator[tuple[Any, ...]]:
        """Feed the pipeline batch by batch, and note the rows of each batch in `fed`."""
        for rows in batches:
            self._file.check()
            rows = rows[~np.isin(rows, list(unusable))]
            altered = np.unique(rows[self._faults.altered(rows)]).tolist()
            found = dict.fromkeys(altered, "its bytes are not those that were written (CRC-32C)")
            found |= self._broken_headers(rows[~np.isin(rows, altered)])
            for row, reason in found.items():
                self._faults.report(row, reason)
            unusable.update(found)
            rows = rows[~np.isin(rows, list(found))]
            fed.append(rows)
            if len(rows):
                yield self._sample(rows, draw_views(rows))

    def _broken_headers(self, rows: NDArray[np.int64]) -> dict[int, str]:
        """Find the rows whose header no decoder should see; each header is read once."""
        # DALI's CPU decoder can crash the process on a batch in which one image has a bad header.
        found = {}
        for row in np.unique(rows[~self._header_was_read[rows]]).tolist():
            try:
                header = read_header(self._beton.image_bytes(row).tobytes())
            except JpegError as error:
                found[row] = str(error)
                continue
            size = (int(self._beton.widths[row]), int(self._beton.heights[row]))
            if (header.width, header.height) != size:
                found[row] = "its JPEG is not of the size that the beton says"
        self._header_was_read[rows] = True
        return found

    def _sample(self, rows: NDArray[np.int64], views: NDArray[np.int32]) -> tuple[Any, ...]:
        """Stored bytes, anchors, shapes, shifts and flips of these rows."""
        return (
            [self._beton.image_bytes(row) for row in rows],
            np.ascontiguousarray(views[:, [TOP, LEFT]]),
            np.ascontiguousarray(views[:, [HEIGHT, WIDTH]]),
            np.ascontiguousarray(-views[:, [SHIFT_DOWN, SHIFT_RIGHT]]),
            np.ascontiguousarray(views[:, FLIP]),
        )

    def _pipeline(self, samples: Iterator[tuple[Any, ...]], batch_size: int) -> Any:
        """Build a pipeline that reads these samples."""
        pipeline = _decode(
            samples=lambda: next(samples),
            image_size=self._image_size,
            mixed=self._device.type == "cuda",
            size_hint=(int(self._beton.widths.max()), int(self._beton.heights.max())),
            batch_size=batch_size,
            num_threads=self._num_workers,
            device_id=cuda_index(self._device),
            prefetch_queue_depth=_BATCHES_AHEAD,
        )
        pipeline.build()
        return pipeline

    def _next_pixels(self, pipeline: Any) -> torch.Tensor | None:
        """The next batch in memory of its own; None at the end."""
        try:
            (outputs,) = pipeline.run()
        except StopIteration:
            return None
        pixels = self._copies.of(torch.utils.dlpack.from_dlpack(outputs.as_tensor()))
        if self._device.type == "cuda" and not self._decoder_is_known:
            require_nvjpeg()
            self._decoder_is_known = True
        return pixels

    def _find_unusable(self, rows: list[int]) -> dict[int, str]:
        """Find the rows that DALI cannot decode by halving; its reason for each."""
        if not rows:
            return {}
        whole = np.zeros((len(rows), 7), np.int32)
        whole[:, HEIGHT], whole[:, WIDTH] = self._beton.heights[rows], self._beton.widths[rows]
        sample = self._sample(np.array(rows), whole)
        try:
            self._next_pixels(self._pipeline(iter([sample]), len(rows)))
            return {}
        except RuntimeError as error:
            if len(rows) == 1:
                return {rows[0]: _reason(error)}
        half = len(rows) // 2
        return self._find_unusable(rows[:half]) | self._find_unusable(rows[half:])


@pipeline_def
def _decode(samples: Any, image_size: int, mixed: bool, size_hint: tuple[int, int]) -> Any:
    """Stored bytes -> the box, resized, shifted over black, flipped: (S, S, 3) uint8 each."""
    jpegs, anchors, shapes, shifts, flips = fn.external_source(
        source=samples, num_outputs=5, batch=True, no_copy=False
    )
    hints = {"preallocate_width_hint": size_hint[0], "preallocate_height_hint": size_hint[1]}
    images = fn.decoders.image_slice(
        jpegs,
        anchors,
        shapes,
        axes=[0, 1],
        device="mixed" if mixed else "cpu",
        output_type=types.RGB,
        # As PIL, torchvision and FFCV do, which know no orientation and smooth the chroma.
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,
        **(hints if mixed else {}),
    )
    images = fn.resize(
        images, size=[image_size, image_size], interp_type=types.INTERP_LINEAR, antialias=True
    )
    images = fn.slice(
        images,
        start=shifts,
        shape=[image_size, image_size],
        axes=[0, 1],
        out_of_bounds_policy="pad",
        fill_values=0,
    )
    return fn.flip(images, horizontal=flips)


def _reason(error: RuntimeError) -> str:
    """Cut DALI's message down to its reason, without the traceback of the pipeline definition."""
    text = str(error).split("encountered:")[-1]
    lines = [line.strip(" :") for line in text.splitlines()]
    return "; ".join(
        line for line in lines if line and not line.startswith(("C++ context", "Current pipeline"))
    )


def require_nvjpeg(maps: Path = Path("/proc/self/maps")) -> None:
    """Refuse "mixed" decoding that silently fell back to the CPU.

    Raises:
        MissingDependencyError: DALI has not loaded nvJPEG.
    """
    mapped = maps.read_text(encoding="utf-8").splitlines()
    libraries = {line.split()[-1] for line in mapped if "libnvjpeg" in line}
    ours = [path for path in libraries if "torchvision" not in path]
    if not ours:
        raise MissingDependencyError(
            "DALI decodes on the CPU although a GPU was asked for, because it found no nvJPEG. "
            'Install it with: pip install nvidia-nvjpeg, or decode with backend="ffcv".'
        )
    _LOG.info("decoding on the GPU with %s", ours[0])


def _require_jpegs(beton: Beton) -> None:
    """Refuse a beton with raw rows, which no decoder of DALI reads.

    Raises:
        BetonError: a row is stored raw.
    """
    raw = np.flatnonzero(beton.modes != JPG)
    if len(raw):
        raise BetonError(
            f"DALI reads JPEGs, but row {raw[0]:,} of {beton.path} (and {len(raw) - 1:,} others) "
            'hold raw pixels. Use backend="ffcv", or convert the images again.'
        )
