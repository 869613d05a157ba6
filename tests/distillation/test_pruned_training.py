import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from fastprune.distillation.step import Stepper
from fastprune.distillation.trainer import distill

PRUNING = {"rule": "infobatch", "skip_probability": 0.7}


class Killed(BaseException):
    """What no handler of ours catches."""


@pytest.fixture
def pruned(recipe, tmp_path):
    """Make a recipe of eight pruned epochs, into a folder of this name."""

    def make(name: str = "run", **schedule):
        return recipe(
            data={"batch_size": 8},
            schedule={"epochs": 8} | schedule,
            pruning=PRUNING,
            run={"out": tmp_path / name, "checkpoint_every": 1},
        )

    return make


def rows_of_epochs(folder) -> list[int]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["rows"] for line in lines if "rows" in line]


def test_epochs_skip_rows_but_the_first_and_the_last(pruned, tmp_path):
    result = distill(pruned())
    rows = rows_of_epochs(tmp_path / "run")
    assert rows[0] == rows[7] == result.rows == 80
    assert all(24 < count < 80 for count in rows[1:7])
    assert result.steps == sum(count // 8 for count in rows)
    assert result.images_per_epoch == result.steps * 8 // 8


def test_learning_rate_falls_by_epochs_however_many_steps_they_have(pruned, tmp_path):
    distill(pruned(policy="step", milestones=(2, 7), gamma=0.1))
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    rates = {}
    for line in lines:
        if "learning_rate" in line:
            rates.setdefault(line["epoch"], set()).add(round(line["learning_rate"], 6))
    assert [rates[epoch] for epoch in range(8)] == [{0.05}] * 2 + [{0.005}] * 5 + [{0.0005}]


@pytest.mark.parametrize("killed_at", [10, 13, 17])
def test_killed_run_goes_on_with_the_same_rows_to_the_same_weights(
    pruned, tmp_path, monkeypatch, killed_at
):
    whole = distill(pruned("whole"))
    update = Stepper.update

    def dying(self, *arguments, step, **others):
        if step > killed_at:
            raise Killed
        return update(self, *arguments, step=step, **others)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Stepper, "update", dying)
        distill(pruned("killed"))
    resumed = distill(pruned("killed"), resume=True)
    assert rows_of_epochs(tmp_path / "killed") == rows_of_epochs(tmp_path / "whole")
    weights = load_file(whole.student), load_file(resumed.student)
    assert all(np.array_equal(weights[0][name], weights[1][name]) for name in weights[0])
