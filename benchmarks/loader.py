"""How fast do batches come from a beton, against other loaders on the same images?

    python benchmarks/loader.py --images folder-of-jpegs

Every candidate gives uint8 batches of random resized crops with flips, in random order: ours over
betons of the original bytes and in the fast layout, and over FFCV's own re-encoding to 500 pixels
at quality 90, as it is and in the fast layout; stock FFCV over the original bytes and its
re-encoding, and with our decoder in place of its own; DALI's file reader, its reader of a beton by
`fastprune dali-index`, torchvision and SPDL over the files. An epoch is timed from the
request for its first batch to its last batch; start-up is measured apart, in processes of its own,
and so is the memory that a loader needs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _harness import ratios, spread, take_turns, write_result
from PIL import Image

from fastprune.base.cpus import usable_cpus
from fastprune.bench.peers import our_decoder_in_ffcv, stock_ffcv, torchvision_loader
from fastprune.beton.beton import Beton
from fastprune.beton.convert.writer import convert
from fastprune.beton.dali_index import write_dali_index
from fastprune.beton.opening import open_beton
from fastprune.loading.loader import Loader

SIZE = 224
OURS = (
    "ours original",
    "ours fast",
    "ours q90-500",
    "ours q90-500 fast",
    "ours dali",
    "our decoder in ffcv",
)
PEERS = ("stock ffcv", "stock ffcv q90-500", "dali files", "dali index", "torchvision", "spdl")

START_UP = """
import sys, time
started = time.perf_counter()
{imports}
loader = {loader}
next(iter(loader))
print(time.perf_counter() - started, flush=True)
import os; os._exit(0)
"""
MEMORY = """
import sys, torch
from fastprune.loading.loader import Loader
def resident():
    lines = open("/proc/self/status").read().splitlines()
    return sum(int(l.split()[1]) for l in lines if l.startswith(("RssAnon", "RssShmem"))) * 1024
dtype = torch.uint8 if sys.argv[3] == "uint8" else torch.float32
loader = Loader(sys.argv[1], batch_size=256, backend=sys.argv[2], dtype=dtype, tail="exact")
before, peak = resident(), 0
for _ in range(2):
    for batch in loader:
        peak = max(peak, resident())
