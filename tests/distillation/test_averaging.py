import pytest
import torch
from torch import nn

from fastprune.distillation.schedule import WeightAverage


def test_average_moves_towards_the_weights_and_statistics_by_its_decay():
    student = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    average = WeightAverage(student, decay=0.75)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    with torch.no_grad():
        for value in student.state_dict().values():
            value.add_(4)
    average.update(student, step=1000)
    for name, value in average.student.state_dict().items():
        added = value - before[name]
        expected = 4.0 if name.endswith("num_batches_tracked") else 1.0
        assert added.double().mean().item() == pytest.approx(expected, abs=1e-5), name


def test_first_steps_are_followed_faster():
    student = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(student.weight)
    average = WeightAverage(student, decay=0.999)
    nn.init.ones_(student.weight)
    average.update(student, step=1)
    assert average.student.weight.item() == pytest.approx(1 - 2 / 11)


def test_average_takes_no_gradients_and_stays_in_eval_mode():
    average = WeightAverage(nn.Linear(1, 1).train(), decay=0.9).student
    assert not average.training
    assert not any(parameter.requires_grad for parameter in average.parameters())
