import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from fastprune.base.errors import (
    ArtifactMismatch,
    ContentNotComparedWarning,
    InvalidValueError,
    RecipeError,
)
from fastprune.beton.convert.writer import convert
from fastprune.demo.pictures import write_demo_images
from fastprune.distillation.evaluation import evaluate_checkpoint
from fastprune.distillation.trainer import distill
from fastprune.networks import build_network, save_weights
from fastprune.rows.subset import Subset
from tests.conftest import require_library
from tests.images import write_image_folder


@pytest.fixture
def teacher_section(teacher):
    return {"network": "resnet8", "checkpoint": teacher}


def test_run_folder_holds_what_the_architecture_promises(recipe, tmp_path, teacher_section, half):
    result = distill(
        recipe(
            data={"subset": half},
            teacher=teacher_section,
            loss={"reshaping": "class_std"},
            schedule={"epochs": 2},
        )
    )
    folder = tmp_path / "run"
    written = json.loads((folder / "result.json").read_text())
    assert written["rows"] == result.rows == 40
    assert written["top1_last"] == result.top1_last
    assert 0 < written["train_seconds"] < written["total_seconds"]
    assert 0 <= written["data_wait_share"] <= 1
    assert written["versions"]["torch"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert [line["epoch"] for line in lines if "top1" in line] == [1, 2]
    assert json.loads((folder / "recipe.json").read_text())["loss"]["reshaping"] == "class_std"
    assert list((folder / "tensorboard").glob("events.*"))
    assert not list(folder.glob("*.tmp"))
    assert not (folder / ".lock").exists()


def test_saved_student_is_the_one_that_was_evaluated(recipe, betons):
    result = distill(recipe())
    evaluation = evaluate_checkpoint(
        result.student, betons / "val.beton", batch_size=20, device="cpu"
    )
    assert evaluation.rows == 30
    assert evaluation.top1 == pytest.approx(result.top1_last)


def test_loss_falls_when_the_student_sees_the_rows_often(recipe, tmp_path):
    distill(recipe(schedule={"epochs": 10, "learning_rate": 0.1}, run={"validate_every": 10}))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines if '"loss"' in line]
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.3


