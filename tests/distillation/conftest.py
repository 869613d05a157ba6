"""A small beton pair and a teacher that every test of this folder may use."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fastprune.beton.convert.writer import convert
from fastprune.beton.opening import open_beton
from fastprune.demo.pictures import write_demo_images
from fastprune.networks import build_network, save_weights
from fastprune.rows.subset import Subset
from fastprune.settings import Recipe, make_recipe

IMAGE_SIZE = 32


@pytest.fixture(scope="session")
def betons(tmp_path_factory) -> Path:
    """A folder with train.beton (10 × 8 rows) and val.beton (10 × 3 rows)."""
    folder = tmp_path_factory.mktemp("betons")
    write_demo_images(folder / "images", train_per_class=8, val_per_class=3, seed=0)
    for split in ("train", "val"):
        convert(folder / "images" / split, folder / f"{split}.beton", workers=1)
    return folder


@pytest.fixture(scope="session")
def teacher(betons) -> Path:
    """Weights of a resnet8 with ten classes; what it says does not matter here."""
    torch.manual_seed(1)
    path = betons / "teacher.safetensors"
    save_weights(build_network("resnet8", num_classes=10), path)
    return path


@pytest.fixture(scope="session")
def half(betons) -> Path:
    """Every second row, with the class std that a selection carries."""
    path = betons / "half.npy"
    fingerprint = open_beton(betons / "train.beton").fingerprint
    rows = np.arange(0, 80, 2)
    Subset(rows, fingerprint, keep_ratio=0.5, class_std=np.linspace(0.5, 2, 10)).save(path)
    return path


@pytest.fixture
def recipe(betons, tmp_path):
    """Make a recipe of one epoch; keyword arguments replace keys of its sections."""

    def make(**sections: dict[str, object]) -> Recipe:
        settings: dict[str, dict[str, object]] = {
            "data": {
                "train": betons / "train.beton",
                "val": betons / "val.beton",
                "image_size": IMAGE_SIZE,
                "batch_size": 20,
                "num_workers": 2,
            },
            "student": {"network": "resnet8"},
            "schedule": {"epochs": 1, "learning_rate": 0.05, "policy": "cosine"},
            "run": {"out": tmp_path / "run", "device": "cpu", "log_every": 1},
        }
        for name, keys in sections.items():
            settings[name] = settings.get(name, {}) | keys
        return make_recipe(settings)

    return make
