"""Does everything hold on a GPU, and how fast is it there? Tests, then measurements by their value.

    python benchmarks/gpu.py pack --images imagenet --cifar cifar10   # anywhere: build/gpu-pack
    python benchmarks/gpu.py run                                      # there: results/gpu.json
    python benchmarks/gpu.py run --device cpu                         # a rehearsal, small

What `pack` writes is all that a machine with torch, numba and pyarrow needs, without a package
index: images, and wheels of what it lacks. `run` unpacks it and starts a process for each stage of
_gpu.py, ends it at its limit, and writes the JSON after each, so that nothing measured is lost.
"""

import argparse
import json
import lzma
import os
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from _harness import RESULTS, ROOT, commit

PACK = ROOT / "build" / "gpu-pack"
# What is carried to such a machine, this source tree included, must often fit into 64 MiB.
MOST_PACKED_BYTES = 56 << 20
#: Stage -> its limit in seconds; in order of value.
STAGES = {"tests": 240, "steps": 420, "epoch": 180, "decode": 120, "study": 1500}
_LACKING = ("google-crc32c", "pydantic", "pydantic-core", "annotated-types", "typing-inspection")
_SMALL_BETON_ROWS = 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    packing = commands.add_parser("pack", help="write what a bare machine needs")
    packing.add_argument("--images", type=Path, required=True, help="a folder of JPEG files")
    packing.add_argument("--cifar", type=Path, help="has folders train and test; for the study")
    packing.add_argument("--per-class", type=int, default=0, help="images of CIFAR; 0 for all")
    packing.add_argument("--megabytes", type=float, default=34, help="of the JPEG files")
    packing.add_argument("--python", default="3.12", help="of the machine, for the wheels")
    packing.add_argument("--wheels", nargs="*", default=_LACKING, help="packages that it lacks")
    packing.add_argument("-o", "--out", type=Path, default=PACK)
    packing.set_defaults(run=pack)
    running = commands.add_parser("run", help="run the tests and benchmarks")
    running.add_argument("--pack", type=Path, default=PACK)
    running.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    running.add_argument("--minutes", type=float, default=28, help="of all stages together")
    running.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    running.add_argument("--work", type=Path, help="default: build/gpu-DEVICE")
    running.add_argument("-o", "--out", type=Path, help="JSON; default: results/gpu.json on CUDA")
    running.set_defaults(run=run)
    arguments = parser.parse_args()
    arguments.run(arguments)


def pack(arguments: argparse.Namespace) -> None:
    """Write betons, compressed where that helps, and wheels into one small folder."""
    out = arguments.out
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    taken: list[tuple[bytes, int]] = []
    for number, file in enumerate(jpegs(arguments.images)):
        taken.append((file.read_bytes(), number % 10))
        if sum(len(content) for content, _ in taken) > arguments.megabytes * 1e6:
            break
    write_compressed(taken, out / "images.beton")
    for split in ("train", "test") if arguments.cifar else ():
        classes = sorted(path for path in (arguments.cifar / split).iterdir() if path.is_dir())
        rows = [
            (file.read_bytes(), label)
            for label, folder in enumerate(classes)
            for file in jpegs(folder)[: arguments.per_class or None]
        ]
        write_compressed(rows, out / f"{split}.beton")
    if arguments.wheels:
        download = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        download += ["--only-binary=:all:", "--python-version", arguments.python]
        for glibc in ("2_28", "2_17"):
            download += ["--platform", f"manylinux_{glibc}_x86_64"]
        download += ["--platform", "manylinux2014_x86_64", "-c", str(ROOT / "constraints.txt")]
        subprocess.run([*download, "-d", str(out / "wheels"), *arguments.wheels], check=True)
    (out / "pack.json").write_text(json.dumps({"commit": commit()}) + "\n")
    packed = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{len(taken)} images, {packed / 1e6:.1f} MB -> {out}")
    if packed > MOST_PACKED_BYTES:
        sys.exit(f"{out} is larger than {MOST_PACKED_BYTES >> 20} MiB. Lower --megabytes.")


def write_compressed(images: list[tuple[bytes, int]], path: Path) -> None:
    """Write a beton and compress it: small JPEGs share their tables, and its pages have room."""
    from fastprune.beton.convert.writer import convert

    convert(images, path, jpeg="original", workers=1)
    path.with_suffix(".beton.xz").write_bytes(lzma.compress(path.read_bytes(), preset=3))
    path.unlink()
    Path(f"{path}.manifest.parquet").unlink()


