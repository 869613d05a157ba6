"""How fast is a view decoded, against decoding the whole image first?

    python benchmarks/decode.py --images folder-of-jpegs

Every candidate makes the same random resized crops of the same files, which are in memory, on one
and on two threads: ours over the original bytes, over their lossless rewrite to restart rows, and
over FFCV's re-encoding to 500 pixels at quality 90 in both layouts; FFCV's own functions over the
original and over its own bytes, and its decoder alone; DALI, torchvision, Pillow and, where it is
installed, SPDL over the original bytes. Shares of our time go to stages by running up to each of
them. How fast batches come from a beton is benchmarks/loader.py's question.
"""

import argparse
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _harness import ratios, spread, take_turns, write_result
from _view_peers import (
    SIZE,
    Run,
    dali,
    in_threads,
    joined,
    pillow,
    pillow_view,
    reencoded,
    spdl,
    spdl_fault,
    stock_ffcv,
    torchvision,
)
from numba import njit

from fastprune.jpeg import scan
from fastprune.jpeg.frame import H_FACTOR, RESTART, SCAN, V_FACTOR, WIDTH, read_frame
from fastprune.jpeg.headers import read_header
from fastprune.jpeg.rewrite import to_restart_rows
from fastprune.jpeg.stream import unstuff
from fastprune.jpeg.view import read_view
from fastprune.jpeg.workspace import make_workspace

