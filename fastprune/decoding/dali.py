"""The DALI engine: decode batches on the GPU (nvJPEG) or, without one, on the CPU.

The order and the boxes are ours: DALI is fed slices of the mapped file with a crop window each.
"""

import contextlib
import logging
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future
from ctypes.util import find_library
from dataclasses import dataclass
from importlib.metadata import distributions

import numpy as np
import torch
from numpy.typing import NDArray

from fastprune.base.errors import BetonError, JpegError, LoadingError, MissingDependencyError
from fastprune.base.run_ahead import run_ahead
from fastprune.base.threads import ThreadDiedError, WorkerThreads
from fastprune.beton.beton import Beton
from fastprune.beton.layout import JPG
from fastprune.decoding.dali_pipeline import (
    BATCHES_AHEAD,
    Pipeline,
    PipelineError,
    Sample,
    sound_sample,
)
from fastprune.decoding.decoder import Decoded, DrawViews
from fastprune.decoding.faults import ALTERED, ChangeDetector, RowFaults
from fastprune.decoding.views import FLIP, HEIGHT, LEFT, SHIFT_DOWN, SHIFT_RIGHT, TOP, WIDTH
from fastprune.jpeg.headers import read_header
from fastprune.jpeg.native import MEANINGS, OTHER_SIZE

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Fed:
    """A batch on its way through the pipeline.

    Attributes:
        rows: (n,) int64, those that are decoded.
        left_out: the other rows of the batch, and what is wrong with each.
        sample: of the rows; DALI reads its arrays in place, so they must outlive the decoding.
    """

    rows: NDArray[np.int64]
    left_out: dict[int, str]
    sample: Sample


