"""The whole method on one page: from folders of images to a student, without the training service.

    python examples/distill_plain.py images/train images/val --keep 0.5

Both folders hold one folder of images per class. `fastprune train` does the same from a recipe; it
also resumes, logs, averages weights, and runs on several processes. Start here if you write your
own training loop.
"""

import argparse
from pathlib import Path

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fastprune import (
    Loader,
    LogitReshaper,
    ScoreTable,
    convert,
    distillation_loss,
    score,
    select_rows,
)
from fastprune.networks import build_network

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main(options: argparse.Namespace) -> float:
    """Run all stations; returns the student's top-1 accuracy in [0, 1]."""
    # 1. Each folder becomes one file, which is mapped into memory and decoded crop by crop.
    train_beton, val_beton = options.out / "train.beton", options.out / "val.beton"
    options.out.mkdir(parents=True, exist_ok=True)
    convert(options.train, train_beton)
    convert(options.val, val_beton)

    # 2. A teacher, trained on the labels of all rows. Use a better one if you have it.
    num_classes = Loader(val_beton, train=False, image_size=options.size).num_classes
    teacher = build_network("resnet20", num_classes=num_classes).to(DEVICE)
    fit(teacher, loader(options, train_beton), epochs=options.teacher_epochs)
    print(f"teacher: {accuracy(teacher, options, val_beton):.1%} of the validation images")

    # 3. One pass of the teacher over training views gives every row its difficulty, and every class
    #    the spread of its logits over the whole dataset.
    table = score(
        train_beton, teacher, options.out / "scores.parquet", views=1, image_size=options.size
    )

    # 4. Of each class, keep the rows of medium difficulty.
    rows = select_rows(table.metric("loss"), table.labels, keep_ratio=options.keep)
    print(f"kept {len(rows):,} of {table.num_rows:,} rows")

    # 5. Distill on the kept rows.
    student = build_network("resnet8", num_classes=num_classes).to(DEVICE)
    distill(student, teacher, table, loader(options, train_beton, rows), epochs=options.epochs)
    top1 = accuracy(student, options, val_beton)
    print(f"student: {top1:.1%} of the validation images")
    return top1


def loader(
    options: argparse.Namespace, beton: Path, rows: NDArray | None = None, *, train: bool = True
) -> Loader:
    """Batches of (images (B, 3, S, S), labels (B,)) on the device, normalized; augmented to train.

    Order and views are pure functions of the seed, the epoch and the row.
    """
    return Loader(
        beton, rows, train=train, batch_size=64, image_size=options.size, seed=0, device=DEVICE
    )


def distill(
    student: nn.Module, teacher: nn.Module, table: ScoreTable, batches: Loader, *, epochs: int
) -> None:
    """Train a student on the teacher's logits for the kept rows.

    Pruning changes the spread of the teacher's logits; the reshaper gives each row's logits the
    mean spread of its class over all rows, kept or not.
    """
    reshape = LogitReshaper(table.class_std).to(DEVICE)
    teacher.eval()

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            targets = reshape(teacher(images), labels)  # on the student's view
        logits = student(images)
        distance = distillation_loss(logits, targets, temperature=4.0).mean()
        return 0.1 * functional.cross_entropy(logits, labels) + 0.9 * distance

    optimize(student, loss, batches, epochs=epochs)


def fit(network: nn.Module, batches: Loader, *, epochs: int) -> None:
    """Train a network on the labels alone."""

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(network(images), labels)

    optimize(network, loss, batches, epochs=epochs)


def optimize(network: nn.Module, loss, batches: Loader, *, epochs: int) -> None:
    """SGD along one cycle of the learning rate."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    steps = epochs * len(batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
    network.train()
    for epoch in range(epochs):
        batches.set_epoch(epoch)
        for images, labels in batches:
            optimizer.zero_grad()
            loss(images, labels).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(network: nn.Module, options: argparse.Namespace, beton: Path) -> float:
    """Top-1 accuracy on all rows of a beton, each once and center-cropped."""
    network.eval()
    batches = loader(options, beton, train=False)
    hits = [network(images).argmax(dim=1) == labels for images, labels in batches]
    return torch.cat(hits).float().mean().item()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("train", type=Path, help="folder of images to train on, a folder per class")
    parser.add_argument("val", type=Path, help="folder of images to validate on")
    parser.add_argument("--out", type=Path, default=Path("distill_plain"), help="folder for files")
    parser.add_argument("--keep", type=float, default=0.5, help="share of the rows to keep")
    parser.add_argument("--size", type=int, default=32, help="side of the images in pixels")
    parser.add_argument("--epochs", type=int, default=20, help="of the student")
    parser.add_argument("--teacher-epochs", type=int, default=20)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse())
