import pytest
import torch
from torch import nn

from fastprune.distillation.schedule import learning_rate, make_optimizer, num_passes
from fastprune.settings import ScheduleSettings


def rates(steps: int, **settings) -> list[float]:
    """The learning rate of every step of a run."""
    schedule = ScheduleSettings(learning_rate=0.2, **settings)
    return [learning_rate(schedule, step / steps) for step in range(steps)]


def test_step_falls_at_its_milestones():
    found = rates(8, epochs=4, policy="step", milestones=(1, 3), gamma=0.1)
    assert found == pytest.approx([0.2, 0.2, 0.02, 0.02, 0.02, 0.02, 0.002, 0.002])


@pytest.mark.parametrize("steps_per_epoch", [3, 7, 49])
def test_no_milestone_is_missed_by_a_rounding(steps_per_epoch):
    epochs = 100
    found = rates(epochs * steps_per_epoch, epochs=epochs, milestones=range(1, epochs), gamma=0.99)
    falls = [step for step in range(1, len(found)) if found[step] < found[step - 1]]
    assert falls == [epoch * steps_per_epoch for epoch in range(1, epochs)]


def test_cosine_falls_all_the_way():
    found = rates(20, epochs=4, policy="cosine")
    assert found[0] == 0.2
    assert found[10] == pytest.approx(0.1)
    assert found == sorted(found, reverse=True)


def test_one_cycle_rises_to_the_learning_rate_and_falls():
    found = rates(40, epochs=4, policy="one_cycle", warmup_share=0.25)
    assert found[0] == pytest.approx(0.008)
    assert max(found) == found[10] == pytest.approx(0.2)
    assert found[:11] == sorted(found[:11])
    assert found[10:] == sorted(found[10:], reverse=True)
    assert found[-1] < 0.001


@pytest.mark.parametrize("policy", ["step", "cosine"])
def test_warm_up_rises_to_the_learning_rate_over_its_epochs(policy):
    found = rates(40, epochs=4, policy=policy, warmup_epochs=1)
    assert found[0] == pytest.approx(0.008)
    assert found[:11] == sorted(found[:11])
    assert found[10] == pytest.approx(0.2)


@pytest.mark.parametrize("policy", ["step", "cosine", "one_cycle"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_shortest_runs_have_a_schedule(policy, steps):
    assert all(0 < rate <= 0.2 for rate in rates(steps, epochs=1, policy=policy))


def test_passes_are_epochs_unless_the_iterations_are_fixed():
    assert num_passes(ScheduleSettings(epochs=7), steps_of_pass=10, steps_of_all=20) == 7


@pytest.mark.parametrize(("steps_of_pass", "passes"), [(10, 14), (20, 7), (14, 10), (11, 13)])
def test_fixed_iterations_take_the_steps_of_all_rows_in_whole_passes(steps_of_pass, passes):
    settings = ScheduleSettings(epochs=7, fixed_iterations=True)
    assert num_passes(settings, steps_of_pass=steps_of_pass, steps_of_all=20) == passes
    assert abs(passes * steps_of_pass - 140) <= steps_of_pass / 2


def test_nesterov_without_momentum_is_plain_descent():
    schedule = ScheduleSettings(epochs=1, momentum=0, nesterov=True)
    assert make_optimizer(nn.Linear(2, 2), schedule).param_groups[0]["nesterov"] is False


def test_optimizer_takes_the_settings():
    schedule = ScheduleSettings(epochs=1, momentum=0.7, nesterov=True, weight_decay=0.5)
    group = make_optimizer(nn.Linear(2, 2), schedule).param_groups[0]
    assert isinstance(make_optimizer(nn.Linear(2, 2), schedule), torch.optim.SGD)
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.7, True, 0.5)
