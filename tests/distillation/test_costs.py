"""Costs of runs on machines that do something else as well."""

import random

import pytest

from fastprune.distillation.costs import Cost, cost_ratio, summarize_steps


def noisy(seconds: float, count: int, *, slow: slice = slice(0, 0)) -> list[float]:
    """Seconds of steps with a little noise; those in `slow` took three times as long."""
    draw = random.Random(count)
    steps = [seconds * draw.gauss(1, 0.01) for _ in range(count)]
    steps[slow] = [3 * step for step in steps[slow]]
    return steps


def cost_of(steps: list[float], *, score_seconds: float = 0.0) -> Cost:
    summary = summarize_steps({"32": steps}, {"32": len(steps)})
    return Cost(summary.steady_seconds, score_seconds, startup_seconds=1.0)


def test_slow_phase_of_one_run_leaves_the_ratio_as_it_was():
    full = cost_of(noisy(0.010, 4000))
    quiet = cost_of(noisy(0.010, 2000), score_seconds=2.0)
    busy_steps = noisy(0.010, 2000, slow=slice(200, 1000))
    busy = cost_of(busy_steps, score_seconds=2.0)
    assert sum(busy_steps) > 1.7 * 20
    expected = (20 + 2 + 1) / (40 + 1)
    assert cost_ratio(quiet, full) == pytest.approx(expected, rel=0.01)
    assert cost_ratio(busy, full) == pytest.approx(expected, rel=0.03)


def test_only_the_run_with_a_slow_phase_is_disturbed():
    quiet, busy = noisy(0.01, 500), noisy(0.01, 500, slow=slice(100, 200))
    assert not summarize_steps({"32": quiet}, {"32": 500}).is_disturbed
    assert summarize_steps({"32": busy}, {"32": 500}).is_disturbed


def test_larger_images_of_later_epochs_are_no_disturbance():
    samples = {"16": noisy(0.01, 300), "32": noisy(0.04, 200)}
    summary = summarize_steps(samples, {"16": 300, "32": 210})
    assert not summary.is_disturbed
    assert summary.steady_seconds == pytest.approx(3 + 8.4, rel=0.02)
    assert summary.p90 > 1.3 * summary.p50


def test_few_steps_say_nothing_of_a_disturbance():
    summary = summarize_steps({"32": [1.0, 9.0]}, {"32": 3})
    assert not summary.is_disturbed
    assert summary.steady_seconds == pytest.approx(15.0)


def test_step_that_was_not_timed_counts_as_the_others():
    assert summarize_steps({"32": [2.0]}, {"32": 1, "48": 1}).steady_seconds == pytest.approx(4.0)
