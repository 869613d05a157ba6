"""The FFCV engine: decode batches on the CPU, from a real `ffcv.Loader`.

FFCV contributes its reader, its map of the file, and its pipeline with the generated stage code.
What it does wrong is contained here (docs/decisions/0020-ffcv-engine.md): the threads are ours, so
that errors arrive and nothing is left behind; each batch has memory of its own; the order and the
views are ours too, and so is the decoder (docs/decisions/0043-loader-decodes-views.md).
"""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from fastprune.beton.layout import JPG
from fastprune.beton.reader import Beton, image_and_label
from fastprune.errors import JpegError, LoadingError, MissingDependencyError
from fastprune.jpeg.native import MEANINGS, OK, UNSUPPORTED
from fastprune.loading.advice import Advice
from fastprune.loading.augment import HEIGHT, WIDTH
from fastprune.loading.decoding import (
    MOST_KEPT_BYTES,
    Workspaces,
    decode_jpeg_whole,
    decode_rows,
    resize_raw,
)
from fastprune.loading.faults import FileWatch, RowFaults
from fastprune.loading.memory import BatchMemory
from fastprune.loading.threads import ThreadDiedError, WorkerThreads

_BATCHES_AHEAD = 3
_FFCV_BATCH_SIZE = 1  # its loader wants one, and cuts no batches here
_CHUNKS_PER_WORKER = 4
_MIN_CHUNK_PIXELS = 8 * 224 * 224  # less is done sooner than handed over
_PATCHING = threading.Lock()  # what is patched is the whole process's


@contextlib.contextmanager
def _thread_counts_kept() -> Iterator[None]:
    """Undo what FFCV does to the process's thread counts."""
    torch_threads, numba_threads = torch.get_num_threads(), numba.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(torch_threads)
        numba.set_num_threads(numba_threads)


try:
    # FFCV fills two typed dictionaries of two integers while it is imported; compiling them takes
    # most of the import's time, and a plain dictionary does the same.
    with _thread_counts_kept(), mock.patch("numba.typed.Dict", dict):
        import ffcv
        from ffcv.fields.rgb_image import SimpleRGBImageDecoder
        from ffcv.memory_managers.os_cache import OSCacheContext, OSCacheManager
        from ffcv.pipeline.compiler import Compiler
except ImportError as error:
    raise MissingDependencyError(
        f'backend="ffcv" needs the package ffcv ({error}). Install it with: '
        "pip install fastprune[ffcv]"
    ) from error


def _decode(_rows, memory, _metadata, storage_state):
    """What FFCV's stage calls: compiled code that fills the memory it is given."""
    decode_rows(storage_state[0], *memory)


class _ViewDecoder(SimpleRGBImageDecoder):  # its subclasses alone keep FFCV from adding a decoder
    """FFCV's name for `decode_rows`; memory is given with each call, so none is declared."""

    def declare_state_and_memory(self, previous_state):
        return replace(previous_state, jit_mode=True, dtype=np.dtype("u1")), None

    def generate_code(self):
        return _decode


class _FileMap(OSCacheManager):
    """FFCV's map of the file without its page tables, Python objects that grow with the rows."""

    def __init__(self, reader):
        self.reader = reader
        self.ptrs = self.sizes = np.empty(0, np.uint64)
        self.context = OSCacheContext(self)

    def compile_reader(self):
        """Nothing: the decoder is told where each row lies."""


def _compiled_loader(beton: Beton, num_workers: int):
    """A real `ffcv.Loader` whose only pipeline is ours; Numba's cache has the compiled code."""
    image, _ = image_and_label(beton.fields, beton.path)
    pipelines: dict[str, Any] = {field.name: None for field in beton.fields}
    pipelines[beton.fields[image].name] = [_ViewDecoder()]
    with (
        _PATCHING,
        _thread_counts_kept(),
        mock.patch("ffcv.loader.loader.OSCacheManager", _FileMap),
    ):
        # Disabled, the compiler hands on what it is given: `decode_rows` is compiled already.
        Compiler.set_enabled(False)
        try:
            return ffcv.Loader(
                str(beton.path),
                _FFCV_BATCH_SIZE,
                num_workers=min(num_workers, numba.get_num_threads()),
                pipelines=pipelines,
                drop_last=False,
            )
        finally:
            Compiler.set_enabled(True)


