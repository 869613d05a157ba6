"""What a run cost and what it reached, as a record and as result.json."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from fastprune.artifacts.atomic import write_text
from fastprune.environment import describe_machine, describe_versions


@dataclass(frozen=True)
class Result:
    """What a run cost and what it reached.

    Attributes:
        name: of the run.
        seed: of the student's weights, the order and the views.
        rows: rows of the subset.
        images_per_epoch: images of an epoch; the last few rows, drawn anew, fill no batch.
        epochs: passes over them.
        startup_seconds: opening files, compiling the decoder, loading the teacher.
        train_seconds: the epochs, without validation and without compilation.
        validation_seconds: all validations.
        total_seconds: everything that the caller waited for.
        data_wait_share: share in [0, 1] of train_seconds spent waiting for a batch.
        top1_last: top-1 accuracy in [0, 1] on the validation set after the last epoch.
        top1_best: the best of all validations; chosen on the validation set, so it flatters.
        top5_last: top-5 accuracy in [0, 1] after the last epoch.
        curve: one dict per validation: epoch, train_seconds so far, top1, val_loss.
        student: file with the student's weights.
    """

    name: str
    seed: int
    rows: int
    images_per_epoch: int
    epochs: int
    startup_seconds: float
    train_seconds: float
    validation_seconds: float
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
