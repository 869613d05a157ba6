"""Costs of runs on machines that do something else as well."""

import random

import pytest

from fastprune.distillation.costs import Steps, steady_seconds, summarize_steps


def noisy(seconds: float, count: int, *, slow: slice = slice(0, 0)) -> list[float]:
    """Seconds of steps with a little noise; those in `slow` took three times as long."""
    draw = random.Random(count)
    steps = [seconds * draw.gauss(1, 0.01) for _ in range(count)]
    steps[slow] = [3 * step for step in steps[slow]]
    return steps


def test_slow_phase_leaves_the_seconds_at_the_median_as_they_were():
    quiet = noisy(0.010, 2000)
    busy = noisy(0.010, 2000, slow=slice(200, 1000))
    assert sum(busy) > 1.7 * sum(quiet)
    for steps in (quiet, busy):
        summary = summarize_steps({"32": steps}, {"32": len(steps)})
        assert summary.steady_seconds == pytest.approx(20, rel=0.03)


def test_equal_kinds_of_steps_share_the_pace_of_most_of_them():
    full, busy = {"32": Steps(100, 0.1)}, {"32": Steps(50, 0.3)}
    cached = {"32": Steps(20, 0.09), "32, cached": Steps(80, 0.05)}
    assert steady_seconds([full, busy, cached]) == pytest.approx([10, 5, 2 + 4])


def test_pace_of_two_equal_halves_lies_between_them():
    halves = [{"32": Steps(50, 0.1)}, {"32": Steps(50, 0.3)}]
    assert steady_seconds(halves) == pytest.approx([10, 10])


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


def test_few_steps_do_not_show_a_disturbance():
    summary = summarize_steps({"32": [1.0, 9.0]}, {"32": 3})
    assert not summary.is_disturbed
    assert summary.steady_seconds == pytest.approx(15.0)


def test_step_that_was_not_timed_counts_as_the_others():
    assert summarize_steps({"32": [2.0]}, {"32": 1, "48": 1}).steady_seconds == pytest.approx(4.0)