class DaliDecoder:
    """Decodes given rows of one beton with given views by DALI; see `decoder.Decoder`."""

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
        self._changes = ChangeDetector(beton)
        self._header_was_read = np.zeros(beton.num_rows, np.bool_)
        # Kept for good, so that every epoch leaves out the same rows.
        self._broken: dict[int, str] = {}
        self._idle: list[Pipeline] = []
        _require_jpegs(beton)
        if device.type == "cuda":
            _require_gpu_decoding()

    def decode(
        self, batches: Sequence[NDArray[np.int64]], draw_views: DrawViews
    ) -> Iterator[Decoded]:
        """Decode batches in order, two ahead of the caller; see `decoder.Decoder.decode`."""
        waiting = deque(batches)
        examined: set[int] = set()
        while waiting:
            fed: deque[_Fed] = deque()
            try:
                yield from self._run(waiting, draw_views, fed)
            except PipelineError as error:
                rows = set(fed[0].rows.tolist()) if fed else set()
                if rows <= examined:
                    # Each of its rows was decoded alone, and still the batch is not.
                    raise self._failure(str(error)) from error
                self._examine(fed[0], error)
                examined = rows

    def _run(
        self, waiting: deque[NDArray[np.int64]], draw_views: DrawViews, fed: deque[_Fed]
    ) -> Iterator[Decoded]:
        """Decode batches until one fails; those that the caller got are taken off `waiting`."""
        threads = WorkerThreads(self._num_workers, name="fastprune-inspect")
        samples = self._samples(list(waiting), draw_views, threads, fed)
        decoded = self._run_pipeline(samples, max(map(len, waiting)))
        try:
            for pixels in decoded:
                batch = fed.popleft()
                waiting.popleft()
                for row, reason in batch.left_out.items():
                    self._faults.report(row, reason)
                yield pixels[: len(batch.rows)], batch.rows
        finally:
            decoded.close()
            threads.close()

    def _samples(
        self,
        batches: list[NDArray[np.int64]],
        draw_views: DrawViews,
        threads: WorkerThreads,
        fed: deque[_Fed],
    ) -> Iterator[Sample]:
        """Feed the pipeline batch by batch, and note each batch in `fed`."""
        for rows in self._inspected(batches, threads):
            left_out = {row: self._broken[row] for row in rows.tolist() if row in self._broken}
            kept = rows[~np.isin(rows, list(left_out))]
            # A batch of which nothing is left goes through the pipeline, too, to come out in turn.
            sample = self._sample(kept, draw_views(kept)) if len(kept) else sound_sample()
            fed.append(_Fed(kept, left_out, sample))
            yield sample

    def _inspected(
        self, batches: list[NDArray[np.int64]], threads: WorkerThreads
    ) -> Iterator[NDArray[np.int64]]:
        """Yield the batches in order, while threads look at the rows of the next ones."""
        started = tuple[NDArray[np.int64], list[Future[None]]]

        def start(rows: NDArray[np.int64]) -> started:
            self._changes.check()
            parts = np.array_split(np.unique(rows), min(self._num_workers, len(rows)))
            return rows, [threads.submit(self._inspect, part) for part in parts]

        def finish(inspected: started) -> NDArray[np.int64]:
            rows, parts = inspected
            try:
                for part in parts:
                    threads.wait(part)
            except ThreadDiedError as error:
                raise self._failure("a thread that looked at rows was killed") from error
            return rows

        return run_ahead(self._beton.arriving(batches), start, finish, BATCHES_AHEAD)

    def _inspect(self, rows: NDArray[np.int64]) -> None:
        """Find the rows that no decoder should see; each header is read once."""
        # DALI's CPU decoder can crash the process on a batch in which one image has a bad header.
        for row, is_altered in zip(rows.tolist(), self._faults.altered(rows), strict=True):
            if row in self._broken:
                continue
            if is_altered:
                self._broken[row] = ALTERED
            if self._header_was_read[row]:
                continue
            try:
                header = read_header(self._beton.image_bytes(row).tobytes())
            except JpegError as error:
                self._broken[row] = str(error)
                continue
            size = (int(self._beton.widths[row]), int(self._beton.heights[row]))
            if (header.width, header.height) != size:
                self._broken[row] = MEANINGS[OTHER_SIZE]
            self._header_was_read[row] = True

    def _sample(self, rows: NDArray[np.int64], views: NDArray[np.int32]) -> Sample:
        """Stored bytes, anchors, shapes, shifts and flips of these rows."""
        return (
            [self._beton.image_bytes(row) for row in rows],
            np.ascontiguousarray(views[:, [TOP, LEFT]]),
            np.ascontiguousarray(views[:, [HEIGHT, WIDTH]]),
            np.ascontiguousarray(-views[:, [SHIFT_DOWN, SHIFT_RIGHT]]),
            np.ascontiguousarray(views[:, FLIP]),
        )

    def _run_pipeline(
        self, samples: Iterator[Sample], batch_size: int
    ) -> Generator[torch.Tensor, None, None]:
        """Decode samples in the pipeline that an earlier iterator left, or in a new one."""
        pipeline = None
        with contextlib.suppress(IndexError):  # another iterator may be running in it
            pipeline = self._idle.pop()
        if pipeline is None or pipeline.batch_size < batch_size:
            try:
                pipeline = Pipeline(
                    batch_size=batch_size,
                    image_size=self._image_size,
                    num_threads=self._num_workers,
                    device=self._device,
                    size_hint=_large_size(self._beton),
                )
            except RuntimeError as error:
                raise self._failure(str(PipelineError(error))) from error
        pixels = pipeline.run(samples)
        try:
            yield from pixels
        finally:
            pixels.close()
            if pipeline.is_idle and not self._idle:
                self._idle.append(pipeline)

    def _examine(self, batch: _Fed, error: PipelineError) -> None:
        """Decode the rows of a failed batch one by one, and keep what is wrong with each.

        Raises:
            LoadingError: no row is to blame.
        """
        if error.is_machine_fault:
            raise self._failure(str(error))
        singles = [tuple(part[i : i + 1] for part in batch.sample) for i in range(len(batch.rows))]
        position, reasons = 0, dict[int, str]()
        while position < len(singles):
            try:
                for _ in self._run_pipeline(iter(singles[position:]), len(batch.rows)):
                    position += 1
            except PipelineError as single:
                if single.is_machine_fault:
                    raise self._failure(str(single)) from single
                reasons[int(batch.rows[position])] = str(single)
                position += 1
        num_rows = len(np.unique(batch.rows))
        # Hardly all of several rows are broken at once; and one is not where nothing is decoded.
        none_works = len(reasons) == num_rows and (num_rows > 1 or not self._decodes_at_all())
        if not reasons or none_works:
            raise self._failure(str(error))
        self._broken |= reasons

    def _decodes_at_all(self) -> bool:
        """Whether DALI decodes an image that is sound."""
        try:
            list(self._run_pipeline(iter([sound_sample()]), 1))
        except PipelineError:
            return False
        return True

    def _failure(self, reason: str) -> LoadingError:
        """Return the error for a failure that no row caused."""
        return LoadingError(
            f"DALI failed on {self._beton.path}: {reason}. Start the epoch again, or resume it "
            "from a state_dict."
        )


