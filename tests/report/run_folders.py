"""Run folders as the trainer writes them, without training."""

import json
from dataclasses import replace
from pathlib import Path

from fastprune.distillation.result import Result
from fastprune.distillation.runlog import RunLog
from fastprune.settings import make_recipe

RESULT = Result(
    name="full",
    seed=0,
    rows=100,
    keep_ratio=1.0,
    metric=None,
    strategy=None,
    images_per_epoch=96,
    epochs=2,
    steps=6,
    batch_size=32,
    processes=1,
    backend="cpu",
    device="cpu",
    score_seconds=None,
    startup_seconds=2.0,
    train_seconds=10.0,
    wait_seconds=0.1,
    teacher_seconds=3.0,
    student_seconds=6.0,
    optimizer_seconds=0.5,
    validation_seconds=1.0,
    checkpoint_seconds=0.25,
    total_seconds=14.0,
    step_seconds_p10=1.5,
    step_seconds_p50=1.6,
    step_seconds_p90=1.8,
    steps_by_kind={},
    steady_train_seconds=9.6,
    disturbed=False,
    peak_device_bytes=None,
    peak_host_bytes=10**9,
    data_wait_share=0.01,
    teacher_forwards=192,
    teacher_forwards_saved=0,
    cache_bytes=0,
    cache_fill_seconds=0.0,
    top1_last=0.5,
    top1_best=0.6,
    top5_last=0.9,
    curve=[
        {"epoch": 1, "train_seconds": 5.0, "top1": 0.6, "val_loss": 1.0},
        {"epoch": 2, "train_seconds": 10.0, "top1": 0.5, "val_loss": 1.1},
    ],
    student=Path("student.safetensors"),
)


def write_run(
    folder, *, subset=None, loss=None, pruning=None, named=True, finished=True, **changes
):
    """Write recipe.json, and result.json or the metrics of an unfinished run; give the folder."""
    folder.mkdir(parents=True)
    # A quiet machine: the steps at their median are what the clock says.
    steady = {"steady_train_seconds": changes.get("train_seconds", RESULT.train_seconds)}
    result = replace(RESULT, **(steady | changes))
    recipe = make_recipe(
        {
            "data": {"train": "train.beton", "val": "val.beton", "subset": subset},
            "student": {"network": "resnet8"},
            "teacher": {"network": "resnet20", "checkpoint": "teacher.safetensors"},
            "loss": loss or {},
            "pruning": pruning,
            "schedule": {"epochs": result.epochs},
            "run": {"out": folder, "name": result.name if named else None, "seed": result.seed},
        }
    )
    (folder / "recipe.json").write_text(recipe.model_dump_json())
    if finished:
        result.save(folder)
    else:
        with RunLog(folder) as log:
            log.write(step=1, epoch=0, loss=2.5)
            log.write(step=3, epoch=1, top1=0.25, val_loss=2.0)
    return folder


def change_result(folder, **fields):
    """Replace fields of a result.json; None takes one away."""
    path = folder / "result.json"
    told = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: v for name, v in told.items() if v is not None}))