@dataclass
class _Batch:
    """A batch on its way: decoding threads fill it chunk by chunk."""

    rows: NDArray[np.int64]
    views: NDArray[np.int32]
    pixels: torch.Tensor
    chunks: list[Future[None]] = field(default_factory=list)
    faults: dict[int, str] = field(default_factory=dict)  # by position
    unknown_kinds: list[str] = field(default_factory=list)


class FfcvEngine:
    """Decodes given rows of one beton with given views on CPU threads; see `engine.Engine`."""

    name = "ffcv"

    def __init__(
        self,
        beton: Beton,
        *,
        image_size: int,
        num_workers: int,
        pin_memory: bool,
        faults: RowFaults,
    ):
        self._beton = beton
        self._image_size = image_size
        self._num_workers = num_workers
        self._pin_memory = pin_memory
        self._memory = BatchMemory()
        self._faults = faults
        self._file = FileWatch(beton)
        self._advice = Advice(beton.path)
        self._loader = _compiled_loader(beton, num_workers)
        stages, (self._node,) = self._loader.code
        ((self._stage, _),) = stages
        self._storage = self._loader.memory_manager.schedule_epoch(())
        self._storage.__enter__()

    def decode(
        self,
        batches: Sequence[NDArray[np.int64]],
        draw_views: Callable[[NDArray[np.int64]], NDArray[np.int32]],
    ) -> Iterator[tuple[torch.Tensor, NDArray[np.int64]]]:
        """Decode batches in order, a few ahead of the caller.

        Args:
            batches: the rows of each batch, int64, each in the beton.
            draw_views: from rows (n,) to views (n, 7), see `augment.Recipe.views`.

        Yields:
            (n, S, S, 3) uint8 pixels that belong to the caller, and their (n,) rows.

        Raises:
            LoadingError: a row cannot be decoded, a decoding thread died, or the file changed.
        """
        threads = WorkerThreads(self._num_workers, name="fastprune-decode")
        kept = threading.local()
        waiting: deque[_Batch] = deque()
        try:
            for rows in batches:
                self._file.check()
                waiting.append(self._start(threads, kept, rows, draw_views(rows)))
                if len(waiting) > _BATCHES_AHEAD:
                    yield self._finished(waiting.popleft(), threads)
            while waiting:
                yield self._finished(waiting.popleft(), threads)
        finally:
            threads.close()
            self._advice.give()

    def _start(
        self, threads: WorkerThreads, kept, rows: NDArray[np.int64], views: NDArray[np.int32]
    ) -> _Batch:
        """Hand a batch's chunks to the threads."""
        # Memory of its own, so that a held batch is never overwritten.
        shape = (len(rows), self._image_size, self._image_size, 3)
        if self._pin_memory:
            pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        else:
            pixels = self._memory.take(shape, torch.uint8)
        batch = _Batch(rows, views, pixels)
        most, least = self._num_workers * _CHUNKS_PER_WORKER, self._num_workers
        worthwhile = -(-_MIN_CHUNK_PIXELS // self._image_size**2)
        chunk_rows = max(-(-len(rows) // most), min(-(-len(rows) // least), worthwhile))
        for start in range(0, len(rows), chunk_rows):
            part = slice(start, start + chunk_rows)
            batch.chunks.append(threads.submit(self._decode_part, kept, batch, part))
        return batch

    def _decode_part(self, kept, batch: _Batch, part: slice) -> None:
        """Decode one chunk, in a decoding thread."""
        if not hasattr(kept, "workspaces"):
            kept.workspaces = Workspaces(self._image_size)
        rows, views, images = batch.rows[part], batch.views[part], batch.pixels.numpy()[part]
        codes = self._decode_views(kept.workspaces, rows, views, images)
        altered = self._faults.altered(rows)
        for i in np.flatnonzero((codes != OK) | altered).tolist():
            try:
                if altered[i]:
                    raise JpegError("its bytes are not those that were written (CRC-32C)")
                self._settle(batch, int(codes[i]), int(rows[i]), views[i], images[i])
            except JpegError as error:
                batch.faults[part.start + i] = str(error).rstrip(".")

    def _decode_views(
        self,
        workspaces: Workspaces,
        rows: NDArray[np.int64],
        views: NDArray[np.int32],
        images: NDArray[np.uint8],
    ) -> NDArray[np.int32]:
        """Run FFCV's stage over a chunk, without the GIL; a code for each row."""
        beton = self._beton
        codes = np.full(len(rows), UNSUPPORTED, np.int32)
        needed = np.stack([beton.sizes[rows], views[:, HEIGHT], views[:, WIDTH]], axis=1)
        pieces = [slice(0, len(rows))]
        if workspaces.num_bytes(tuple(needed.max(axis=0).tolist())) > MOST_KEPT_BYTES:
            # So that the longest and the widest of different images need not fit at once.
            pieces = [slice(i, i + 1) for i in range(len(rows))]
        for piece in pieces:
            some = rows[piece]
            if (beton.modes[some] != JPG).all():
                continue
            memory = (
                images[piece],
                codes[piece],
                views[piece],
                beton.offsets[some],
                beton.sizes[some],
                beton.modes[some],
                np.stack([beton.heights[some], beton.widths[some]], axis=1),
                workspaces.holding(tuple(needed[piece].max(axis=0).tolist())),
            )
            self._stage(
                batch_indices=some,
                metadata=self._loader.reader.metadata,
                storage_state=self._storage.state,
                **{f"memory_{self._node}": memory, f"shared_memory_{self._node}": None},
            )
        return codes

    def _settle(
        self, batch: _Batch, code: int, row: int, view: NDArray[np.int32], image: NDArray[np.uint8]
    ) -> None:
        """Decode a row that the view decoder does not know.

        Raises:
            JpegError: it cannot be used.
        """
        beton = self._beton
        stored, sides = beton.image_bytes(row), (int(beton.heights[row]), int(beton.widths[row]))
        if beton.modes[row] != JPG:
            resize_raw(stored.reshape(*sides, 3), view, image)
        elif code == UNSUPPORTED:
            batch.unknown_kinds.append(decode_jpeg_whole(stored.tobytes(), sides, view, image))
        else:
            raise JpegError(MEANINGS[code])

    def _finished(self, batch: _Batch, threads: WorkerThreads):
        """Wait for a batch, and leave out the rows that cannot be used."""
        try:
            for chunk in batch.chunks:
                threads.wait(chunk)
        except ThreadDiedError as error:
            raise LoadingError(
                f"a thread that decoded rows {batch.rows.min():,} to {batch.rows.max():,} of "
                f"{self._beton.path} was killed. Start the epoch again, or resume it from a "
                "state_dict."
            ) from error
        self._faults.num_decoded_whole += len(batch.unknown_kinds)
        self._advice.note(len(batch.rows), batch.unknown_kinds)
        # A row that comes twice may be damaged in one view alone; it is left out of both.
        failed = {int(batch.rows[at]): text for at, text in sorted(batch.faults.items())}
        for row, reason in failed.items():
            self._faults.report(row, reason)
        if not failed:
            return batch.pixels, batch.rows
        kept = np.flatnonzero(~np.isin(batch.rows, list(failed)))
        return batch.pixels[torch.from_numpy(kept)], batch.rows[kept]
