"""How fast is a view decoded, against decoding the whole image first?

    python benchmarks/decode.py --images folder-of-jpegs

Every candidate makes the same random resized crops of the same files, which are in memory, on one
and on two threads: FFCV's own functions (whole decode, area resize of the crop), torchvision and
Pillow over the original bytes; ours over the original bytes and over their lossless rewrite to
restart rows. Shares of the time go to the stages of ours by running it up to each of them.
"""

import argparse
import io
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import ffcv.libffcv
import numpy as np
import torch
from _harness import ratios, spread, take_turns, write_result
from numba import njit
from PIL import Image
from torchvision.io import decode_jpeg
from torchvision.transforms.v2 import functional

from fastprune.jpeg import scan
from fastprune.jpeg.frame import ACROSS, DOWN, SCAN, read_frame
from fastprune.jpeg.headers import read_header
from fastprune.jpeg.rewrite import to_restart_rows
from fastprune.jpeg.stream import unstuff
from fastprune.jpeg.view import read_view
from fastprune.jpeg.workspace import make_workspace

SIZE = 224
STAGES = ("header", "tables", "unstuffing", "entropy and IDCT", "resize and color")
_imdecode, _resize_crop = njit(ffcv.libffcv.imdecode), njit(ffcv.libffcv.resize_crop)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="a folder of JPEG files")
    parser.add_argument("--limit", type=int, default=1_000, help="at most this many files")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    files = known_files(arguments.images, arguments.limit)
    boxes = np.array([random_box(content, n) for n, content in enumerate(files)])
    rewritten = [to_restart_rows(content) for content in files]
    result: dict[str, Any] = {
        "question": "views of 224 pixels per second, ours against whole decodes",
        "settings": {"files": len(files), "rounds": arguments.rounds},
        "bytes": {"original": sum(map(len, files)), "restart rows": sum(map(len, rewritten))},
        "threads": {},
        "stages": stage_seconds(files, boxes, arguments.rounds),
    }
    for threads in (1, 2):
        result["threads"][threads] = measure(files, rewritten, boxes, threads, arguments.rounds)
    print(write_result("decode", result))


def known_files(folder: Path, limit: int) -> list[bytes]:
    """Files of the folder that the view decoder knows, evenly spread over their names."""
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpeg", ".jpg"))
    contents = (path.read_bytes() for path in paths[:: max(1, len(paths) // limit)][:limit])
    return [c for c in contents if to_restart_rows(c) is not None]


def random_box(content: bytes, seed: int) -> tuple[int, int, int, int]:
    """The box of torchvision's RandomResizedCrop at its default scale and ratio."""
    generator, header = np.random.default_rng(seed), read_header(content)
    for _ in range(10):
        area = header.width * header.height * generator.uniform(0.08, 1.0)
        ratio = math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3)))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width <= header.width and 0 < height <= header.height:
            top = int(generator.integers(0, header.height - height + 1))
            return top, int(generator.integers(0, header.width - width + 1)), height, width
    return 0, 0, header.height, header.width


def measure(
    files: list[bytes], rewritten: list[bytes], boxes: np.ndarray, threads: int, rounds: int
) -> dict[str, Any]:
    """Images per second of every candidate, and their ratios to stock FFCV."""
    parts = [slice(n, None, threads) for n in range(threads)]
    makers: dict[str, tuple[Callable[..., Callable[[], None]], list[bytes]]] = {
        "stock ffcv": (stock_ffcv, files),
        "torchvision": (torchvision, files),
        "pillow": (pillow, files),
        "ours": (ours, files),
        "ours, restart rows": (ours, rewritten),
    }
    pool = ThreadPoolExecutor(threads)
    candidates = {}
    for name, (make, contents) in makers.items():
        runs = [make(contents[part], boxes[part]) for part in parts]
        candidates[name] = partial(run_all, pool, runs)
    seconds = take_turns(candidates, rounds=rounds)
    stock = seconds["stock ffcv"]
    return {
        name: {
            "images_per_second": spread([len(files) / s for s in values]),
            "times_stock_ffcv": ratios(stock, values),
        }
        for name, values in seconds.items()
    }


def run_all(pool: ThreadPoolExecutor, runs: list[Callable[[], None]]) -> None:
    """Run each part in a thread of its own."""
    for done in [pool.submit(run) for run in runs]:
        done.result()


