"""Other ways to random resized crops of JPEGs in memory, for benchmarks/decode.py.

Each function takes the files, their boxes (top, left, height, width) and a number of threads, and
returns what makes all views once.
"""

import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import ffcv.libffcv
import numpy as np
import torch
from numba import njit
from PIL import Image
from torchvision.io import decode_jpeg
from torchvision.transforms.v2 import functional

from fastprune.jpeg.headers import read_header

SIZE = 224
BATCH_SIZE = 64
Run = Callable[[], object]
_imdecode, _resize_crop = njit(ffcv.libffcv.imdecode), njit(ffcv.libffcv.resize_crop)


def in_threads(
    make: Callable[[list[bytes], np.ndarray], Run],
    files: list[bytes],
    boxes: np.ndarray,
    threads: int,
) -> Run:
    """Deal the files to threads, each with what `make` makes of its part."""
    parts = [slice(number, None, threads) for number in range(threads)]
    runs = [make(files[part], boxes[part]) for part in parts]
    pool = ThreadPoolExecutor(threads)

    def run() -> None:
        for done in [pool.submit(one) for one in runs]:
            done.result()

    return run


def joined(files: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """All files as one read-only array, and where each begins."""
    return np.frombuffer(b"".join(files), np.uint8), np.cumsum([0, *map(len, files)])


def stock_ffcv(files: list[bytes], boxes: np.ndarray, *, resized: bool = True) -> Run:
    """FFCV's own functions: libjpeg-turbo decodes all, OpenCV resizes the crop by areas."""
    headers = [read_header(content) for content in files]
    sizes = np.array([(h.height, h.width) for h in headers])
    frame = np.empty(int(sizes.prod(axis=1).max()) * 3, np.uint8)
    view = np.empty((SIZE, SIZE, 3), np.uint8)
    return partial(_stock_ffcv, *joined(files), sizes, boxes, frame, view, resized)


@njit(nogil=True)
def _stock_ffcv(data, starts, sizes, boxes, frame, view, resized):
    for i in range(len(boxes)):
        height, width = sizes[i]
        top, left, rows, columns = boxes[i]
        image = frame[: height * width * 3].reshape(height, width, 3)
        content = data[starts[i] : starts[i + 1]]
        _imdecode(content, image, height, width, height, width, 0, 0, 1, 1, False, False)
        if resized:
            _resize_crop(image, top, top + rows, left, left + columns, view)


def torchvision(files: list[bytes], boxes: np.ndarray) -> Run:
    tensors = [torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in files]

    def run() -> None:
        for tensor, box in zip(tensors, boxes.tolist(), strict=True):
            image = decode_jpeg(tensor, mode="RGB")
            functional.resized_crop(image, *box, [SIZE, SIZE], antialias=True)

    return run


def pillow_view(content: bytes, box: list[int]) -> np.ndarray:
    """The view that ours are compared with."""
    top, left, height, width = box
    image = Image.open(io.BytesIO(content)).convert("RGB")
    crop = image.crop((left, top, left + width, top + height))
    return np.asarray(crop.resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def pillow(files: list[bytes], boxes: np.ndarray) -> Run:
    def run() -> None:
        for content, box in zip(files, boxes.tolist(), strict=True):
            pillow_view(content, box)

    return run


def dali(files: list[bytes], boxes: np.ndarray, threads: int) -> Run:
    """DALI on the CPU, with the decoder that leaves out what the box does not show."""
    from nvidia.dali import fn, pipeline_def, types  # type: ignore[attr-defined]

    rgb = types.RGB  # type: ignore[attr-defined]

    batches = range(0, len(files), BATCH_SIZE)
    arrays = [np.frombuffer(content, np.uint8) for content in files]

    def batch(number: int):
        start = batches[number % len(batches)]
        part = boxes[start : start + BATCH_SIZE].astype(np.int32)
        return arrays[start : start + BATCH_SIZE], list(part[:, :2]), list(part[:, 2:])

    @pipeline_def(batch_size=BATCH_SIZE, num_threads=threads, device_id=None)
    def pipeline():
        jpegs, corners, shapes = fn.external_source(batch, num_outputs=3, batch_info=False)
        images = fn.decoders.image_slice(
            jpegs, corners, shapes, axes=[0, 1], output_type=rgb, adjust_orientation=False
        )
        return fn.resize(images, size=[SIZE, SIZE])

    pipe = pipeline()
    pipe.build()

    def run() -> None:
        for _ in batches:
            pipe.run()

    return run


def spdl(files: list[bytes], boxes: np.ndarray) -> Run:
    import spdl.io

    def run() -> None:
        for content, (top, left, height, width) in zip(files, boxes.tolist(), strict=True):
            crop = f"crop={width}:{height}:{left}:{top}:exact=1"
            filters = f"{crop},scale={SIZE}:{SIZE}:flags=bilinear,format=pix_fmts=rgb24"
            packets = spdl.io.demux_image(content)
            frames = spdl.io.decode_packets(packets, filter_desc=filters)
            np.array(spdl.io.convert_frames(frames))

    return run


def spdl_fault(content: bytes) -> str | None:
    """Why SPDL cannot take part; None if it can."""
    try:
        from spdl.io import demux_image

        demux_image(content)  # loads FFmpeg
    except (ImportError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def reencoded(content: bytes) -> bytes:
    """An image as FFCV's writer stores it: at most 500 pixels a side, quality 90."""
    from ffcv.fields.rgb_image import encode_jpeg, resizer

    image = np.array(Image.open(io.BytesIO(content)).convert("RGB"))
    return bytes(encode_jpeg(resizer(image, 500), 90))