def test_same_seed_gives_the_same_student(recipe, tmp_path, teacher_section):
    first, second, other = (
        distill(recipe(run={"out": tmp_path / name, "seed": seed}, teacher=teacher_section))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    weights = [load_file(result.student) for result in (first, second, other)]
    assert all(np.array_equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not np.array_equal(weights[0]["conv1.weight"], weights[2]["conv1.weight"])


def test_finished_run_is_not_overwritten(recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "result.json").write_text("{}")
    with pytest.raises(RecipeError, match="run holds a finished run"):
        distill(recipe())
    assert (tmp_path / "run" / "result.json").read_text() == "{}"


def test_run_that_is_begun_again_replaces_the_metrics_of_the_first(recipe, tmp_path):
    for seed in (0, 1):
        distill(recipe(run={"seed": seed}))
        (tmp_path / "run" / "result.json").unlink()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if '"loss"' in line] == [1, 2, 3, 4]
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1


def test_reshaping_with_a_bare_subset_names_the_cure(recipe, tmp_path, teacher_section):
    np.save(tmp_path / "bare.npy", np.arange(40))
    settings = recipe(
        data={"subset": tmp_path / "bare.npy"},
        teacher=teacher_section,
        loss={"reshaping": "class_std"},
    )
    with (
        pytest.warns(ContentNotComparedWarning),
        pytest.raises(RecipeError, match=r"bare\.npy carries no class std"),
    ):
        distill(settings)


def test_reshaping_with_the_class_std_of_other_classes_is_refused(
    recipe, tmp_path, teacher_section, half
):
    whole = Subset.load(half)
    wrong = Subset(whole.rows, whole.fingerprint, class_std=np.ones(7))
    wrong.save(tmp_path / "wrong.npy")
    settings = recipe(
        data={"subset": tmp_path / "wrong.npy"},
        teacher=teacher_section,
        loss={"reshaping": "class_std"},
    )
    with pytest.raises(ArtifactMismatch, match=r"class std of 7 classes, but .* has 10"):
        distill(settings)


def test_betons_with_different_classes_are_refused(recipe, tmp_path):
    write_image_folder(tmp_path / "images", classes=10, per_class=1)
    convert(tmp_path / "images", tmp_path / "other.beton", workers=1)
    with pytest.raises(
        ArtifactMismatch, match=r"class 0 is 'circle' and 'class_00'.*--classes-from"
    ):
        distill(recipe(data={"val": tmp_path / "other.beton"}))


def test_batch_larger_than_the_subset_is_refused(recipe, half):
    with pytest.raises(InvalidValueError, match=r"40 kept rows of .* fill no batch of 50"):
        distill(recipe(data={"subset": half, "batch_size": 50}))


def test_artifacts_of_a_run_are_as_readable_as_other_files(recipe, tmp_path):
    result = distill(recipe())
    (tmp_path / "other").touch()
    assert result.student.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_logged_learning_rate_is_that_of_the_last_step(recipe, tmp_path):
    distill(recipe(schedule={"policy": "step", "milestones": (1,), "epochs": 2}))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rates = [json.loads(line)["learning_rate"] for line in lines if '"loss"' in line]
    assert rates == pytest.approx([0.05] * 4 + [0.005] * 4)


def test_beton_with_more_classes_than_the_checkpoint_is_refused(recipe, tmp_path):
    result = distill(recipe())
    write_image_folder(tmp_path / "images", classes=11, per_class=1)
    convert(tmp_path / "images", tmp_path / "more.beton", workers=1)
    with pytest.raises(ArtifactMismatch, match=r"knows 10 classes, but .*more\.beton has 11"):
        evaluate_checkpoint(result.student, tmp_path / "more.beton", device="cpu")


def test_beton_that_lacks_a_class_in_the_middle_is_not_evaluated(recipe, tmp_path):
    result = distill(recipe())
    write_demo_images(tmp_path / "images", train_per_class=1, val_per_class=1, seed=0)
    shutil.rmtree(tmp_path / "images" / "val" / "egg")
    convert(tmp_path / "images" / "val", tmp_path / "lacking.beton", workers=1)
    with pytest.raises(ArtifactMismatch, match=r"lacking\.beton have other names or another order"):
        evaluate_checkpoint(result.student, tmp_path / "lacking.beton", device="cpu")


def test_beton_that_lacks_the_last_class_is_evaluated(recipe, tmp_path):
    result = distill(recipe())
    write_demo_images(tmp_path / "images", train_per_class=1, val_per_class=1, seed=0)
    shutil.rmtree(tmp_path / "images" / "val" / "triangle")
    convert(tmp_path / "images" / "val", tmp_path / "lacking.beton", workers=1)
    assert evaluate_checkpoint(result.student, tmp_path / "lacking.beton", device="cpu").rows == 9


def test_result_tells_the_subset_and_where_the_time_went(recipe, teacher_section, half):
    result = distill(recipe(data={"subset": half}, teacher=teacher_section))
    assert (result.rows, result.keep_ratio, result.metric, result.strategy) == (40, 0.5, None, None)
    assert (result.steps, result.epochs, result.batch_size, result.processes) == (2, 1, 20, 1)
    parts = ("wait", "teacher", "student", "optimizer")
    seconds = [getattr(result, f"{name}_seconds") for name in parts]
    assert min(seconds) > 0
    assert sum(seconds) <= result.train_seconds
    assert result.data_wait_share == pytest.approx(result.wait_seconds / result.train_seconds)
    phases = ("startup", "train", "validation", "checkpoint")
    apart = sum(getattr(result, f"{name}_seconds") for name in phases)
    assert apart <= result.total_seconds


def test_result_has_the_seconds_of_steps_and_the_memory(recipe, teacher_section):
    result = distill(recipe(teacher=teacher_section, schedule={"epochs": 3}))
    quantiles = result.step_seconds_p10, result.step_seconds_p50, result.step_seconds_p90
    assert 0 < quantiles[0] <= quantiles[1] <= quantiles[2]
    assert result.steady_train_seconds == pytest.approx(12 * quantiles[1])
    assert not result.disturbed  # of 12 steps nobody can tell
    assert result.peak_device_bytes is None
    assert result.peak_host_bytes > 50_000_000


def test_result_knows_what_scoring_its_rows_took(recipe, teacher_section, half, tmp_path):
    paid = replace(Subset.load(half), strategy="medium", metric="loss", score_seconds=7.5)
    paid.save(tmp_path / "medium.npy")
    replace(paid, strategy="random").save(tmp_path / "random.npy")
    seconds = [
        distill(
            recipe(
                data={"subset": tmp_path / subset},
                teacher=teacher_section,
                loss={"reshaping": reshaping},
                run={"out": tmp_path / f"{subset}-{reshaping}"},
            )
        ).score_seconds
        for subset, reshaping in (
            ("medium.npy", "none"),
            ("random.npy", "none"),
            ("random.npy", "class_std"),
        )
    ]
    assert seconds == [7.5, 0.0, 7.5]


def test_fixed_iterations_take_as_many_steps_on_half_the_rows(recipe, half):
    schedule = {"epochs": 2, "fixed_iterations": True}
    result = distill(recipe(data={"subset": half}, schedule=schedule))
    assert (result.epochs, result.steps) == (4, 8)


def test_average_of_the_weights_is_what_is_evaluated_and_saved(recipe, betons, tmp_path):
    averaged = distill(recipe(schedule={"ema_decay": 0.9}))
    plain = distill(recipe(run={"out": tmp_path / "plain"}))
    evaluation = evaluate_checkpoint(averaged.student, betons / "val.beton", device="cpu")
    assert evaluation.loss == pytest.approx(averaged.curve[-1]["val_loss"], rel=1e-5)
    name = "layer1.0.bn1.running_mean"
    assert not np.array_equal(load_file(averaged.student)[name], load_file(plain.student)[name])


def test_clipping_bounds_what_a_step_can_do(recipe, tmp_path):
    settings = {"policy": "step", "learning_rate": 1.0, "momentum": 0, "weight_decay": 0}
    before = distill(recipe(schedule=settings | {"clip_norm": 1e-30}))
    after = distill(recipe(schedule=settings, run={"out": tmp_path / "free"}))
    first, second = load_file(before.student), load_file(after.student)
    torch.manual_seed(0)
    untrained = build_network("resnet8", num_classes=10).state_dict()["conv1.weight"].numpy()
    assert np.allclose(first["conv1.weight"], untrained, atol=1e-7)
    assert not np.allclose(second["conv1.weight"], untrained, atol=1e-3)


def test_evaluation_normalises_as_the_student_was_trained(recipe, betons):
    result = distill(recipe(data={"mean": [0.1, 0.2, 0.3], "std": [1, 2, 3]}))
    evaluation = evaluate_checkpoint(result.student, betons / "val.beton", device="cpu")
    assert evaluation.loss == pytest.approx(result.curve[-1]["val_loss"], rel=1e-5)


def test_evaluation_computes_as_the_validation_of_the_training_did(recipe, betons):
    result = distill(recipe(run={"precision": "bf16"}))
    beton = betons / "val.beton"
    again = evaluate_checkpoint(result.student, beton, batch_size=20, device="cpu")
    assert again.loss == result.curve[-1]["val_loss"]
    exact = evaluate_checkpoint(
        result.student, beton, batch_size=20, device="cpu", precision="fp32"
    )
    assert exact.loss != again.loss


def test_bf16_is_used_on_the_cpu_where_it_is_asked_for(recipe, tmp_path):
    plain = distill(recipe())
    rounded = distill(recipe(run={"out": tmp_path / "bf16", "precision": "bf16"}))
    first, second = (load_file(result.student)["conv1.weight"] for result in (plain, rounded))
    assert second.dtype == np.float32
    assert not np.array_equal(first, second)
    assert np.allclose(first, second, atol=0.05)


def test_dali_trains_on_the_cpu_where_it_is_asked_for(recipe):
    require_library("dali")
    result = distill(recipe(data={"backend": "dali"}))
    assert (result.backend, result.device, result.steps) == ("dali", "cpu", 4)


@pytest.mark.full
def test_compiled_networks_learn_what_the_others_do(recipe, tmp_path, teacher_section):
    plain = distill(recipe(teacher=teacher_section))
    compiled = distill(
        recipe(teacher=teacher_section, run={"out": tmp_path / "compiled", "compile": True})
    )
    first, second = (load_file(result.student) for result in (plain, compiled))
    assert first.keys() == second.keys()
    assert np.allclose(first["conv1.weight"], second["conv1.weight"], atol=1e-3)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"num_classes": "12"}, "different classes: 12 and 10 classes. Take a teacher"),
        ({"class_names": json.dumps(["a"] * 10)}, "class 0 is 'a' and 'circle'"),
        ({"std": "[1, 1, 1]"}, r"trained with data.std = \[1, 1, 1\], .* to the teacher's"),
    ],
)
def test_teacher_of_other_classes_or_values_is_refused(recipe, tmp_path, metadata, message):
    path = tmp_path / "other.safetensors"
    save_weights(build_network("resnet8", num_classes=10), path, metadata=metadata)
    with pytest.raises(ArtifactMismatch, match=message):
        distill(recipe(teacher={"network": "resnet8", "checkpoint": path}))
    assert not (tmp_path / "run").exists()