def joined(contents: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """All files as one read-only array, and where each begins."""
    return np.frombuffer(b"".join(contents), np.uint8), np.cumsum([0, *map(len, contents)])


def stock_ffcv(contents: list[bytes], boxes: np.ndarray) -> Callable[[], None]:
    headers = [read_header(content) for content in contents]
    sizes = np.array([(h.height, h.width) for h in headers])
    frame = np.empty(int(sizes.prod(axis=1).max()) * 3, np.uint8)
    view = np.empty((SIZE, SIZE, 3), np.uint8)
    return partial(_stock_ffcv, *joined(contents), sizes, boxes, frame, view)


@njit(nogil=True)
def _stock_ffcv(data, starts, sizes, boxes, frame, view):
    for i in range(len(boxes)):
        height, width = sizes[i]
        top, left, rows, columns = boxes[i]
        image = frame[: height * width * 3].reshape(height, width, 3)
        content = data[starts[i] : starts[i + 1]]
        _imdecode(content, image, height, width, height, width, 0, 0, 1, 1, False, False)
        _resize_crop(image, top, top + rows, left, left + columns, view)


def torchvision(contents: list[bytes], boxes: np.ndarray) -> Callable[[], None]:
    tensors = [torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in contents]

    def run() -> None:
        for tensor, box in zip(tensors, boxes.tolist(), strict=True):
            image = decode_jpeg(tensor, mode="RGB")
            functional.resized_crop(image, *box, [SIZE, SIZE], antialias=True)

    return run


def pillow(contents: list[bytes], boxes: np.ndarray) -> Callable[[], None]:
    def run() -> None:
        for content, (top, left, height, width) in zip(contents, boxes.tolist(), strict=True):
            image = Image.open(io.BytesIO(content)).convert("RGB")
            crop = image.crop((left, top, left + width, top + height))
            crop.resize((SIZE, SIZE), Image.Resampling.BILINEAR)

    return run


def workspace_for(contents: list[bytes], boxes: np.ndarray):
    return make_workspace(
        file_bytes=max(map(len, contents)),
        width=int(boxes[:, 3].max()),
        height=int(boxes[:, 2].max()),
        output_height=SIZE,
        output_width=SIZE,
    )


def ours(contents: list[bytes], boxes: np.ndarray) -> Callable[[], None]:
    pixels = np.empty(SIZE * SIZE * 3, np.uint8)
    arguments = (*joined(contents), boxes, workspace_for(contents, boxes), pixels)

    def run() -> None:
        assert _ours(*arguments) == 0

    return run


@njit(nogil=True)
def _ours(data, starts, boxes, work, pixels):
    codes = 0
    for i in range(len(boxes)):
        top, left, height, width = boxes[i]
        content = data[starts[i] : starts[i + 1]]
        codes |= read_view(
            content, work, top, left, height, width, SIZE, SIZE, False, pixels
        )  # fmt: skip
    return codes


def stage_seconds(files: list[bytes], boxes: np.ndarray, rounds: int) -> dict[str, float]:
    """Median seconds per image that each stage of ours takes on one thread."""
    arguments = (*joined(files), boxes, workspace_for(files, boxes))
    candidates: dict[str, Callable[[], Any]] = {
        stage: partial(_up_to, *arguments, n) for n, stage in enumerate(STAGES[:4])
    }
    candidates[STAGES[4]] = ours(files, boxes)
    seconds = take_turns(candidates, rounds=rounds)
    total = [spread(seconds[stage])["median"] / len(files) for stage in STAGES]
    # Entropy decoding unstuffs for itself, so each figure holds those before it.
    differences = np.diff([0.0, *total])
    return dict(zip(STAGES, differences.tolist(), strict=True))


@njit(nogil=True)
def _up_to(data, starts, boxes, work, stage):
    for i in range(len(boxes)):
        top, left, height, width = boxes[i]
        content = data[starts[i] : starts[i + 1]]
        read_frame(content, work)
        if stage >= 1:
            scan.prepare_tables(work)
        if stage == 2:
            unstuff(content, work.frame[SCAN], work.stream, work.starts, 0, 0)
        if stage == 3:
            unit_height, unit_width = 8 * work.frame[DOWN], 8 * work.frame[ACROSS]
            row, column = top // unit_height, left // unit_width
            rows = (top + height - 1) // unit_height - row + 1
            columns = (left + width - 1) // unit_width - column + 1
            scan.decode_units(content, work, row, rows, column, columns)


if __name__ == "__main__":
    main()
