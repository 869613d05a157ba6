import pytest
import torch
from torch import nn

from fastprune.distillation.schedule import make_optimizer, make_scheduler
from fastprune.recipe import ScheduleSettings


def rates(steps_per_epoch: int, **settings) -> list[float]:
    """The learning rate of every step."""
    schedule = ScheduleSettings(learning_rate=0.2, **settings)
    optimizer = make_optimizer(nn.Linear(2, 2), schedule)
    scheduler = make_scheduler(optimizer, schedule, steps_per_epoch=steps_per_epoch)
    found = []
    for _ in range(schedule.epochs * steps_per_epoch):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_step_falls_at_its_milestones():
    found = rates(2, epochs=4, policy="step", milestones=(1, 3), gamma=0.1)
    assert found == pytest.approx([0.2, 0.2, 0.02, 0.02, 0.02, 0.02, 0.002, 0.002])


def test_cosine_falls_all_the_way():
    found = rates(5, epochs=4, policy="cosine")
    assert found[0] == 0.2
    assert found[10] == pytest.approx(0.1)
    assert found == sorted(found, reverse=True)


def test_one_cycle_rises_to_the_learning_rate_and_falls():
    found = rates(10, epochs=4, policy="one_cycle", warmup_share=0.25)
    assert found[0] == pytest.approx(0.008)
    assert max(found) == found[10] == pytest.approx(0.2)
    assert found[:11] == sorted(found[:11])
    assert found[10:] == sorted(found[10:], reverse=True)
    assert found[-1] < 0.001


@pytest.mark.parametrize("policy", ["step", "cosine", "one_cycle"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_shortest_runs_have_a_schedule(policy, steps):
    assert all(0 <= rate <= 0.2 for rate in rates(steps, epochs=1, policy=policy))


def test_nesterov_without_momentum_is_plain_descent():
    schedule = ScheduleSettings(epochs=1, momentum=0, nesterov=True)
    assert make_optimizer(nn.Linear(2, 2), schedule).param_groups[0]["nesterov"] is False


def test_optimizer_takes_the_settings():
    schedule = ScheduleSettings(epochs=1, momentum=0.7, nesterov=True, weight_decay=0.5)
    group = make_optimizer(nn.Linear(2, 2), schedule).param_groups[0]
    assert isinstance(make_optimizer(nn.Linear(2, 2), schedule), torch.optim.SGD)
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.7, True, 0.5)
