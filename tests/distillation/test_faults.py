"""What ends a run, and what does not."""

import json
import logging
import os
import re
import resource
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from fastprune.distillation.faults import Signals, naming_memory
from fastprune.distillation.interval import Interval
from fastprune.distillation.trainer import distill
from fastprune.distributed import Ranks
from fastprune.errors import InvalidValueError, TrainingError, TrainingStopped

NETWORKS = "tests.distillation.networks"


@pytest.fixture
def interruptible():
    """Ctrl-C as in a terminal; a shell starts what runs in its background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_loss_that_is_no_number_stops_the_run_with_step_rows_and_the_batch(recipe, tmp_path):
    with pytest.raises(TrainingError) as error:
        distill(recipe(schedule={"learning_rate": 1e30, "epochs": 2}, run={"log_every": 3}))
    message = str(error.value)
    found = re.fullmatch(
        r"the loss became (?:nan|inf) at step 2 \(epoch 1\), in rows ([\d, ]+) and 12 more; look "
        r"at the batch: (.*)\. Lower schedule\.learning_rate \(1e\+30\) or set .*",
        message,
    )
    assert found, message
    batch = load_file(found[2])
    assert {name: len(tensor) for name, tensor in batch.items()} == dict.fromkeys(
        ("images", "labels", "rows", "losses"), 20
    )
    assert {int(row) for row in found[1].split(", ")} < set(batch["rows"].tolist())
    assert not (tmp_path / "run" / "result.json").exists()


def test_one_bad_row_of_an_interval_is_named_and_its_batch_made_again(tmp_path):
    asked = []

    def batch_again(epoch, batch):
        asked.append((epoch, batch))
        return torch.zeros(2, 3, 4, 4), torch.zeros(2), torch.tensor([7, 1234])

    interval = Interval(folder=tmp_path, ranks=Ranks(), batch_again=batch_again, cure="Sleep.")
    for step, second in ((5, 0.1), (6, float("nan")), (7, 0.1)):
        interval.add(
            step=step,
            epoch=2,
            batch=step - 5,
            losses=torch.tensor([0.2, second]),
            rows=torch.tensor([7, 1234]),
        )
    with pytest.raises(TrainingError, match=r"nan at step 6 \(epoch 3\), in rows 1,234; .* Sleep"):
        interval.fetch()
    assert asked == [(2, 1)]
    assert load_file(tmp_path / "bad-batch-step-6.safetensors")["losses"][0] == pytest.approx(0.2)


def test_batch_that_cannot_be_saved_does_not_hide_the_bad_loss(tmp_path):
    def batch_again(epoch, batch):
        return tuple(torch.zeros(1) for _ in range(3))

    interval = Interval(folder=tmp_path / "gone", ranks=Ranks(), batch_again=batch_again, cure="")
    interval.add(step=1, epoch=0, batch=0, losses=torch.tensor([torch.inf]), rows=torch.tensor([3]))
    with pytest.raises(TrainingError, match="in rows 3; look at the batch: not saved"):
        interval.fetch()


def test_memory_that_is_used_up_names_the_batch_size_to_try(recipe):
    greedy = recipe(student={"network": f"{NETWORKS}:greedy"})
    with pytest.raises(TrainingError, match=r"batch_size = 20 at 32 pixels .*batch_size = 10"):
        distill(greedy)


def test_last_image_of_a_batch_cannot_be_left_out():
    with (
        pytest.raises(TrainingError, match="Use a smaller network"),
        naming_memory(batch_size=1, image_size=32, device=torch.device("cpu")),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory.")


def test_other_errors_are_not_taken_for_memory():
    with (
        pytest.raises(RuntimeError, match="something else"),
        naming_memory(batch_size=1, image_size=32, device=torch.device("cpu")),
    ):
        raise RuntimeError("something else")


@pytest.mark.parametrize(("name", "exit_code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_signal_stops_the_run_with_a_checkpoint(recipe, monkeypatch, name, exit_code):
    settings = recipe(student={"network": f"{NETWORKS}:signalled"}, schedule={"epochs": 3})
    monkeypatch.setenv("SMALL_SIGNAL", f"{name}:3")
    message = f"{name} stopped the run after step 2. Go on from there with --resume"
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
    with pytest.raises(TrainingStopped, match=r"after step 4\. Go on from there"):
        distill(settings)
    monkeypatch.delenv("SMALL_SIGNAL_IN_VALIDATION")
    result = distill(settings, resume=True)
    assert [point["epoch"] for point in result.curve] == [1, 2]


def test_weights_that_the_last_step_ruined_are_no_result(recipe, tmp_path):
    ruined = recipe(
        data={"batch_size": 80},
        schedule={"learning_rate": 1e38, "policy": "step"},
    )
    with pytest.raises(
        TrainingError, match=r"became (nan|inf) in the validation after step 1\. Lower .*1e\+38"
    ):
        distill(ruined)
    assert not (tmp_path / "run" / "result.json").exists()
    assert not (tmp_path / "run" / "student.safetensors").exists()


def test_full_disk_costs_the_checkpoint_and_not_the_run(recipe, monkeypatch, caplog):
    settings = recipe(student={"network": f"{NETWORKS}:signalled"}, schedule={"epochs": 3})
    monkeypatch.setenv("SMALL_SIGNAL", "SIGTERM:3")
    with pytest.raises(TrainingStopped):
        distill(settings)
    (old,) = (settings.run.out / "checkpoints").iterdir()
    monkeypatch.setenv("SMALL_SIGNAL", "SIGTERM:9")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (old.stat().st_size // 2, before[1]))
    try:
        with pytest.raises(TrainingStopped, match=r"step 10\. Go on from the last checkpoint"):
            distill(settings, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert all(text.startswith("NO CHECKPOINT at step") and str(old) in text for text in warnings)
    assert len(warnings) == 3
    assert list((settings.run.out / "checkpoints").iterdir()) == [old]
    monkeypatch.delenv("SMALL_SIGNAL")
    assert distill(settings, resume=True).steps == 12
    assert json.loads((settings.run.out / "result.json").read_text())["steps"] == 12


def test_network_without_an_output_for_each_class_is_refused_before_the_first_step(recipe):
    wrong = recipe(student={"network": f"{NETWORKS}:wrong_shape"})
    with pytest.raises(InvalidValueError, match=r"student returned \(20, 10, 30, 30\).*\(20, 10\)"):
        distill(wrong)
