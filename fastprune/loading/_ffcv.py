"""The FFCV engine: decode batches on the CPU, from a real `ffcv.Loader`.

FFCV contributes its reader, its map of the file, its pipeline with the generated stage code, and
its C library. What it does wrong is contained here (docs/decisions/0020-ffcv-engine.md): the
threads are ours, so that errors arrive and nothing is left behind; each batch has memory of its
own; the order, the views and the return code of every decode are ours too.
"""

import contextlib
import ctypes
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import llvmlite.binding
import numba
import numpy as np
import torch
from numba import njit, types
from numpy.typing import NDArray

from fastprune.beton.reader import Beton, image_and_label
from fastprune.errors import LoadingError, MissingDependencyError
from fastprune.loading.augment import FLIP, HEIGHT, LEFT, SHIFT_DOWN, SHIFT_RIGHT, TOP, WIDTH
from fastprune.loading.faults import FileWatch, RowFaults
from fastprune.loading.memory import BatchMemory
from fastprune.loading.threads import ThreadDiedError, WorkerThreads

_BATCHES_AHEAD = 3
_FFCV_BATCH_SIZE = 1  # its loader wants one, and cuts no batches here
_CHUNKS_PER_WORKER = 4
_MIN_CHUNK_ROWS = 8
_LARGEST_KEPT_SCRATCH_BYTES = 16 << 20


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
        import ffcv.libffcv
        from ffcv.fields.rgb_image import SimpleRGBImageDecoder
        from ffcv.memory_managers.os_cache import OSCacheContext, OSCacheManager
        from ffcv.pipeline.compiler import Compiler
except ImportError as error:
    raise MissingDependencyError(
        f'backend="ffcv" needs the package ffcv ({error}). Install it with: '
        "pip install fastprune[ffcv]"
    ) from error

_libffcv = ffcv.libffcv.lib
_libffcv.tjInitDecompress.restype = ctypes.c_void_p
_libffcv.tjDestroy.argtypes = [ctypes.c_void_p]
_libffcv.tjGetErrorCode.argtypes = [ctypes.c_void_p]
_libffcv.tjGetErrorStr2.argtypes = [ctypes.c_void_p]
_libffcv.tjGetErrorStr2.restype = ctypes.c_char_p

# Numba does not cache code that holds an address, FFCV's way of calling C. A name is resolved when
# the cached code is loaded.
for _name in ("tjDecompress2", "resize"):
    _address = ctypes.cast(getattr(_libffcv, _name), ctypes.c_void_p).value
    llvmlite.binding.add_symbol(f"fastprune_ffcv_{_name}", _address)

# FFCV's own `imdecode` keeps no error message, decodes with the inaccurate DCT, and leaks a
# decompressor for each thread that ends; so the library beneath it is called.
_decompress: Any = types.ExternalFunction(
    "fastprune_ffcv_tjDecompress2",
    types.int32(
        *(types.uintp, types.voidptr, types.uint64, types.voidptr),
        *(types.int32, types.int32, types.int32, types.int32, types.int32),
    ),
)
_resize: Any = types.ExternalFunction("fastprune_ffcv_resize", types.void(*[types.int64] * 11))

_FATAL = 1  # TJERR_FATAL

# Codes of our own, beside the library's 0 and -1.
_OTHER_SIZE, _ALTERED = 1, 2


@njit(cache=True, nogil=True, error_model="numpy")
def _decode_rows(rows, memory, metadata, storage_state):
    """Fill `images` (n, S, S, 3) with the views of n rows and `codes` (n,) with return codes."""
    images, codes, views, offsets, sizes, decompressor, scratch, resized = memory
    file_bytes = storage_state[0]
    for i in range(len(rows)):
        record = metadata[rows[i]]
        height, width = int(record["height"]), int(record["width"])
        start, size = offsets[i], sizes[i]
        stored = file_bytes[start : start + size]
        if record["mode"] == 0:
            if not _is_size(stored, height, width):
                # The library would leave the rest of the frame as the last image left it.
                codes[i] = _OTHER_SIZE
                continue
            codes[i] = _decompress(
                decompressor, stored.ctypes, size, scratch.ctypes, width, 0, height, 0, 0
            )
            pixels = scratch.ctypes.data
        else:
            pixels = stored.ctypes.data
        view = views[i]
        shifted = view[SHIFT_DOWN] != 0 or view[SHIFT_RIGHT] != 0
        target = resized if shifted else images[i]
        bottom, right = view[TOP] + view[HEIGHT], view[LEFT] + view[WIDTH]
        _resize(
            0, pixels, height, width, view[TOP], bottom, view[LEFT], right,
            target.ctypes.data, target.shape[0], target.shape[1],
        )  # fmt: skip
        if shifted:
            _shift(resized, images[i], view[SHIFT_DOWN], view[SHIFT_RIGHT])
        if view[FLIP]:
            _flip(images[i])


