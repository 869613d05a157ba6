"""Training on a CUDA device; run by `make bench-gpu`, skipped where there is none."""

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from fastprune.beton.writer import convert
from fastprune.demo.pictures import write_demo_images
from fastprune.distillation.losses import LogitReshaper
from fastprune.distillation.trainer import distill
from fastprune.recipe import make_recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def test_plain_training_learns_in_bf16(tmp_path):
    write_demo_images(tmp_path / "images", train_per_class=20, val_per_class=5, seed=0)
    for split in ("train", "val"):
        convert(tmp_path / "images" / split, tmp_path / f"{split}.beton")
    recipe = make_recipe(
        {
            "data": {
                "train": tmp_path / "train.beton",
                "val": tmp_path / "val.beton",
                "image_size": 32,
                "batch_size": 20,
            },
            "student": {"network": "resnet8"},
            "schedule": {"epochs": 8, "learning_rate": 0.1, "policy": "one_cycle"},
            "run": {"out": tmp_path / "run", "device": "cuda", "precision": "bf16"},
        }
    )
    result = distill(recipe)
    assert result.curve[-1]["val_loss"] < np.log(10)
    assert load_file(result.student)["conv1.weight"].dtype == np.float32


def test_reshaper_gives_on_cuda_what_it_gives_on_the_cpu():
    logits, labels = torch.randn(64, 100) * 4, torch.randint(0, 100, (64,))
    reshaper = LogitReshaper(torch.rand(100) + 0.5)
    expected = reshaper(logits, labels)
    found = reshaper.cuda()(logits.cuda(), labels.cuda()).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
