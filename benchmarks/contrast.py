"""What do contrast rows cost a loader, and what do they cost RepDistiller's data set?

    python benchmarks/contrast.py --images folder-with-a-folder-of-each-class

Epochs with and without contrast rows in turn, and the same with torch's DataLoader over a data set
that draws them as RepDistiller's CIFAR100InstanceSample does, its images in memory.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from _harness import ratios, spread, take_turns, write_result

from fastprune.beton.convert.writer import convert
from fastprune.loading.loader import Loader

BATCH_SIZE = 64


class InstanceSample(torch.utils.data.Dataset):
    """Images with contrast rows, drawn as in RepDistiller's dataset/cifar100.py."""

    def __init__(self, labels: np.ndarray, num_rows: int, num_negatives: int):
        self.labels = labels
        self.images = torch.zeros(num_rows, 3, 32, 32)
        self.num_negatives = num_negatives
        self.negatives = [np.flatnonzero(labels != c) for c in range(labels.max() + 1)]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple:
        negatives = self.negatives[self.labels[row]]
        replace = self.num_negatives > len(negatives)
        drawn = np.random.choice(negatives, self.num_negatives, replace=replace)  # noqa: NPY002
        return self.images[row], self.labels[row], row, np.hstack([[row], drawn])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="a folder for each class")
    parser.add_argument("--num-negatives", type=int, default=16_384)
    parser.add_argument("--rows", type=int, default=20_000, help="of an epoch of ours")
    parser.add_argument(
        "--peer-rows", type=int, default=2_000, help="of an epoch of the DataLoader"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.beton"
        convert(arguments.images, path)
        settings = {
            "batch_size": BATCH_SIZE,
            "image_size": 32,
            "dtype": torch.uint8,
            "device": "cpu",
            "num_workers": arguments.workers,
            "num_negatives": arguments.num_negatives,
        }
        num_rows = Loader(path, **settings).beton.num_rows
        rows = np.sort(np.random.default_rng(0).permutation(num_rows)[: arguments.rows])
        plain = Loader(path, rows, fields=("images", "labels", "rows"), **settings)
        contrast = Loader(
            path, rows, fields=("images", "labels", "rows", "contrast_rows"), **settings
        )
        sample = InstanceSample(
            contrast.beton.labels, min(num_rows, arguments.peer_rows), arguments.num_negatives
        )
        peer = torch.utils.data.DataLoader(
            sample,
            BATCH_SIZE,
            shuffle=True,
            drop_last=True,
            num_workers=arguments.workers,
            persistent_workers=True,
        )
        images = {
            "ours": len(plain) * BATCH_SIZE,
            "ours with contrast rows": len(contrast) * BATCH_SIZE,
            "InstanceSample, images in memory": len(peer) * BATCH_SIZE,
        }
        loaders = dict(zip(images, (plain, contrast, peer), strict=True))
        timed = take_turns(
            {name: lambda loader=loader: run(loader) for name, loader in loaders.items()},
            rounds=arguments.rounds,
        )
    per_image = {name: [s / images[name] for s in timed[name]] for name in images}
    ours, with_contrast, theirs = per_image.values()
    result = {
        "question": "images per second with contrast rows, and without",
        "settings": {**vars(arguments), "images": None, "batch_size": BATCH_SIZE},
        "images_per_second": {n: spread([1 / s for s in per_image[n]]) for n in per_image},
        "speed_ratios": {
            "with contrast rows over without": ratios(ours, with_contrast),
            "ours over InstanceSample": ratios(theirs, with_contrast),
        },
    }
    path = write_result("contrast", result)
    print(json.dumps(result, indent=1))
    print(f"-> {path}")


def run(loader: torch.utils.data.DataLoader | Loader) -> None:
    for _ in loader:
        pass


if __name__ == "__main__":
    main()
