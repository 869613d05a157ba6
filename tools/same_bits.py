"""Print digests of what the checkout computes at a fixed seed: batches, scores, trained students.

Run it in two checkouts, each with its own code, and compare what it prints:

    OMP_NUM_THREADS=1 PYTHONPATH=. python tools/same_bits.py > here.txt

Everything runs on the CPU with one thread of torch; other numbers of threads add in another order.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.numpy import load_file

from fastprune import Loader, Subset, convert, distill, open_beton, score, select_rows
from fastprune.networks import build_network, save_weights
from fastprune.settings import make_recipe

CLASSES = 10
KILLED_AT = "SAME_BITS_KILLED_AT"  # number of the forward pass in which the student's process dies

# What differs from plain distillation: sections of a recipe.
STUDENTS: dict[str, dict[str, dict[str, object]]] = {
    "plain labels": {"teacher": {}},
    "kd": {},
    "medium half, reshaped": {"data": {"subset": "half.npy"}, "loss": {"reshaping": "class_std"}},
    "dkd": {"loss": {"distillation": "dkd"}},
    "zscore": {"loss": {"reshaping": "zscore", "temperature": 2.0}},
    "features": {"loss": {"feature_weight": 1.0, "distillation_warmup_epochs": 2}},
    "infobatch": {"pruning": {"rule": "infobatch", "skip_probability": 0.7}},
    "growing images": {"data": {"first_image_size": 16, "image_size_step": 8}},
    "averaged, clipped": {"schedule": {"ema_decay": 0.9, "clip_norm": 1.0}},
    "fixed iterations": {"data": {"subset": "half.npy"}, "schedule": {"fixed_iterations": True}},
    "bf16": {"run": {"precision": "bf16"}},
    "dropout": {"student": {"network": "same_bits:fragile"}},
}


def fragile(*, num_classes: int) -> torch.nn.Module:
    """Make a student with dropout, whose process dies in the pass that the environment names."""
    network = build_network("resnet8", num_classes=num_classes)
    passes = 0

    def drop(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> object:
        nonlocal passes
        passes += module.training
        if module.training and str(passes) == os.environ.get(KILLED_AT):
            os.kill(os.getpid(), 9)
        return torch.nn.functional.dropout(inputs[0], 0.05, module.training)

    network.register_forward_pre_hook(drop)
    return network


def draw_images(folder: Path, per_class: int, *, seed: int) -> None:
    """Write an image folder of discs on gradients with noise."""
    generator = np.random.default_rng(seed)
    for label in range(CLASSES):
        (folder / f"class_{label}").mkdir(parents=True)
        for number in range(per_class):
            width, height = generator.integers(40, 90, 2)
            y, x = np.mgrid[0:height, 0:width]
            pixels = 90 + 12 * label + generator.normal(0, 12, (height, width, 3))
            pixels[..., label % 3] += 80 * x / width - 40 * y / height
            image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
            ImageDraw.Draw(image).ellipse((8, 8, 12 + 3 * label, 30), fill=(label * 20, 99, 30))
            image.save(folder / f"class_{label}" / f"{number:03d}.jpg", quality=92)


def digest(*arrays: np.ndarray) -> str:
    """BLAKE2b over dtypes, shapes and bytes."""
    total = hashlib.blake2b(digest_size=8)
    for array in arrays:
        total.update(f"{array.dtype} {array.shape}".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


def print_batches(folder: Path) -> None:
    """Digest two epochs of batches for each kind of view."""
    for augment in ("rrc", "pad_crop", "center"):
        loader = Loader(
            folder / "train.beton",
            batch_size=16,
            augment=augment,
            image_size=32,
            seed=3,
            fields=("images", "labels", "rows"),
            device="cpu",
            num_workers=1,
        )
        for epoch in range(2):
            loader.set_epoch(epoch)
            arrays = [tensor.contiguous().numpy() for batch in loader for tensor in batch]
            print(f"batches {augment} epoch {epoch}: {digest(*arrays)}")


def print_scores(folder: Path) -> None:
    """Score the train beton, digest the table, and keep the medium half."""
    table = score(
        folder / "train.beton",
        "resnet8",
        folder / "scores.parquet",
        checkpoint=folder / "teacher.safetensors",
        image_size=32,
        device="cpu",
        num_workers=1,
    )
    names = sorted(table.metrics)
    print(f"scores: {digest(*(table.metrics[name] for name in names), table.class_std)}")
    rows = select_rows(table.metrics["loss"], table.labels, keep_ratio=0.5)
    print(f"medium half: {digest(rows)}")
    fingerprint = open_beton(folder / "train.beton").fingerprint
    Subset(rows, fingerprint, keep_ratio=0.5, class_std=table.class_std).save(folder / "half.npy")


def train(folder: Path, name: str, out: str, *, resume: bool = False) -> Path:
    """Train one of STUDENTS; returns the file of its weights."""
    settings: dict[str, dict[str, object]] = {
        "data": {
            "train": folder / "train.beton",
            "val": folder / "val.beton",
            "image_size": 32,
            "batch_size": 16,
            "num_workers": 1,
        },
        "teacher": {"network": "resnet8x4", "checkpoint": folder / "wide.safetensors"},
        "student": {"network": "resnet8"},
        "schedule": {"epochs": 4, "learning_rate": 0.05, "policy": "one_cycle"},
        "run": {"out": folder / out, "device": "cpu", "log_every": 3, "checkpoint_every": 2},
    }
    for section, keys in STUDENTS[name].items():
        settings[section] = (settings.get(section, {}) | keys) if keys else {}
        if "subset" in keys:
            settings[section]["subset"] = folder / str(keys["subset"])
    made = make_recipe({section: keys for section, keys in settings.items() if keys})
    return distill(made, resume=resume).student


def print_student(folder: Path, name: str, out: str, student: Path) -> None:
    """Digest the weights, and the losses on the way to them."""
    weights = load_file(student)
    lines = map(json.loads, (folder / out / "metrics.jsonl").read_text().splitlines())
    log = json.dumps([line | {"seconds": 0} for line in lines], sort_keys=True)
    losses = hashlib.blake2b(log.encode(), digest_size=4).hexdigest()
    print(f"student, {name}: {digest(*(weights[key] for key in sorted(weights)))} log {losses}")


def main() -> None:
    """Draw images, and print the digests."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=("batches", "scores", "students"), nargs="*")
    parser.add_argument("--killed", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))  # recipes name this file's network
    torch.set_num_threads(1)
    if arguments.killed is not None:
        train(arguments.killed, "dropout", "killed", resume=True)
        return
    parts = arguments.part or ("batches", "scores", "students")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for split, per_class in (("train", 9), ("val", 3)):
            draw_images(folder / split, per_class, seed=per_class)
            convert(folder / split, folder / f"{split}.beton", workers=1)
        for file, network in (("teacher", "resnet8"), ("wide", "resnet8x4")):
            torch.manual_seed(len(network))
            save_weights(
                build_network(network, num_classes=CLASSES), folder / f"{file}.safetensors"
            )
        if "batches" in parts:
            print_batches(folder)
        if "scores" in parts or "students" in parts:
            print_scores(folder)
        if "students" in parts:
            for number, student in enumerate(STUDENTS):
                out = f"run-{number}"
                print_student(folder, student, out, train(folder, student, out))
            for moment in ("4", "6", "9"):
                again = [sys.executable, __file__, "--killed", str(folder)]
                killed = subprocess.run(again, env=os.environ | {KILLED_AT: moment}, check=False)
                assert killed.returncode == -9, killed
            student = train(folder, "dropout", "killed", resume=True)
            print_student(folder, "dropout, killed three times", "killed", student)


if __name__ == "__main__":
    main()