def _large_size(beton: Beton) -> tuple[int, int]:
    """Width and height of an image that at most one in a hundred exceeds in area.

    nvJPEG allocates its buffers for this size. The greatest width and the greatest height belong to
    two outliers, and their product may be a hundred times the size of any image.
    """
    areas = beton.widths.astype(np.int64) * beton.heights
    row = int(np.argpartition(areas, position := (99 * (len(areas) - 1)) // 100)[position])
    return int(beton.widths[row]), int(beton.heights[row])


def _require_jpegs(beton: Beton) -> None:
    """Refuse a beton with raw rows, which no decoder of DALI reads.

    Raises:
        BetonError: a row is stored raw.
    """
    raw = np.flatnonzero(beton.modes != JPG)
    if len(raw):
        raise BetonError(
            f"DALI reads JPEGs, but row {raw[0]:,} of {beton.path} (and {len(raw) - 1:,} others) "
            'hold raw pixels. Use backend="cpu", or convert the images again.'
        )


def _require_gpu_decoding() -> None:
    """Refuse libraries known to end the process or to leave the work to the CPU.

    Raises:
        MissingDependencyError: nvJPEG is missing, or nvImageCodec is 0.9.0.
    """
    found = {package.name: package.version for package in distributions()}
    nvjpeg = next((v for name, v in found.items() if name.startswith("nvidia-nvjpeg")), None)
    # Without nvJPEG, DALI decodes everything on the CPU and does not tell.
    if nvjpeg is None and find_library("nvjpeg") is None:
        raise MissingDependencyError(
            'backend="dali" decodes on a GPU with nvJPEG, which is not installed. Install it with: '
            "pip install 'nvidia-nvjpeg>=13.2'; or use backend=\"cpu\"."
        )
    # https://github.com/NVIDIA/nvImageCodec/issues/55: SIGSEGV on JPEG regions on A100, H100, B200.
    codec = next((v for name, v in found.items() if name.startswith("nvidia-nvimgcodec")), "")
    if codec.split(".")[:3] == ["0", "9", "0"]:
        raise MissingDependencyError(
            "nvImageCodec 0.9.0 crashes on JPEG regions on some GPUs. Install another: pip install "
            "'nvidia-nvimgcodec-cu13!=0.9.0' (cu12 for CUDA 12); or use backend=\"cpu\"."
        )
    if nvjpeg is not None and tuple(map(int, nvjpeg.split(".")[:2])) < (13, 2):
        _LOG.warning(
            "nvJPEG %s decodes JPEG regions with smooth chroma on the CPU; 13.2 and newer decode "
            "them on the GPU: pip install 'nvidia-nvjpeg>=13.2'",
            nvjpeg,
        )