def jpegs(folder: Path) -> list[Path]:
    """The JPEG files below a folder, in order."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))


def run(arguments: argparse.Namespace) -> None:
    """Run the stages in turn until the time is over."""
    ends = time.monotonic() + 60 * arguments.minutes
    device = arguments.device
    if device == "cuda" and not cuda_works():
        sys.exit("torch sees no CUDA device here. Rehearse with: --device cpu")
    work = (arguments.work or ROOT / "build" / f"gpu-{device}").absolute()
    out = arguments.out or (RESULTS / "gpu.json" if device == "cuda" else work / "gpu.json")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    environment = unpack(arguments.pack, work, small=device == "cpu")
    result: dict[str, Any] = {
        "question": "tests and rates on a GPU, by stage; a stage that was stopped keeps its part",
        "device": device,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit_of(arguments.pack),
        "stages": {},
    }
    for stage in arguments.stages:
        left = ends - time.monotonic()
        if left < 20:
            result["stages"][stage] = {"ended": "not begun: the time was over"}
            continue
        print(f"{stage} ...", flush=True)
        limit = min(STAGES[stage], left)
        result["stages"][stage] = run_stage(stage, work, device, limit, environment)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        seconds, ended = (result["stages"][stage][key] for key in ("seconds", "ended"))
        print(f"{stage}: {ended}, {seconds:.0f} s -> {out}", flush=True)
    if any(stage["ended"] != "done" for stage in result["stages"].values()):
        sys.exit(1)


def cuda_works() -> bool:
    """Whether torch sees a GPU."""
    import torch

    return torch.cuda.is_available()


def unpack(folder: Path, work: Path, *, small: bool) -> dict[str, str]:
    """Install the wheels and open the betons; give the environment that stages run in."""
    paths = [str(ROOT)]
    if folder.joinpath("wheels").is_dir() and not small:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        wheels = map(str, sorted(folder.glob("wheels/*.whl")))
        subprocess.run([*install, "--target", str(work / "site"), *wheels], check=True)
        paths.append(str(work / "site"))
    if not (folder / "images.beton.xz").exists():
        sys.exit(
            f"{folder} holds no images. Write it by: python benchmarks/gpu.py pack --images ..."
        )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    for compressed in folder.glob("*.beton.xz"):
        (work / compressed.stem).write_bytes(lzma.decompress(compressed.read_bytes()))
    repeat = ["--rows", str(_SMALL_BETON_ROWS if small else 12_800)]
    command = [sys.executable, str(ROOT / "benchmarks" / "_gpu.py"), "betons"]
    command += ["--work", str(work), "--source", str(work / "images.beton"), *repeat]
    subprocess.run(command, env=environment, check=True)
    return environment


def run_stage(
    stage: str, work: Path, device: str, limit: float, environment: dict[str, str]
) -> dict[str, Any]:
    """Run one stage in a process of its own; what it wrote counts, however it ended."""
    command = [sys.executable, str(ROOT / "benchmarks" / "_gpu.py"), stage]
    command += ["--work", str(work), "--device", device, "--seconds", str(limit - 10)]
    started = time.monotonic()
    with (work / f"{stage}.log").open("w") as log:
        try:
            done = subprocess.run(
                command, env=environment, stdout=log, stderr=log, timeout=limit, check=False
            )
            ended = "done" if done.returncode == 0 else f"failed with {done.returncode}"
        except subprocess.TimeoutExpired:
            ended = "stopped at its limit"
    measured = work / f"{stage}.json"
    lines = (work / f"{stage}.log").read_text(encoding="utf-8", errors="replace").splitlines()
    return {
        "ended": ended,
        "seconds": time.monotonic() - started,
        "measured": json.loads(measured.read_text()) if measured.exists() else None,
        **({} if ended == "done" else {"log": lines[-30:]}),
    }


def commit_of(folder: Path) -> str:
    """The commit of the working tree, or of the pack where a copy without git runs it."""
    here = commit()
    packed = folder / "pack.json"
    return (
        json.loads(packed.read_text())["commit"] if here == "unknown" and packed.exists() else here
    )


if __name__ == "__main__":
    main()
