"""Training on a CUDA device; run by `make bench-gpu`, skipped where there is none."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from fastprune.base.errors import TrainingStopped
from fastprune.base.ranks import Ranks
from fastprune.beton.convert.writer import convert
from fastprune.beton.opening import open_beton
from fastprune.demo.pictures import write_demo_images
from fastprune.distillation.context import Batch, Context
from fastprune.distillation.infobatch import InfoBatch
from fastprune.distillation.losses import LogitReshaper
from fastprune.distillation.meters import PhaseTimer
from fastprune.distillation.step import Stepper, make_pair
from fastprune.distillation.teacher import Teacher
from fastprune.distillation.trainer import distill
from fastprune.networks import build_network, save_weights
from fastprune.rows.subset import Subset
from fastprune.settings import make_recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.fixture
def recipe(tmp_path):
    """A recipe of eight short epochs on drawn pictures; keyword arguments replace keys."""
    write_demo_images(tmp_path / "images", train_per_class=20, val_per_class=5, seed=0)
    for split in ("train", "val"):
        convert(tmp_path / "images" / split, tmp_path / f"{split}.beton")

    def make(name, **sections):
        settings = {
            "data": {
                "train": tmp_path / "train.beton",
                "val": tmp_path / "val.beton",
                "image_size": 32,
                "batch_size": 20,
            },
            "student": {"network": "resnet8"},
            "schedule": {"epochs": 8, "learning_rate": 0.1, "policy": "one_cycle"},
            "run": {"out": tmp_path / name, "device": "cuda", "precision": "bf16"},
        }
        for section, keys in sections.items():
            settings[section] = settings.get(section, {}) | keys
        return make_recipe(settings)

    return make


def test_plain_training_learns_in_bf16(recipe):
    result = distill(recipe("run", run={"log_every": 10}))
    lines = (result.student.parent / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines if '"loss"' in line]
    assert losses[-1] < losses[0] - 0.2
    assert load_file(result.student)["conv1.weight"].dtype == np.float32


def test_run_that_a_signal_stopped_ends_close_to_an_uninterrupted_one(recipe, monkeypatch):
    settings = {
        "student": {"network": "tests.distillation.networks:signalled"},
        "run": {"precision": "fp32", "checkpoint_every": 5},
        "schedule": {"ema_decay": 0.9},
    }
    monkeypatch.setenv("SMALL_SIGNAL", "SIGTERM:20")
    with pytest.raises(TrainingStopped):
        distill(recipe("stopped", **settings))
    monkeypatch.delenv("SMALL_SIGNAL")
    resumed = distill(recipe("stopped", **settings), resume=True)
    whole = distill(recipe("whole", **settings))
    assert resumed.steps == whole.steps == 80
    first, second = load_file(resumed.student), load_file(whole.student)
    assert all(np.allclose(first[name], second[name], atol=1e-2) for name in first)


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"loss": {"reshaping": "class_std"}},
        {"loss": {"distillation": "dkd", "reshaping": "zscore"}},
        {"loss": {"feature_weight": 25.0}},
        {"pruning": {"rule": "infobatch"}},
    ],
    ids=["plain", "reshaped", "decoupled", "features", "infobatch"],
)
def test_no_step_waits_for_the_device(recipe, tmp_path, sections):
    if "loss" in sections:
        torch.manual_seed(0)
        save_weights(build_network("resnet8", num_classes=10), tmp_path / "teacher.safetensors")
        fingerprint = open_beton(tmp_path / "train.beton").fingerprint
        subset = Subset(np.arange(200), fingerprint, class_std=np.linspace(0.5, 2, 10))
        subset.save(tmp_path / "all.npy")
        sections = sections | {
            "data": {"subset": tmp_path / "all.npy"},
            "teacher": {"network": "resnet8", "checkpoint": tmp_path / "teacher.safetensors"},
        }
    settings = recipe("run", schedule={"clip_norm": 1.0, "ema_decay": 0.9}, **sections)
    device = torch.device("cuda")
    context = Context(settings, Ranks(), device, PhaseTimer(device, began=0.0))
    learner, objective = make_pair(context, num_classes=10, keep_ratio=1.0)
    pruning = None
    if settings.pruning is not None:
        pruning = InfoBatch(
            settings.pruning,
            np.arange(200),
            epochs=8,
            seed=0,
            min_rows=20,
            device=device,
            ranks=Ranks(),
        )
        pruning.begin_epoch(0)
    teacher = Teacher(context, objective.teacher)
    stepper = Stepper(context, learner, objective, teacher, pruning)
    stepper.warm_up(num_classes=10, image_sizes=(32,))
    images = torch.randn(20, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    labels = torch.arange(20, device=device) % 10
    batch = Batch(images, labels, labels)
    stepper.begin_epoch(0)
    stepper.update(batch, step=1, learning_rate=0.1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        stepper.update(batch, step=2, learning_rate=0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    context.timer.read()
    assert context.timer.seconds["student"] > 0


def test_compiled_networks_train(recipe):
    result = distill(recipe("run", run={"compile": True}, schedule={"epochs": 2}))
    assert result.steps == 20


def test_reshaper_gives_on_cuda_what_it_gives_on_the_cpu():
    logits, labels = torch.randn(64, 100) * 4, torch.randint(0, 100, (64,))
    reshaper = LogitReshaper(torch.rand(100) + 0.5)
    expected = reshaper(logits, labels)
    found = reshaper.cuda()(logits.cuda(), labels.cuda()).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
