"""How long is a distillation epoch on half of the rows, against one on all of them?

    python benchmarks/epoch.py                       # drawn pictures, on the CPU
    python benchmarks/epoch.py --device cuda --images imagenet/train --image-size 224 \
        --teacher resnet34 --student resnet18 --batch-size 256

Both epochs run through the same loader class and the same step, in turn, with nothing hidden: the
clock runs from the first request for a batch to the last optimiser step.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _harness import ratios, spread, take_turns, write_result
from torch import Tensor
from torch.optim import SGD

from fastprune.beton.convert.writer import convert
from fastprune.beton.opening import open_beton
from fastprune.demo.pictures import write_demo_images
from fastprune.distillation.learner import Learner
from fastprune.distillation.objective import Objective
from fastprune.loading.batch import choose_device
from fastprune.loading.loader import Loader
from fastprune.networks import FeatureNetwork, build_network
from fastprune.settings import LossSettings

DRAWN_PER_CLASS = 200
CLASSES_OF_A_FLAT_FOLDER = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--images", type=Path, help="an ImageFolder, or a folder of JPEG files; default: drawn"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--image-size", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--teacher", default="resnet20")
    parser.add_argument("--student", default="resnet8")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    with tempfile.TemporaryDirectory() as folder:
        beton = make_beton(arguments.images, Path(folder))
        all_rows = np.arange(open_beton(beton).num_rows)
        half = np.sort(np.random.default_rng(0).permutation(all_rows)[: len(all_rows) // 2])
        step = make_step(arguments, open_beton(beton).num_classes, device)
        epochs = {
            name: make_epoch(arguments, beton, rows, step, device)
            for name, rows in {"full": all_rows, "half": half}.items()
        }
        seconds = take_turns(epochs, rounds=arguments.rounds)
    result = {
        "question": "seconds of a distillation epoch on half of the rows over one on all",
        "settings": {key: str(value) for key, value in vars(arguments).items()},
        "rows": {"full": len(all_rows), "half": len(half)},
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "half_over_full": ratios(seconds["half"], seconds["full"]),
    }
    path = write_result(f"epoch-{device.type}", result)
    ratio = result["half_over_full"]
    print(f"half / full: {ratio['median']:.3f} ({ratio['min']:.3f}-{ratio['max']:.3f}) -> {path}")


def make_beton(images: Path | None, folder: Path) -> Path:
    """Convert the images, or drawn pictures."""
    if images is None:
        write_demo_images(
            folder / "images", train_per_class=DRAWN_PER_CLASS, val_per_class=1, seed=0
        )
        images = folder / "images" / "train"
    elif not any(path.is_dir() for path in images.iterdir()):
        images = with_classes(images, folder / "images")
    convert(images, folder / "train.beton")
    return folder / "train.beton"


def with_classes(images: Path, root: Path) -> Path:
    """An ImageFolder of links to the files of a flat folder; labels do not change the time."""
    for number, file in enumerate(sorted(images.iterdir())):
        name = f"class_{number % CLASSES_OF_A_FLAT_FOLDER}"
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / file.name).symlink_to(file.resolve())
    return root


def make_step(
    arguments: argparse.Namespace, num_classes: int, device: torch.device
) -> Callable[[Tensor, Tensor], None]:
    """One optimizer step of a student under a teacher; what the teacher says does not matter."""

    def build(name: str) -> FeatureNetwork:
        network = build_network(name, num_classes=num_classes)
        network.to(device).to(memory_format=torch.channels_last)
        return FeatureNetwork(network, num_classes=num_classes, takes_features=False)

    learner = Learner(build(arguments.student))
    objective = Objective(LossSettings(), build(arguments.teacher))
    optimizer = SGD(learner.parameters(), lr=0.01, momentum=0.9)

    def step(images: Tensor, labels: Tensor) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            targets = objective.ask_teacher(images)
            loss = objective(learner(images), targets, labels).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def make_epoch(
    arguments: argparse.Namespace,
    beton: Path,
    rows: np.ndarray,
    step: Callable[[Tensor, Tensor], None],
    device: torch.device,
) -> Callable[[], None]:
    """A pass over the rows, compiled beforehand."""
    loader = Loader(
        beton,
        rows,
        batch_size=arguments.batch_size,
        image_size=arguments.image_size,
        device=device,
    )
    loader.warm_up()

    def epoch() -> None:
        for images, labels in loader:
            step(images, labels)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return epoch


if __name__ == "__main__":
    main()
