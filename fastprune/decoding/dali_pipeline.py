"""A DALI pipeline from stored bytes and crop windows to pixels; DALI is imported here alone."""

import contextlib
import io
import os
import re
import weakref
from collections import deque
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastprune.base.errors import MissingDependencyError

try:
    import nvidia.dali.fn
    import nvidia.dali.types
    from nvidia.dali.pipeline import pipeline_def
except ImportError as error:
    raise MissingDependencyError(
        f'backend="dali" needs NVIDIA DALI ({error}). Install it with: '
        "pip install nvidia-dali-cuda130"
    ) from error

# Their stubs know neither dictionaries of arguments nor the constants.
fn: Any = nvidia.dali.fn
types: Any = nvidia.dali.types

BATCHES_AHEAD = 2
# Texts of CUDA, of allocators, and of nvImageCodec's statuses but for those that blame the image:
# 3 and 13 (bad code stream), 4 and 14 (unsupported), 19 (incomplete), see nvimgcodec.h.
_MACHINE_FAULT = re.compile(
    r"cuda|out of memory|bad_alloc|cannot allocate|nvml|driver|"
    r"nvimagecodec failure: '#(?!(?:3|4|13|14|19)')\d+",
    re.IGNORECASE,
)

#: One batch as the pipeline reads it: stored bytes, anchors, shapes, shifts and flips, n of each.
Sample = tuple[Any, ...]


class PipelineError(Exception):
    """DALI could not decode the batch that comes next; its pipeline is of no use any more.

    Attributes:
        is_machine_fault: whether the text blames CUDA, memory or nvImageCodec, and no image.
    """

    def __init__(self, error: RuntimeError):
        # Without DALI's traceback of the pipeline definition.
        text = str(error).split("encountered:")[-1]
        lines = (line.strip(" :") for line in text.splitlines())
        noise = ("C++ context", "Current pipeline")
        super().__init__("; ".join(line for line in lines if line and not line.startswith(noise)))
        self.is_machine_fault = bool(_MACHINE_FAULT.search(str(self)))


# A forked child has none of DALI's threads, and would wait for them for ever if it collected a
# pipeline of its parent: it keeps them all.
_LIVE: "weakref.WeakSet[Pipeline]" = weakref.WeakSet()
_KEPT_IN_CHILD: "list[Pipeline]" = []
os.register_at_fork(after_in_child=lambda: _KEPT_IN_CHILD.extend(_LIVE))


class Pipeline:
    """A DALI pipeline for one epoch after another; starting one costs as much as a few batches.

    Attributes:
        batch_size: the most rows that a batch may have.
        is_idle: whether it can be run; False while it runs, and for good after an error.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        image_size: int,
        num_threads: int,
        device: torch.device,
        size_hint: tuple[int, int],
    ):
        self.batch_size = batch_size
        self.is_idle = True
        self._device = device
        self._copies = Copies()
        self._source = _Source()
        self._pipeline = _decode(
            source=self._source,
            image_size=image_size,
            mixed=device.type == "cuda",
            size_hint=size_hint,
            batch_size=batch_size,
            num_threads=num_threads,
            device_id=cuda_index(device),
            # The one that is waited for, and those ahead of it.
            prefetch_queue_depth=1 + BATCHES_AHEAD,
        )
        self._pipeline.build()
        _LIVE.add(self)

    def run(self, samples: Iterator[Sample]) -> Generator[torch.Tensor, None, None]:
        """Decode samples in order, two ahead of the caller.

        Yields:
            (n, S, S, 3) uint8 pixels that belong to the caller.

        Raises:
            PipelineError: the next batch cannot be decoded.
        """
        self.is_idle = False
        self._source.samples = samples
        try:
            while (pixels := self._next()) is not None:
                yield pixels
        except GeneratorExit:
            # The next epoch must not begin with what this one left in the pipeline.
            self._source.samples = iter(())
            with contextlib.suppress(PipelineError):
                while self._next() is not None:
                    pass
                self._reset()
            raise
        self._reset()

    def _next(self) -> torch.Tensor | None:
        """Take the next batch out, in memory of its own; None at the end."""
        on_gpu = self._device.type == "cuda"
        # In torch's stream, so that the host need not wait for the decoder.
        stream = torch.cuda.current_stream(self._device) if on_gpu else None
        try:
            (outputs,) = self._pipeline.run(stream)
        except StopIteration:
            return None
        except RuntimeError as error:
            raise PipelineError(error) from error
        return self._copies.of(torch.utils.dlpack.from_dlpack(outputs.as_tensor()))

    def _reset(self) -> None:
        """Get ready for the next epoch."""
        self._pipeline.reset()
        self.is_idle = True


class _Source:
    """Gives DALI the samples that are set; a pipeline keeps its callback forever."""

    def __init__(self) -> None:
        self.samples: Iterator[Sample] = iter(())

    def __call__(self) -> Sample:
        return next(self.samples)


@pipeline_def
def _decode(source: Any, image_size: int, mixed: bool, size_hint: tuple[int, int]) -> Any:
    """Stored bytes -> the box, resized, shifted over black, flipped: (S, S, 3) uint8 each."""
    jpegs, anchors, shapes, shifts, flips = fn.external_source(
        # Read in place: the decoding threads touch the pages of the file, and not the caller.
        source=source,
        num_outputs=5,
        batch=True,
        no_copy=True,
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


def sound_sample() -> Sample:
    """One small image that every decoder knows."""
    jpeg = io.BytesIO()
    Image.new("RGB", (16, 16)).save(jpeg, "JPEG")
    zeros = np.zeros((1, 2), np.int32)
    return [np.frombuffer(jpeg.getvalue(), np.uint8)], zeros, zeros + 16, zeros, zeros[:, 0]


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
