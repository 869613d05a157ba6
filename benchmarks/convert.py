"""How fast do images become a beton, against FFCV's writer and against copying the files?

    python benchmarks/convert.py --images folder-of-jpegs

The files are repeated to at least 10,000 rows. Every candidate ends with its bytes on the disk: the
copy with `sync`, FFCV's beton with an fsync that its writer does not do itself, ours as it always
does: once with the original bytes, once as `convert` does by default, which rewrites what pays.
Rates are in rows per second. After how many views of a row the rewrite has paid is measured with
the files in memory, by CPU time of one thread.
"""

import argparse
import contextlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
from _harness import ratios, spread, take_turns, write_result
from decode import random_box
from ffcv.fields import IntField, RGBImageField
from ffcv.writer import DatasetWriter
from PIL import Image

from fastprune.beton.convert.writer import convert
from fastprune.beton.opening import open_beton
from fastprune.jpeg.decode import decode_view
from fastprune.jpeg.rewrite import to_restart_rows

QUALITY = 90
RESOLUTIONS = (500, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="a folder of JPEG files")
    parser.add_argument("--rows", type=int, default=10_000, help="repeat the files to this many")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scratch", type=Path, help="where to write; default: the system's")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        scratch = Path(folder)
        names = repeat_files(arguments.images, scratch / "images", arguments.rows)
        out = scratch / "out"
        seconds = take_turns(candidates(scratch / "images", names, out), rounds=arguments.rounds)
        seconds.pop("clean")
        result = {
            "question": "rows per second into a beton, ours against FFCV's writer and cp",
            "settings": {"rows": len(names), "jpeg_quality": QUALITY, "rounds": arguments.rounds},
            "source_bytes": sum((scratch / "images" / name).stat().st_size for name in names),
            "rows_per_second": {
                name: spread([len(names) / one for one in values])
                for name, values in seconds.items()
            },
            "bytes_on_disk": {name: bytes_on_disk(out / name) for name in seconds},
            "ours_over_ffcv": compare(seconds, "ffcv None"),
            "ours_over_ffcv_500": compare(seconds, "ffcv 500"),
            "ours_auto_over_ffcv": compare(seconds, "ffcv None", "ours auto"),
            "ours_auto_over_original": compare(seconds, "ours", "ours auto"),
            "ours_over_cp": over_copy(seconds, "ours"),
            "ours_auto_over_cp": over_copy(seconds, "ours auto"),
            "rewrite": rewrite(list_jpegs(arguments.images), arguments.rounds),
            "pixels": pixels(scratch / "images", names, out, len(list_jpegs(arguments.images))),
            "peak_memory_bytes": peak_memory(scratch / "images", scratch / "memory.beton"),
        }
    path = write_result("convert", result)
    for name in ("ours_over_ffcv", "ours_auto_over_ffcv", "ours_over_cp", "ours_auto_over_cp"):
        print(name, result[name])
    print(f"{result['rewrite']}\n-> {path}")


def list_jpegs(folder: Path) -> list[Path]:
    """The files of a folder, in order."""
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in (".jpg", ".jpeg"))