@njit(cache=True, nogil=True)
def _is_size(jpeg, height, width):
    """Whether the frame header of a JPEG has this size; True where there is no such header."""
    at = 2
    while at + 9 < len(jpeg) and jpeg[at] == 0xFF:
        marker = jpeg[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            frame_height, frame_width = (
                jpeg[at + 5] << 8 | jpeg[at + 6],
                jpeg[at + 7] << 8 | jpeg[at + 8],
            )
            return frame_height == height and frame_width == width
        at += 1 if marker == 0xFF else 2 + (jpeg[at + 2] << 8 | jpeg[at + 3])
    return True


@njit(cache=True, nogil=True)
def _shift(source, target, down, right):
    """Copy (S, S, 3) pixels moved down and right; what comes in from outside is black."""
    rows, columns, _ = target.shape
    for y in range(rows):
        for x in range(columns):
            from_y, from_x = y - down, x - right
            inside = 0 <= from_y < rows and 0 <= from_x < columns
            for channel in range(3):
                target[y, x, channel] = source[from_y, from_x, channel] if inside else 0


@njit(cache=True, nogil=True)
def _flip(image):
    """Mirror (S, S, 3) pixels left to right in place."""
    rows, columns, _ = image.shape
    for y in range(rows):
        for x in range(columns // 2):
            for channel in range(3):
                left, right = image[y, x, channel], image[y, columns - 1 - x, channel]
                image[y, x, channel], image[y, columns - 1 - x, channel] = right, left


class _ViewDecoder(SimpleRGBImageDecoder):  # its subclasses alone keep FFCV from adding a decoder
    """FFCV's name for `_decode_rows`; memory is given with each call, so none is declared."""

    def declare_state_and_memory(self, previous_state):
        return replace(previous_state, jit_mode=True, dtype=np.dtype("u1")), None

    def generate_code(self):
        return _decode_rows


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
    with _thread_counts_kept(), mock.patch("ffcv.loader.loader.OSCacheManager", _FileMap):
        # Disabled, the compiler hands on what it is given: `_decode_rows` is compiled already.
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
    codes: NDArray[np.int32]
    chunks: list[Future[None]]


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
        scratch = threading.local()
        waiting: deque[_Batch] = deque()
        try:
            for rows in batches:
                self._file.check()
                waiting.append(self._start(threads, scratch, rows, draw_views(rows)))
                if len(waiting) > _BATCHES_AHEAD:
                    yield self._finished(waiting.popleft(), threads)
            while waiting:
                yield self._finished(waiting.popleft(), threads)
        finally:
            threads.close()

    def _start(
        self, threads: WorkerThreads, scratch, rows: NDArray[np.int64], views: NDArray[np.int32]
    ) -> _Batch:
        """Hand a batch's chunks to the threads."""
        # Memory of its own, so that a held batch is never overwritten.
        shape = (len(rows), self._image_size, self._image_size, 3)
        if self._pin_memory:
            pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        else:
            pixels = self._memory.take(shape, torch.uint8)
        batch = _Batch(rows, views, pixels, np.zeros(len(rows), np.int32), [])
        chunk_rows = max(_MIN_CHUNK_ROWS, -(-len(rows) // (_CHUNKS_PER_WORKER * self._num_workers)))
        for start in range(0, len(rows), chunk_rows):
            part = slice(start, start + chunk_rows)
            batch.chunks.append(threads.submit(self._decode_part, scratch, batch, part))
        return batch

    def _decode_part(self, scratch, batch: _Batch, part: slice) -> None:
        """Run FFCV's stage over one chunk, in a decoding thread, without the GIL."""
        rows = batch.rows[part]
        memory = (
            batch.pixels.numpy()[part],
            batch.codes[part],
            batch.views[part],
            self._beton.offsets[rows],
            self._beton.sizes[rows],
            *self._scratch(scratch, rows),
        )
        self._run_stage(rows, memory)
        batch.codes[part][self._faults.altered(rows)] = _ALTERED

    def _run_stage(self, rows: NDArray[np.int64], memory) -> None:
        """Call the code that FFCV generated."""
        self._stage(
            batch_indices=rows,
            metadata=self._loader.reader.metadata,
            storage_state=self._storage.state,
            **{f"memory_{self._node}": memory, f"shared_memory_{self._node}": None},
        )

    def _scratch(self, kept, rows: NDArray[np.int64]):
        """The thread's decompressor, room for the chunk's largest image, and for one output."""
        beton = self._beton
        needed = int((beton.widths[rows].astype(np.int64) * beton.heights[rows]).max()) * 3
        if not hasattr(kept, "frame"):
            kept.decompressor = _Decompressor()
            kept.frame = np.empty(0, np.uint8)
            kept.view = np.empty((self._image_size, self._image_size, 3), np.uint8)
        frame = kept.frame if len(kept.frame) >= needed else np.empty(needed, np.uint8)
        if len(frame) <= _LARGEST_KEPT_SCRATCH_BYTES:
            kept.frame = frame
        return kept.decompressor.handle, frame, kept.view

    def _finished(self, batch: _Batch, threads: WorkerThreads):
        """Wait for a batch, and look at what the decoder said of each row."""
        try:
            for chunk in batch.chunks:
                threads.wait(chunk)
        except ThreadDiedError as error:
            raise LoadingError(
                f"a thread that decoded rows {batch.rows.min():,} to {batch.rows.max():,} of "
                f"{self._beton.path} was killed. Start the epoch again, or resume it from a "
                "state_dict."
            ) from error
        codes = dict(zip(batch.rows.tolist(), batch.codes.tolist(), strict=True))
        failed = [row for row, code in codes.items() if code and self._is_unusable(row, code)]
        if not failed:
            return batch.pixels, batch.rows
        kept = np.flatnonzero(~np.isin(batch.rows, failed))
        return batch.pixels[torch.from_numpy(kept)], batch.rows[kept]

    def _is_unusable(self, row: int, code: int) -> bool:
        """Find out what is wrong with a row, and report it; False for a mere warning."""
        if code == _OTHER_SIZE:
            self._faults.report(row, "its JPEG is not of the size that the beton says")
            return True
        if code == _ALTERED:
            self._faults.report(row, "its bytes are not those that were written (CRC-32C)")
            return True
        fatal, message = self._diagnosis(row)
        if fatal:
            self._faults.report(row, message)
        else:
            self._faults.num_warnings += 1
        return fatal

    def _diagnosis(self, row: int) -> tuple[bool, str]:
        """Decode a row once more to learn what is wrong with it; True where it is lost."""
        beton, decompressor, codes = self._beton, _Decompressor(), np.zeros(1, np.int32)
        height, width = int(beton.heights[row]), int(beton.widths[row])
        rows = np.array([row])
        whole = np.array([[0, 0, height, width, 0, 0, 0]], np.int32)
        pixels = np.empty((1, 1, 1, 3), np.uint8)
        frame = np.empty(height * width * 3, np.uint8)
        memory = (pixels, codes, whole, beton.offsets[rows], beton.sizes[rows])
        self._run_stage(rows, (*memory, decompressor.handle, frame, pixels[0]))
        assert codes[0] == -1
        return decompressor.complaint()


class _Decompressor:
    """A decompressor of the library, for one thread."""

    def __init__(self):
        self.handle = _libffcv.tjInitDecompress()

    def __del__(self):
        _libffcv.tjDestroy(self.handle)

    def complaint(self) -> tuple[bool, str]:
        """Whether the image it failed on is lost, and why."""
        message = _libffcv.tjGetErrorStr2(self.handle).decode()
        # A picture that ends early is a mere warning to the library, but its rest is grey.
        early = "premature end" in message.lower()
        return early or _libffcv.tjGetErrorCode(self.handle) == _FATAL, message
