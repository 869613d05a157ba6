"""What a run cost and what it reached, as a record and as result.json."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from fastprune.artifacts.atomic import write_text
from fastprune.environment import describe_machine, describe_versions


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run cost and what it reached.

    Seconds are the first process's. Those of a run that was resumed are added up over its
    processes; what a kill undid counts as it was done again, once.

    Attributes:
        name: of the run.
        seed: of the student's weights, the order and the views.
        rows: rows of the subset.
        keep_ratio: share in (0, 1] of the beton's rows: as the subset was asked for, where it
            tells, else as it is.
        metric: what the subset's rows were ranked by; None where nothing tells.
        strategy: the rule that chose them; None where nothing tells.
        images_per_epoch: images of an epoch, on average where epochs skip rows; the last few rows,
            drawn anew, fill no batch.
        epochs: passes over them.
        steps: optimiser steps.
        batch_size: images per step, over all processes.
        processes: how many trained together.
        backend: the loader's engine.
        device: kind of device of the first process.
        startup_seconds: opening files, compiling the decoder, loading the teacher.
        train_seconds: the epochs, without validation, checkpoints and compilation.
        wait_seconds: the part of train_seconds in which the host waited for a batch.
        teacher_seconds: the part in which the device ran the teacher.
        student_seconds: the part for the student's forward and backward pass and the loss.
        optimizer_seconds: the part for the optimiser, clipping and averaging of weights.
        validation_seconds: all validations.
        checkpoint_seconds: writing checkpoints.
        total_seconds: everything that the caller waited for.
        data_wait_share: wait_seconds as a share in [0, 1] of train_seconds.
        top1_last: top-1 accuracy in [0, 1] on the validation set after the last epoch.
        top1_best: the best of all validations; chosen on the validation set, so it flatters.
        top5_last: top-5 accuracy in [0, 1] after the last epoch.
        curve: one dict per validation: epoch, train_seconds so far, top1, val_loss.
        student: file with the student's weights.
    """

    name: str
    seed: int
    rows: int
    keep_ratio: float
    metric: str | None
    strategy: str | None
    images_per_epoch: int
    epochs: int
    steps: int
    batch_size: int
    processes: int
    backend: str
    device: str
    startup_seconds: float
    train_seconds: float
    wait_seconds: float
    teacher_seconds: float
    student_seconds: float
    optimizer_seconds: float
    validation_seconds: float
    checkpoint_seconds: float
    total_seconds: float
    data_wait_share: float
    top1_last: float
    top1_best: float
    top5_last: float
    curve: list[dict[str, float]]
    student: Path

    def save(self, folder: Path) -> None:
        """Write result.json, with the machine and the versions, into the run's folder."""
        fields = asdict(self) | {"student": self.student.name}
        fields |= {"machine": describe_machine(), "versions": describe_versions()}
        write_text(folder / "result.json", json.dumps(fields, indent=2) + "\n")
