"""Is this checkout as fast as another one: epochs, first batch, conversion, scoring, training?

    python benchmarks/revisions.py --images folder-of-jpegs --against ../other-checkout

One process for each checkout does each kind of work, the two in turn. The first batch is timed from
the start of a process of its own, with everything compiled before.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _harness import ROOT, ratios, spread, take_turns, write_result

from fastprune import convert
from fastprune.base.cpus import usable_cpus
from fastprune.networks import build_network, save_weights

SCORED_ROWS = 512
TRAINED_STEPS = 60

# Does what each line on its standard input names, and answers with a line.
WORKER = """
import inspect, json, shutil, sys
from pathlib import Path
import torch
from fastprune import Loader
from fastprune.cli import main

folder, number = Path(sys.argv[1]), 0
work = Path(sys.argv[2])
work.mkdir()
loaders = {}

def command(*words):
    main(list(map(str, words)), standalone_mode=False)
    return None

def epoch(workers):
    # Pixels as they are had an argument of their own once.
    had_raw = "raw" in inspect.signature(Loader).parameters
    pixels = {"raw": True} if had_raw else {"dtype": torch.uint8}
    if workers not in loaders:
        loaders[workers] = Loader(
            folder / "train.beton", batch_size=64, num_workers=int(workers), device="cpu", **pixels
        )
    for batch in loaders[workers]:
        pass

for line in sys.stdin:
    name, *rest = line.split()
    number += 1
    seconds = None
    if name == "epoch":
        epoch(*rest)
    elif name == "convert":
        command("convert", folder / "images", work / f"{number}.beton", "--workers", rest[0],
                "--jpeg", rest[1])
        (work / f"{number}.beton").unlink()
    elif name == "score":
        command("score", folder / "few.beton", "-o", work / f"{number}.parquet", "--teacher",
                "resnet8", "--teacher-checkpoint", folder / "teacher.safetensors",
                "--image-size", "64", "--device", "cpu")
    elif name == "train":
        out = work / f"run-{number}"
        command("train", folder / "recipe.toml", "--set", f"run.out={out}")
        seconds = json.loads((out / "result.json").read_text())["step_seconds_p50"]
        shutil.rmtree(out)
    print("done", seconds, file=sys.__stderr__, flush=True)
"""
FIRST_BATCH = """
import inspect, os, sys, torch
from fastprune import Loader
had_raw = "raw" in inspect.signature(Loader).parameters
pixels = {"raw": True} if had_raw else {"dtype": torch.uint8}
loader = Loader(sys.argv[1], batch_size=64, num_workers=int(sys.argv[2]), device="cpu", **pixels)
next(iter(loader))
os._exit(0)
"""
RECIPE = """
[data]
train = "{folder}/few.beton"
val = "{folder}/few.beton"
image_size = 64
batch_size = 32
[teacher]
network = "resnet20"
checkpoint = "{folder}/teacher20.safetensors"
[student]
network = "resnet8"
[schedule]
epochs = {epochs}
[run]
device = "cpu"
validate_every = {epochs}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="a folder of JPEG files")
    parser.add_argument("--against", type=Path, required=True, help="another checkout")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    checkouts = {"this": ROOT, "other": arguments.against.resolve()}
    workers = sorted({1, usable_cpus()})
    result: dict[str, Any] = {
        "question": "seconds of this checkout over another's, by kind of work",
        "settings": {
            "against": revision(checkouts["other"]),
            "images": len(list(arguments.images.iterdir())),
            "rounds": arguments.rounds,
        },
        "ratio": {},
        "seconds": {},
    }

    def note(kind: str, seconds: dict[str, list[float]]) -> None:
        result["ratio"][kind] = ratios(seconds["this"], seconds["other"])
        result["seconds"][kind] = {who: spread(seconds[who]) for who in seconds}
        print(f"{kind}: {result['ratio'][kind]}", flush=True)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, arguments.images)
        works = {f"epoch, {count} threads": f"epoch {count}" for count in workers}
        works |= {f"convert, {count} workers": f"convert {count} original" for count in workers}
        works |= {"score": "score", "training step": "train"}
        processes = {who: start(root, folder, who) for who, root in checkouts.items()}
        try:
            for kind, line in works.items():
                note(kind, in_turn(processes, line, arguments.rounds))
        finally:
            for process in processes.values():
                process.stdin.close()
                process.wait()
        for count in workers:
            first = {w: partial(first_batch, r, folder, count) for w, r in checkouts.items()}
            # Every loader of tensors pays the imports.
            first["numpy and torch"] = imports
            note(f"first batch, {count} threads", take_turns(first, rounds=arguments.rounds))
    path = write_result("revisions", result)
    print(f"-> {path}")


def prepare(folder: Path, images: Path) -> None:
    """Write the images as an ImageFolder of one class, betons, teachers and a recipe."""
    source = folder / "images" / "all"
    source.mkdir(parents=True)
    for path in sorted(images.glob("*.JPEG")):
        (source / path.name).symlink_to(path.resolve())
    convert(folder / "images", folder / "train.beton", jpeg="original")
    few = folder / "few"
    for number, path in enumerate(sorted(source.iterdir())[:SCORED_ROWS]):
        (few / str(number % 2)).mkdir(parents=True, exist_ok=True)
        (few / str(number % 2) / path.name).symlink_to(path.resolve())
    convert(few, folder / "few.beton", jpeg="original")
    for name, network in (("teacher", "resnet8"), ("teacher20", "resnet20")):
        torch.manual_seed(0)
        save_weights(build_network(network, num_classes=2), folder / f"{name}.safetensors")
    epochs = -(-TRAINED_STEPS * 32 // SCORED_ROWS)
    (folder / "recipe.toml").write_text(RECIPE.format(folder=folder, epochs=epochs))


def revision(root: Path) -> str:
    git = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()


def start(root: Path, folder: Path, who: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(folder), str(folder / f"work-{who}")],
        env=os.environ | {"PYTHONPATH": str(root)},
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def in_turn(processes: dict[str, subprocess.Popen], line: str, rounds: int) -> dict[str, list]:
    """Seconds of one kind of work by checkout; a step's are the ones that the run reports."""
    reported: dict[str, list[float]] = {who: [] for who in processes}

    def one(who: str) -> None:
        process = processes[who]
        print(line, file=process.stdin, flush=True)
        # Progress and log lines come before the answer.
        for answer in process.stderr:
            if answer.startswith("done "):
                if answer != "done None\n":
                    reported[who].append(float(answer.split()[1]))
                return
        raise SystemExit(f"{line} failed; the process ended with {process.wait()}")

    seconds = take_turns({who: partial(one, who) for who in processes}, rounds=rounds)
    return {who: reported[who][-rounds:] or seconds[who] for who in processes}


def first_batch(root: Path, folder: Path, workers: int) -> None:
    subprocess.run(
        [sys.executable, "-c", FIRST_BATCH, str(folder / "train.beton"), str(workers)],
        env=os.environ | {"PYTHONPATH": str(root)},
        cwd=folder,
        check=True,
    )


def imports() -> None:
    subprocess.run([sys.executable, "-c", "import numpy, torch"], check=True)


if __name__ == "__main__":
    main()