STAGES = ("header", "tables", "unstuffing", "entropy and IDCT", "resize and color")
# Each pair's ratio is one of speed: the first over the second.
PAIRS = (
    ("ours", "stock ffcv"),
    ("ours, restart rows", "stock ffcv"),
    ("ours, q90-500", "stock ffcv, q90-500"),
    ("ours, q90-500 restart rows", "stock ffcv, q90-500"),
    ("ours", "dali cpu"),
    ("ours, restart rows", "dali cpu"),
    ("ours", "torchvision"),
    ("ours, restart rows", "torchvision"),
    ("ours", "spdl"),
    ("ours, restart rows", "spdl"),
    ("ours", "libjpeg-turbo, no resize"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="a folder of JPEG files")
    parser.add_argument("--limit", type=int, default=1_000, help="at most this many files")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    files = known_files(arguments.images, arguments.limit)
    small = [reencoded(content) for content in files]
    contents = {
        "original": files,
        "restart rows": [to_restart_rows(content) for content in files],
        "q90-500": small,
        "q90-500 restart rows": [to_restart_rows(content) for content in small],
    }
    boxes, small_boxes = (
        np.array([random_box(content, n) for n, content in enumerate(of)]) for of in (files, small)
    )
    result: dict[str, Any] = {
        "question": "views of 224 pixels per second, ours against whole decodes",
        "settings": {"files": len(files), "rounds": arguments.rounds},
        "bytes": {name: sum(map(len, of)) for name, of in contents.items()},
        "threads": {},
        "stage_microseconds": {
            name: stage_microseconds(contents[name], boxes, arguments.rounds)
            for name in ("original", "restart rows")
        },
        "levels_from_pillow": levels_from_pillow(files, contents["restart rows"], boxes),
    }
    for threads in (1, 2):
        runs = candidates(contents, boxes, small_boxes, threads)
        result["threads"][threads] = measure(runs, len(files), arguments.rounds)
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


def candidates(
    contents: dict[str, list[bytes]], boxes: np.ndarray, small_boxes: np.ndarray, threads: int
) -> dict[str, Run]:
    """What makes all views once, by name."""
    files, small = contents["original"], contents["q90-500"]
    threaded = {
        "stock ffcv": (stock_ffcv, files, boxes),
        "ours": (ours, files, boxes),
        "ours, restart rows": (ours, contents["restart rows"], boxes),
        "stock ffcv, q90-500": (stock_ffcv, small, small_boxes),
        "ours, q90-500": (ours, small, small_boxes),
        "ours, q90-500 restart rows": (ours, contents["q90-500 restart rows"], small_boxes),
        "libjpeg-turbo, no resize": (partial(stock_ffcv, resized=False), files, boxes),
        "torchvision": (torchvision, files, boxes),
        "pillow": (pillow, files, boxes),
    }
    fault = spdl_fault(files[0])
    if fault is None:
        threaded["spdl"] = (spdl, files, boxes)
    else:
        print(f"without SPDL, which is not installed or does not work ({fault})")
    runs = {name: in_threads(*made, threads) for name, made in threaded.items()}
    return {**runs, "dali cpu": dali(files, boxes, threads)}


def measure(runs: dict[str, Run], num_files: int, rounds: int) -> dict[str, Any]:
    """Images per second of every candidate, and the ratios of some."""
    seconds = take_turns(runs, rounds=rounds)
    return {
        "images_per_second": {
            name: spread([num_files / s for s in values]) for name, values in seconds.items()
        },
        "ratios": {
            f"{faster} over {slower}": ratios(seconds[slower], seconds[faster])
            for faster, slower in PAIRS
            if slower in seconds
        },
    }


def workspace_for(files: list[bytes], boxes: np.ndarray):
    return make_workspace(
        file_bytes=max(map(len, files)),
        width=int(boxes[:, 3].max()),
        height=int(boxes[:, 2].max()),
        output_height=SIZE,
        output_width=SIZE,
    )


def ours(files: list[bytes], boxes: np.ndarray) -> Run:
    pixels = np.empty(SIZE * SIZE * 3, np.uint8)
    arguments = (*joined(files), boxes, workspace_for(files, boxes), pixels)

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


def levels_from_pillow(
    files: list[bytes], rewritten: list[bytes], boxes: np.ndarray
) -> dict[str, float]:
    """How far our views are from Pillow's crop and resize; both layouts give the same pixels."""
    pixels, means, worst = np.empty((SIZE, SIZE, 3), np.uint8), [], 0
    for content, fast, box in zip(files, rewritten, boxes, strict=True):
        views = []
        for data in (content, fast):
            one = joined([data])
            work = workspace_for([data], box[None])
            assert _ours(*one, box[None], work, pixels.reshape(-1)) == 0
            views.append(pixels.copy())
        assert np.array_equal(*views)
        levels = np.abs(views[0].astype(np.int16) - pillow_view(content, box.tolist()))
        means.append(float(levels.mean()))
        worst = max(worst, int(levels.max()))
    return {"mean": float(np.mean(means)), "worst_view_mean": max(means), "worst_pixel": worst}


def stage_microseconds(files: list[bytes], boxes: np.ndarray, rounds: int) -> dict[str, float]:
    """Median microseconds per image that each stage of ours takes on one thread."""
    arguments = (*joined(files), boxes, workspace_for(files, boxes))
    runs: dict[str, Run] = {
        stage: partial(_up_to, *arguments, n) for n, stage in enumerate(STAGES[:4])
    }
    runs[STAGES[4]] = ours(files, boxes)
    seconds = take_turns(runs, rounds=rounds)
    total = [spread(seconds[stage])["median"] / len(files) * 1e6 for stage in STAGES]
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
        frame = work.frame
        mcu_height, mcu_width = 8 * frame[V_FACTOR], 8 * frame[H_FACTOR]
        row, column = top // mcu_height, left // mcu_width
        rows = (top + height - 1) // mcu_height - row + 1
        columns = (left + width - 1) // mcu_width - column + 1
        if stage == 2:
            mcus_per_row = -(-frame[WIDTH] // mcu_width)
            restart = frame[RESTART] if frame[RESTART] > 0 else 1 << 30
            first = row * mcus_per_row // restart
            last = (row + rows - 1) * mcus_per_row // restart
            unstuff(content, frame[SCAN], work.stream, work.starts, first, last)
        if stage == 3:
            scan.decode_mcus(content, work, row, rows, column, columns)


if __name__ == "__main__":
    main()
