"""Signals end a run with a checkpoint."""

import os
import signal
import time

import pytest

from fastprune.base.errors import TrainingStopped
from fastprune.distillation.endings import Signals
from fastprune.distillation.trainer import distill

NETWORKS = "tests.distillation.networks"


@pytest.fixture
def interruptible():
    """Ctrl-C as in a terminal; a shell starts what runs in its background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("name", "exit_code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_signal_stops_the_run_with_a_checkpoint(recipe, monkeypatch, name, exit_code):
    settings = recipe(student={"network": f"{NETWORKS}:signalled"}, schedule={"epochs": 3})
    monkeypatch.setenv("SMALL_SIGNAL", f"{name}:3")
    message = f"{name} stopped the run after step 2. Continue from there with --resume"
    with pytest.raises(TrainingStopped, match=message) as stop:
        distill(settings)
    assert stop.value.exit_code == exit_code
    assert len(list((settings.run.out / "checkpoints").iterdir())) == 1


def test_signal_that_is_repeated_at_once_counts_as_one(interruptible):
    with Signals() as signals:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        assert signals.number == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_second_signal_that_comes_later_acts_as_it_would_have(interruptible, monkeypatch):
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        later = time.monotonic() + 6
        monkeypatch.setattr(time, "monotonic", lambda: later)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signals.number == signal.SIGINT


def test_second_signal_of_another_kind_acts_as_it_would_have(interruptible):
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signals.number == signal.SIGTERM


def test_signal_in_a_validation_stops_the_run_which_goes_on_from_the_end_of_the_epoch(
    recipe, monkeypatch
):
    settings = recipe(student={"network": f"{NETWORKS}:signalled"}, schedule={"epochs": 2})
    monkeypatch.setenv("SMALL_SIGNAL_IN_VALIDATION", "SIGTERM:2")  # number 1 is the rehearsal's
    with pytest.raises(TrainingStopped, match=r"after step 4\. Continue from there"):
        distill(settings)
    monkeypatch.delenv("SMALL_SIGNAL_IN_VALIDATION")
    result = distill(settings, resume=True)
    assert [point["epoch"] for point in result.curve] == [1, 2]
