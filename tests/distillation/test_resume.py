"""A run that is stopped at any moment goes on, and ends as if nothing had happened."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from fastprune.base.errors import (
    ArtifactError,
    DamagedCheckpointWarning,
    RecipeError,
    TrainingStopped,
)
from fastprune.base.files import lock
from fastprune.distillation.checkpoint import Checkpoints
from fastprune.distillation.trainer import distill

ROOT = Path(__file__).parents[2]


@pytest.fixture
def long_recipe(recipe, tmp_path, teacher):
    """Four epochs of four steps, with everything that has a state."""

    def make(name, **sections):
        settings = {
            "teacher": {"network": "resnet8", "checkpoint": teacher},
            "student": {"network": "tests.distillation.networks:signalled"},
            "loss": {"feature_weight": 1.0},
            "schedule": {"epochs": 4, "ema_decay": 0.9, "clip_norm": 1.0},
            "run": {"out": tmp_path / name, "checkpoint_every": 3, "log_every": 3},
        }
        for section, keys in sections.items():
            settings[section] = settings.get(section, {}) | keys
        return recipe(**settings)

    return make


@pytest.fixture
def stopped(long_recipe, monkeypatch):
    """A recipe whose run was stopped by SIGTERM after step 6 of 16."""
    settings = long_recipe("stopped")
    monkeypatch.setenv("SMALL_SIGNAL", "SIGTERM:7")
    with pytest.raises(TrainingStopped):
        distill(settings)
    monkeypatch.delenv("SMALL_SIGNAL")
    return settings


def lines(folder):
    """What was logged, but for the time."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in found]


def assert_same_run(one, other):
    first, second = load_file(one.student), load_file(other.student)
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert lines(one.student.parent) == lines(other.student.parent)
    points = [[{**p, "train_seconds": 0} for p in result.curve] for result in (one, other)]
    assert points[0] == points[1]


def test_run_that_is_killed_at_several_moments_ends_as_the_uninterrupted_one(long_recipe, tmp_path):
    settings = long_recipe("killed")
    path = tmp_path / "recipe.json"
    path.write_text(settings.model_dump_json())
    code = (
        "import sys; from fastprune import distill; from fastprune.settings import Recipe;"
        f"distill(Recipe.model_validate_json(open({str(path)!r}).read()), resume=True)"
    )
    for pass_number in (3, 6, 8):  # before a checkpoint; in the midst of an epoch; behind its end
        environment = {
            **os.environ,
            "SMALL_SIGNAL": f"SIGKILL:{pass_number}",
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        }
        killed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment)
        assert killed.returncode == -9
    assert_same_run(distill(settings, resume=True), distill(long_recipe("uninterrupted")))
    assert not (tmp_path / "killed" / "checkpoints").exists()


def test_run_that_a_signal_stopped_goes_on_as_if_it_had_not(stopped, long_recipe):
    names = [path.name[:14] for path in (stopped.run.out / "checkpoints").iterdir()]
    assert sorted(names) == ["step-000000004", "step-000000006"]
    assert_same_run(distill(stopped, resume=True), distill(long_recipe("uninterrupted")))


def test_damaged_newest_checkpoint_is_noticed_and_the_one_before_taken(stopped, long_recipe):
    newest = max((stopped.run.out / "checkpoints").iterdir())
    damaged = bytearray(newest.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    newest.write_bytes(damaged)
    with pytest.warns(
        DamagedCheckpointWarning, match=rf"{newest.name} is damaged .*another digest"
    ):
        result = distill(stopped, resume=True)
    assert_same_run(result, distill(long_recipe("uninterrupted")))


def test_seconds_of_all_parts_of_a_run_are_added_up(stopped):
    folder = stopped.run.out / "checkpoints"
    state = Checkpoints(folder, keep=1).newest()
    names = ("startup", "train", "validation", "checkpoint", "wait", "teacher", "student")
    planted = {name: 1000.0 * 2**number for number, name in enumerate((*names, "optimizer"))}
    state["timer"]["seconds"] |= planted
    Checkpoints(folder, keep=1).save(state, step=state["steps"])
    result = distill(stopped, resume=True)
    for name, seconds in planted.items():
        assert seconds < getattr(result, f"{name}_seconds") < seconds + 500
    assert result.total_seconds > sum(planted[name] for name in names[:4])


@pytest.mark.parametrize(
    ("intervals", "steps"),
    [
        ({"checkpoint_every": 2}, [2, 4, 6, 8, 10]),
        ({"checkpoint_every": 4}, [4, 8, 10]),
        ({"checkpoint_every": 100, "checkpoint_minutes": 1e-9}, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
    ],
)
def test_checkpoints_come_as_asked_and_once_at_the_end_of_an_epoch(
    long_recipe, monkeypatch, intervals, steps
):
    settings = long_recipe("often", run={**intervals, "keep_checkpoints": 99})
    monkeypatch.setenv("SMALL_SIGNAL", "SIGTERM:11")
    with pytest.raises(TrainingStopped):
        distill(settings)
    names = sorted(path.name for path in (settings.run.out / "checkpoints").iterdir())
    assert [int(name[5:14]) for name in names] == steps


def test_run_that_stopped_behind_the_last_batch_of_an_epoch_logs_the_same(long_recipe, monkeypatch):
    settings = long_recipe("stopped")
    monkeypatch.setenv("SMALL_SIGNAL", "SIGTERM:9")  # step 8 of 16, 4 in an epoch
    with pytest.raises(TrainingStopped, match="after step 8"):
        distill(settings)
    monkeypatch.delenv("SMALL_SIGNAL")
    assert_same_run(distill(settings, resume=True), distill(long_recipe("uninterrupted")))


def test_resume_without_a_checkpoint_begins_the_run(long_recipe):
    settings = long_recipe("new", schedule={"epochs": 1})
    assert distill(settings, resume=True).steps == 4


def test_unfinished_run_is_not_begun_anew_by_mistake(stopped):
    with pytest.raises(RecipeError, match=r"holds an unfinished run\. Continue it \(--resume\)"):
        distill(stopped)


def test_other_settings_are_refused_and_the_difference_is_named(stopped, long_recipe):
    changed = long_recipe("stopped", schedule={"learning_rate": 0.01}, run={"log_every": 1})
    message = r"other settings: schedule\.learning_rate \(0\.05 there, 0\.01 here\)\. Continue"
    before = (stopped.run.out / "recipe.json").read_bytes()
    with pytest.raises(RecipeError, match=message):
        distill(changed, resume=True)
    assert (stopped.run.out / "recipe.json").read_bytes() == before


def test_other_rows_are_refused(stopped, long_recipe, half):
    with pytest.raises(RecipeError, match=r"the rows of data\.subset"):
        distill(long_recipe("stopped", data={"subset": half}), resume=True)


def test_two_runs_in_one_folder_are_refused(long_recipe):
    settings = long_recipe("taken")
    settings.run.out.mkdir()
    with (
        lock(settings.run.out / ".lock"),
        pytest.raises(ArtifactError, match="another process is writing into"),
    ):
        distill(settings)