print(peak - before)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="a folder of JPEG files")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument(
        "--workers", type=int, nargs="+", default=sorted({1, usable_cpus()}), help="thread counts"
    )
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        betons = write_betons(arguments.images, Path(folder))
        beton = open_beton(betons["original"])
        half = np.sort(np.random.default_rng(0).permutation(beton.num_rows)[: beton.num_rows // 2])
        shares = {"full": np.arange(beton.num_rows), "half": half}
        settings = {"batch_size": arguments.batch_size, "image_size": SIZE}
        result = {
            "question": "images per second from a beton, ours against other loaders",
            "settings": {
                **settings,
                "num_workers": arguments.workers,
                "rounds": arguments.rounds,
                "rows": beton.num_rows,
            },
            "image_bytes": {name: int(open_beton(betons[name]).sizes.sum()) for name in betons},
            "images_per_second": {},
            "ratios": {},
        }
        seconds = {}
        for workers in arguments.workers:
            for share, rows in shares.items():
                # Made anew for each number: stock FFCV's thread count is the process's.
                makers = candidates(
                    betons, rows, {**settings, "num_workers": workers}, Path(folder) / "files"
                )
                timed = take_turns(makers, rounds=arguments.rounds)
                name = f"{share}, {workers} threads"
                seconds[name] = timed
                result["images_per_second"][name] = {
                    candidate: spread([len(rows) / one for one in values])
                    for candidate, values in timed.items()
                }
                result["ratios"][name] = {
                    f"{ours} over {peer}": ratios(timed[peer], timed[ours])
                    for ours in OURS
                    for peer in PEERS
                    if ours in timed and peer in timed
                }
        most = max(arguments.workers)
        full, half = seconds[f"full, {most} threads"], seconds[f"half, {most} threads"]
        result["half_over_full_seconds"] = {name: ratios(half[name], full[name]) for name in full}
        result["first_batch_seconds"] = start_up(
            betons["original"], {**settings, "num_workers": most}
        )
        result["memory_growth_bytes_at_batch_256"] = memory(betons["original"])
        result["pixels"] = pixels(beton)
    path = write_result("loader", result)
    print(json.dumps({key: result[key] for key in result if key != "settings"}, indent=1))
    print(f"-> {path}")


def write_betons(images: Path, folder: Path) -> dict[str, Path]:
    """Both layouts by our converter, and FFCV's own re-encoding in both."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    files = sorted(path for path in images.iterdir() if path.suffix.lower() in (".jpg", ".jpeg"))
    for number, file in enumerate(files):
        target = folder / "files" / f"{number % 100:03d}" / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(file.resolve())
    for layout in ("original", "fast"):
        convert(folder / "files", folder / f"{layout}.beton", jpeg=layout)
    writer = DatasetWriter(
        str(folder / "q90-500.beton"),
        {
            "image": RGBImageField(write_mode="jpg", max_resolution=500, jpeg_quality=90),
            "label": IntField(),
        },
    )
    writer.from_indexed_dataset(Pictures(open_beton(folder / "original.beton")))
    small = open_beton(folder / "q90-500.beton")
    jpegs = [small.image_bytes(row).tobytes() for row in range(small.num_rows)]
    again = list(zip(jpegs, small.labels.tolist(), strict=True))
    convert(again, folder / "q90-500 fast.beton", jpeg="fast")
    names = ("original", "fast", "q90-500", "q90-500 fast")
    return {name: folder / f"{name}.beton" for name in names}


class Pictures:
    """A beton's rows as FFCV's writer wants them."""

    def __init__(self, beton: Beton):
        self.path, self.labels = beton.path, beton.labels
        self.offsets, self.sizes = beton.offsets, beton.sizes

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[np.ndarray, int]:
        import io

        jpeg = np.fromfile(self.path, np.uint8, count=self.sizes[row], offset=self.offsets[row])
        return np.array(Image.open(io.BytesIO(jpeg)).convert("RGB")), int(self.labels[row])


def candidates(
    betons: dict[str, Path], rows: np.ndarray, settings: dict, files: Path
) -> dict[str, Callable[[], None]]:
    """What runs one epoch of each loader; made once, so that start-up is not in it."""
    beton, small = open_beton(betons["original"]), open_beton(betons["q90-500"])
    common: dict[str, Any] = {"augment": "rrc", "dtype": torch.uint8, "tail": "exact", **settings}

    def ours(path: Path, backend: str) -> Loader:
        return Loader(path, rows, backend=backend, **common)

    loaders = {
        **{f"ours {name}": ours(path, "cpu") for name, path in betons.items()},
        "ours dali": ours(beton.path, "dali"),
        "our decoder in ffcv": our_decoder_in_ffcv(beton, rows, **settings),
        "stock ffcv": stock_ffcv(beton, rows, **settings),
        "stock ffcv q90-500": stock_ffcv(small, rows, **settings),
        "torchvision": torchvision_loader(beton, rows, **settings),
    }
    runs = {name: partial(exhaust, loader) for name, loader in loaders.items()}
    # DALI's readers crop by themselves, and give neither our rows nor our views.
    paths = [str(path) for path in sorted(files.rglob("*.JPEG"))] or [
        str(path) for path in sorted(files.rglob("*.jpg"))
    ]
    kept = [paths[row] for row in rows]
    runs["dali files"] = partial(dali_views, partial(dali_file_reader, kept), len(rows), settings)
    index = betons["original"].with_suffix(f".{len(rows)}.idx")
    write_dali_index(beton.path, index, subset=rows)
    reader = partial(dali_index_reader, beton.path, index)
    runs["dali index"] = partial(dali_views, reader, len(rows), settings)
    if spdl_works(kept[0]):
        runs["spdl"] = partial(spdl_files, kept, settings)
    return runs


def exhaust(loader) -> None:
    for _ in loader:
        pass


def dali_file_reader(paths: list[str]):
    """DALI's own reader of files."""
    from nvidia.dali import fn

    jpegs, _ = fn.readers.file(files=paths, random_shuffle=True, name="files")
    return jpegs


def dali_index_reader(beton: Path, index: Path):
    """DALI's own reader of archives, on the rows of a beton that an index names."""
    from nvidia.dali import fn, types

    return fn.readers.webdataset(
        paths=[str(beton)],
        index_paths=[str(index)],
        ext=["jpg"],
        dtypes=[types.UINT8],  # type: ignore[attr-defined]
        missing_component_behavior="error",
        random_shuffle=True,
    )


def dali_views(reader: Callable, num_rows: int, settings: dict) -> None:
    """One epoch of a reader of DALI's with its own random crop, on the CPU."""
    from nvidia.dali import fn, pipeline_def, types  # type: ignore[attr-defined]

    rgb = types.RGB  # type: ignore[attr-defined]

    @pipeline_def
    def pipeline():
        images = fn.decoders.image_random_crop(
            reader(), random_area=[0.08, 1.0], adjust_orientation=False, output_type=rgb
        )
        images = fn.resize(images, size=[SIZE, SIZE])
        return fn.flip(images, horizontal=fn.random.coin_flip())

    pipe = pipeline(
        batch_size=settings["batch_size"], num_threads=settings["num_workers"], device_id=None
    )
    pipe.build()
    for _ in range(-(-num_rows // settings["batch_size"])):
        (images,) = pipe.run()
        torch.utils.dlpack.from_dlpack(images.as_tensor()).clone()


def spdl_works(path: str) -> bool:
    """Whether SPDL is installed and finds the FFmpeg it was built for."""
    try:
        from spdl.io import demux_image

        demux_image(path)  # loads FFmpeg
    except (ImportError, RuntimeError):
        return False
    return True


def spdl_files(paths: list[str], settings: dict) -> None:
    """One epoch of SPDL: decode, crop to the box, scale, on its threads."""
    import spdl.io
    from spdl.pipeline import PipelineBuilder

    generator = np.random.default_rng()

    def view(path: str):
        packets = spdl.io.demux_image(path)
        share, left, top = (
            np.sqrt(generator.uniform(0.08, 1)),
            generator.random(),
            generator.random(),
        )
        crop = f"crop=iw*{share}:ih*{share}:(iw-ow)*{left}:(ih-oh)*{top}"
        flip = ",hflip" if generator.random() < 0.5 else ""
        filters = f"{crop},scale={SIZE}:{SIZE}{flip},format=pix_fmts=rgb24"
        return spdl.io.decode_packets(packets, filter_desc=filters)

    def batch(frames):
        return torch.from_numpy(np.array(spdl.io.convert_frames(frames)))

    order = generator.permutation(len(paths))
    pipeline = (
        PipelineBuilder()
        .add_source([paths[i] for i in order])
        .pipe(view, concurrency=settings["num_workers"])
        .aggregate(settings["batch_size"])
        .pipe(batch)
        .add_sink(3)
        .build(num_threads=settings["num_workers"])
    )
    with pipeline.auto_stop():
        for _ in pipeline:
            pass


def start_up(beton: Path, settings: dict) -> dict[str, dict]:
    """Seconds from the first import to the first batch, in fresh processes."""
    arguments = ", ".join(f"{key}={value}" for key, value in settings.items())
    ours = "Loader({path!r}, augment='rrc', dtype=torch.uint8, backend={backend!r}, {arguments})"
    from_loader = "import torch\nfrom fastprune.loading.loader import Loader"
    scripts = {
        f"ours {backend}": (
            from_loader,
            ours.format(path=str(beton), backend=backend, arguments=arguments),
        )
        for backend in ("cpu", "dali")
    }
    scripts["stock ffcv"] = (
        "import numpy as np\nfrom fastprune.beton.opening import open_beton\n"
        "from fastprune.bench.peers import stock_ffcv\n"
        f"beton = open_beton({str(beton)!r})",
        f"stock_ffcv(beton, np.arange(beton.num_rows), {arguments})",
    )
    measured = {}
    for name, (imports, loader) in scripts.items():
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            START_UP.format(imports=imports, loader=loader),
        ]
        measured[name] = spread([run(command) for _ in range(3)])
        if name == "ours cpu":
            with tempfile.TemporaryDirectory() as cache:
                environment = {**os.environ, "NUMBA_CACHE_DIR": cache, "XDG_CACHE_HOME": cache}
                measured["ours cpu, nothing compiled yet"] = spread([run(command, environment)])
    return measured


def memory(beton: Path) -> dict[str, float]:
    """Growth of RssAnon + RssShmem over two epochs of batch 256, in fresh processes."""
    return {
        f"ours {backend}, {dtype}": run([sys.executable, "-c", MEMORY, str(beton), backend, dtype])
        for backend in ("cpu", "dali")
        for dtype in ("uint8", "float32")
    }


def run(command: list[str], environment: dict[str, str] | None = None) -> float:
    """The number that a script prints last."""
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout.split()[-1])


def pixels(beton: Beton) -> dict[str, dict[str, float]]:
    """Mean absolute difference per image, in levels, between the engines and to PIL."""
    import io

    def images(backend: str) -> np.ndarray:
        loader = Loader(
            beton.path,
            augment="rrc",
            dtype=torch.uint8,
            order="sequential",
            tail="exact",
            backend=backend,
        )
        return torch.cat([batch for batch, _ in loader]).permute(0, 2, 3, 1).numpy()

    cpu, dali = images("cpu"), images("dali")
    loader = Loader(beton.path, augment="rrc", backend="cpu")
    views = loader.views(np.arange(beton.num_rows), slot=0)
    reference = np.empty_like(cpu)
    for row, (top, left, height, width, _, _, flip) in enumerate(views):
        whole = Image.open(io.BytesIO(beton.image_bytes(row))).convert("RGB")
        box = whole.crop((left, top, left + width, top + height))
        resized = np.asarray(box.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
        reference[row] = resized[:, ::-1] if flip else resized
    pairs = {
        "ours cpu to ours dali": (cpu, dali),
        "ours cpu to PIL": (cpu, reference),
        "ours dali to PIL": (dali, reference),
    }
    return {name: difference(*pair) for name, pair in pairs.items()}


def difference(one: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Mean over images, and the worst image."""
    levels = [float(np.abs(a.astype(np.int16) - b).mean()) for a, b in zip(one, other, strict=True)]
    return {
        "mean": float(np.mean(levels)),
        "worst": max(levels),
        "worst_row": int(np.argmax(levels)),
    }


if __name__ == "__main__":
    main()
