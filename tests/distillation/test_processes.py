"""Several processes that train together, started by torchrun, on gloo."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from fastprune.base.errors import RecipeError
from fastprune.base.ranks import Ranks
from fastprune.distillation.step import synchronize_batchnorm
from fastprune.distillation.trainer import distill
from fastprune.networks import build_network, save_weights

ROOT = Path(__file__).parents[2]


def torchrun(recipe, tmp_path, *options, **environment):
    """`fastprune train` on two ranks; its exit status is torchrun's."""
    path = tmp_path / "recipe.toml"
    lines = []
    for section, keys in json.loads(recipe.model_dump_json(exclude_none=True)).items():
        lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in keys.items())]
    path.write_text("\n".join(lines))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*launcher, "-m", "fastprune", "train", str(path), *options],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
    )


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture
def frozen_recipe(recipe, tmp_path, teacher):
    """52 steps of 20 rows, however many processes share them."""

    def make(name, processes):
        return recipe(
            data={"batch_size": 20 // processes, "num_workers": 1},
            teacher={"network": "resnet8", "checkpoint": teacher},
            student={"network": "tests.distillation.networks:frozen"},
            schedule={"epochs": 13, "learning_rate": 0.1},
            run={"out": tmp_path / name, "validate_every": 13},
        )

    return make


def test_two_ranks_train_and_validate_as_one_with_twice_the_batch(frozen_recipe, tmp_path):
    one = distill(frozen_recipe("one", 1))
    ran = torchrun(frozen_recipe("two", 2), tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("trained on 80 rows for 13 epochs") == 1
    assert len(losses(tmp_path / "two")) == 52
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
    two = json.loads((tmp_path / "two" / "result.json").read_text())
    assert (two["processes"], two["batch_size"], two["images_per_epoch"]) == (2, 20, 80)
    assert two["curve"][0]["val_loss"] == pytest.approx(one.curve[0]["val_loss"], abs=1e-4)
    assert two["top1_last"] == pytest.approx(one.top1_last, abs=1.5 / 30)
    weights = load_file(tmp_path / "two" / "student.safetensors")
    assert weights["classifier.weight"] == pytest.approx(
        load_file(one.student)["classifier.weight"], abs=1e-4
    )


def test_error_on_one_rank_ends_all_with_one_message(recipe, tmp_path):
    broken = recipe(
        data={"batch_size": 10, "num_workers": 1},
        student={"network": "tests.distillation.networks:broken_on_one_rank"},
        schedule={"epochs": 50},
    )
    ran = torchrun(broken, tmp_path)
    assert ran.returncode == 1
    assert ran.stderr.count("broken on purpose") == 1
    assert "lost the other ranks" not in ran.stderr
    assert "PeerError" not in ran.stderr
    assert not (tmp_path / "run" / "result.json").exists()


def test_two_ranks_that_signals_stopped_go_on_as_if_they_had_not(recipe, tmp_path, teacher):
    def make(name):
        return recipe(
            data={"batch_size": 10, "num_workers": 1},
            teacher={"network": "resnet8", "checkpoint": teacher},
            student={"network": "tests.distillation.networks:signalled"},
            schedule={"epochs": 3, "clip_norm": 1.0},
            run={"out": tmp_path / name, "log_every": 3},
        )

    whole, stopped = make("whole"), make("stopped")
    assert torchrun(whole, tmp_path).returncode == 0
    # To one rank alone, in step 6 and in the validation behind step 8; both hear a step later.
    for variable, moment, step in (
        ("SMALL_SIGNAL", "SIGTERM:7:1", 7),
        ("SMALL_SIGNAL_IN_VALIDATION", "SIGTERM:2:1", 10),
    ):
        ran = torchrun(stopped, tmp_path, "--resume", **{variable: moment})
        assert ran.returncode == 1
        assert f"SIGTERM stopped the run after step {step}." in ran.stderr
        assert "lost the other ranks" not in ran.stderr
        assert re.search(r"exitcode\s*: 143", ran.stderr)
        newest = max((stopped.run.out / "checkpoints").iterdir())
        assert newest.name.startswith(f"step-{step:09d}")
    assert torchrun(stopped, tmp_path, "--resume").returncode == 0
    assert losses(stopped.run.out) == losses(whole.run.out)
    ours, theirs = (load_file(r.run.out / "student.safetensors") for r in (stopped, whole))
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_batchnorm_is_not_synchronised_away_from_cuda():
    learner = torch.nn.BatchNorm2d(3)
    with pytest.raises(RecipeError, match=r"sync_batchnorm = true works on CUDA alone, but the 2"):
        synchronize_batchnorm(learner, Ranks(0, 2), torch.device("cpu"))
    assert synchronize_batchnorm(learner, Ranks(), torch.device("cpu")) is learner


def test_two_ranks_learn_features_without_labels(recipe, betons, tmp_path):
    torch.manual_seed(3)
    save_weights(build_network("resnet14", num_classes=0), tmp_path / "t.safetensors")
    settings = recipe(
        data={"val": None, "labels": False, "batch_size": 10, "num_workers": 1},
        teacher={"network": "resnet14", "checkpoint": tmp_path / "t.safetensors"},
        loss={"cross_entropy_weight": 0, "distillation_weight": 0, "feature_weight": 1},
        schedule={"epochs": 4},
    )
    ran = torchrun(settings, tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "no labels to validate by" in ran.stdout
    seen = losses(tmp_path / "run")
    assert seen[-1] < seen[0]
    assert "fc.weight" not in load_file(tmp_path / "run" / "student.safetensors")
