"""What ends a run from inside, and what does not."""

import json
import logging
import re
import resource

import pytest
import torch
from safetensors.torch import load_file

from fastprune.base.errors import ArtifactError, InvalidValueError, TrainingError, TrainingStopped
from fastprune.base.ranks import Ranks
from fastprune.distillation.checkpoint import save_student
from fastprune.distillation.context import Batch, Context
from fastprune.distillation.endings import bad_loss_error, naming_memory
from fastprune.distillation.meters import LossMeter, PhaseTimer, StepLosses
from fastprune.distillation.trainer import distill
from fastprune.networks import load_weights

NETWORKS = "tests.distillation.networks"
CPU = torch.device("cpu")


def in_folder(recipe, folder) -> Context:
    """The context of a run in this folder."""
    return Context(recipe(run={"out": folder}), Ranks(), CPU, PhaseTimer(CPU, began=0.0))


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


def bad_step(losses, rows):
    return StepLosses(6, 2, 1, torch.tensor(losses), torch.tensor(rows))


def test_first_bad_step_is_found_when_the_losses_come_to_the_host():
    meter = LossMeter(Ranks())
    for step, second in ((5, 0.1), (6, float("nan")), (7, float("inf"))):
        losses = torch.tensor([0.2, second])
        meter.add(StepLosses(step, 2, step - 5, losses, torch.tensor([7, 1234])))
    bad = meter.fetch()
    assert (bad.step, bad.epoch, bad.batch) == (6, 2, 1)
    assert meter.means == []


def test_one_bad_row_is_named_and_its_batch_saved(recipe, tmp_path):
    bad = bad_step([0.2, torch.nan], [7, 1234])
    batch = Batch(torch.zeros(2, 3, 4, 4), torch.zeros(2), bad.rows)
    error = bad_loss_error(in_folder(recipe, tmp_path), bad, batch)
    assert re.search(r"nan at step 6 \(epoch 3\), in rows 1,234; .* Lower sched", str(error))
    assert load_file(tmp_path / "bad-batch-step-6.safetensors")["losses"][0] == pytest.approx(0.2)


def test_batch_that_cannot_be_saved_does_not_hide_the_bad_loss(recipe, tmp_path):
    batch = Batch(*(torch.zeros(1) for _ in range(3)))
    error = bad_loss_error(in_folder(recipe, tmp_path / "gone"), bad_step([torch.inf], [3]), batch)
    assert "in rows 3; look at the batch: not saved" in str(error)


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
        with pytest.raises(TrainingStopped, match=r"step 10\. Continue from the last checkpoint"):
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


def test_a_disk_without_room_for_the_student_leaves_it_to_the_last_checkpoint(tmp_path):
    network, path = torch.nn.Linear(100, 100), tmp_path / "student.safetensors"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(ArtifactError, match=r"student\.safetensors: .*with --resume the last"):
            save_student(network, path, metadata={}, has_checkpoint=True)
    finally:
        # Within the test: what pytest prints after it may go to a file, too.
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not path.exists()


def test_a_student_without_checkpoint_or_room_is_put_where_there_is_some(tmp_path, monkeypatch):
    network = torch.nn.Linear(10, 10)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    gone = tmp_path / "gone" / "student.safetensors"
    with pytest.raises(ArtifactError, match=r"No checkpoint .* put into (\S+)\. Move it") as caught:
        save_student(network, gone, metadata={}, has_checkpoint=False)
    (kept,) = tmp_path.glob("fastprune-*/student.safetensors")
    assert str(kept) in str(caught.value)
    copy = torch.nn.Linear(10, 10)
    load_weights(copy, kept)
    assert torch.equal(copy.weight, network.weight)


def test_network_without_an_output_for_each_class_is_refused_before_the_first_step(recipe):
    wrong = recipe(student={"network": f"{NETWORKS}:wrong_shape"})
    with pytest.raises(InvalidValueError, match=r"student returned \(20, 10, 30, 30\).*\(20, 10\)"):
        distill(wrong)