def repeat_files(source: Path, root: Path, rows: int) -> list[str]:
    """Make an ImageFolder of copies, ten classes or so to a repetition; return the rows' names."""
    files = list_jpegs(source)
    for repetition in range(-(-rows // len(files))):
        for number, file in enumerate(files):
            folder = root / f"class_{number % 100:02d}"
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / f"{repetition:03d}_{number:06d}.jpg")
    return sorted(str(p.relative_to(root)) for p in root.rglob("*.jpg"))


def candidates(images: Path, names: list[str], out: Path) -> dict:
    """Everything that takes turns; "clean" comes first and its time is not used."""

    def clean():
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        os.sync()

    runs = {"clean": clean, "cp": lambda: copy(images, out / "cp")}
    for workers in (1, 2):
        path = out / f"ours {workers} workers"
        runs[path.name] = partial(convert, images, path, workers=workers, jpeg="original")
        path = out / f"ours auto {workers} workers"
        runs[path.name] = partial(convert, images, path, workers=workers)
    for resolution in RESOLUTIONS:
        for workers in (1, 2):
            path = out / f"ffcv {resolution} {workers} workers"
            runs[path.name] = lambda path=path, resolution=resolution, workers=workers: write_ffcv(
                Decoded(images, names), path, resolution, workers
            )
    return runs


def copy(images: Path, target: Path) -> None:
    """The floor: the same bytes as files."""
    subprocess.run(["cp", "-r", str(images), str(target)], check=True)
    subprocess.run(["sync", "-f", str(target)], check=True)


class Decoded:
    """What FFCV's writer takes: decoded images with their labels."""

    def __init__(self, root: Path, names: list[str]) -> None:
        self.root, self.names = root, names
        self.labels = {name: n for n, name in enumerate(sorted({n.split("/")[0] for n in names}))}

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        name = self.names[index]
        with Image.open(self.root / name) as image:
            return image.convert("RGB"), self.labels[name.split("/")[0]]


def write_ffcv(dataset: Decoded, path: Path, resolution: int | None, workers: int) -> None:
    """FFCV's own writer, and an fsync."""
    image = RGBImageField(write_mode="jpg", max_resolution=resolution, jpeg_quality=QUALITY)
    writer = DatasetWriter(str(path), {"image": image, "label": IntField()}, num_workers=workers)
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        writer.from_indexed_dataset(dataset)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def compare(seconds: dict[str, list[float]], peer: str, ours: str = "ours") -> dict:
    """A peer's time over ours, with the same number of workers."""
    return {
        f"{workers} workers": ratios(
            seconds[f"{peer} {workers} workers"], seconds[f"{ours} {workers} workers"]
        )
        for workers in (1, 2)
    }


def over_copy(seconds: dict[str, list[float]], ours: str) -> dict:
    """The time of `cp` and `sync` over ours."""
    return {
        f"{workers} workers": ratios(seconds["cp"], seconds[f"{ours} {workers} workers"])
        for workers in (1, 2)
    }


def rewrite(paths: list[Path], rounds: int) -> dict:
    """CPU microseconds of a rewrite and of a view in either layout, and when the first has paid."""
    original = [c for path in paths if to_restart_rows(c := path.read_bytes()) is not None]
    fast = [to_restart_rows(content) for content in original]
    boxes = [random_box(content, number) for number, content in enumerate(original)]

    def views(files: list[bytes]) -> float:
        started = time.process_time()
        for content, box in zip(files, boxes, strict=True):
            decode_view(content, box=box)
        return time.process_time() - started

    def rewrites() -> float:
        started = time.process_time()
        for content in original:
            to_restart_rows(content)
        return time.process_time() - started

    taken = [(rewrites(), views(original), views(fast)) for _ in range(rounds + 1)][1:]
    microseconds = [
        [one / len(original) * 1e6 for one in times] for times in zip(*taken, strict=True)
    ]
    return {
        "files": len(original),
        "rewrite_microseconds": spread(microseconds[0]),
        "view_original_microseconds": spread(microseconds[1]),
        "view_fast_microseconds": spread(microseconds[2]),
        "pays_after_views": spread([a / (b - c) for a, b, c in taken]),
    }


def bytes_on_disk(path: Path) -> int:
    """Blocks that a file or a tree occupies."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(file.stat().st_blocks * 512 for file in files)


def pixels(images: Path, names: list[str], out: Path, count: int) -> dict:
    """What became of the pixels of the first rows: identical bytes, or a PSNR."""
    ours, ffcv = open_beton(out / "ours 1 workers"), open_beton(out / "ffcv None 1 workers")
    identical, psnr = 0, []
    for row in range(count):
        source = (images / names[row]).read_bytes()
        identical += ours.image_bytes(row).tobytes() == source
        psnr.append(psnr_db(decode(source), decode(ffcv.image_bytes(row).tobytes())))
    return {
        "rows": count,
        "ours_bytes_identical_to_the_source": identical,
        "ffcv_psnr_db": spread([value for value in psnr if np.isfinite(value)]),
    }


def decode(jpeg: bytes) -> np.ndarray:
    """RGB pixels, by PIL, for both sides alike."""
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")).astype(np.float64)


def psnr_db(reference: np.ndarray, other: np.ndarray) -> float:
    """Peak signal to noise ratio over all channels; infinite for equal pixels."""
    error = np.mean((reference - other) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def peak_memory(images: Path, path: Path) -> int:
    """Most RssAnon + RssShmem of the command and its two workers together, in bytes."""
    command = [sys.executable, "-m", "fastprune", "convert", str(images), str(path)]
    command += ["--jpeg", "original"]
    process = subprocess.Popen([*command, "--workers", "2"], stdout=subprocess.DEVNULL)
    peak, stop = [0], threading.Event()

    def watch():
        while not stop.is_set():
            peak[0] = max(peak[0], sum(private_bytes(pid) for pid in tree(process.pid)))
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    status = process.wait()
    stop.set()
    watcher.join()
    if status:
        raise SystemExit("the conversion whose memory was watched failed")
    return peak[0]


def tree(pid: int) -> list[int]:
    """A process and its children."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return []
    return [pid, *(int(child) for child in children)]


def private_bytes(pid: int) -> int:
    """RssAnon + RssShmem of one process; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 1024 * sum(
        int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem"))
    )


if __name__ == "__main__":
    main()
