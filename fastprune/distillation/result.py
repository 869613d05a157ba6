"""Cost and accuracy of a run, as a record and as result.json."""

import json
import resource
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastprune.base.environment import describe_machine, describe_versions
from fastprune.base.files import write_text
from fastprune.distillation.context import Context
from fastprune.distillation.costs import Steps
from fastprune.distillation.evaluation import Evaluation
from fastprune.distillation.teacher import Teacher
from fastprune.loading.loader import Loader
from fastprune.rows.subset import Subset
from fastprune.settings import Recipe


@dataclass(frozen=True, kw_only=True)
class Result:
    """Cost and accuracy of a run.

    Seconds are the first process's, added up over the parts of a resumed run; steps that a kill
    undid count once.

    Attributes:
        name: of the run.
        seed: of the student's weights, the order and the views.
        rows: rows of the subset.
        keep_ratio: share in (0, 1] of the beton's rows: as asked for, where the subset records it.
        metric: difficulty that the subset's rows were ranked by; None where it is not recorded.
        strategy: rule that chose them; None where it is not recorded.
        images_per_epoch: images in the full batches of an epoch; a mean, where epochs skip rows.
        epochs: passes over them.
        steps: optimizer steps.
        batch_size: images per step, over all processes.
        processes: how many trained together.
        backend: the loader's engine.
        device: kind of device of the first process.
        score_seconds: of the scoring pass that chose the rows or measured the class std; 0 where
            neither is used, None where the subset does not record it.
        startup_seconds: opening files, compiling the decoder, loading the teacher.
        train_seconds: the epochs, without validation, checkpoints and compilation.
        wait_seconds: the part of train_seconds in which the host waited for a batch.
        teacher_seconds: the part for the teacher.
        student_seconds: the part for the student's forward and backward pass and the loss.
        optimizer_seconds: the part for the optimizer, clipping and averaging of weights.
        validation_seconds: all validations.
        checkpoint_seconds: writing checkpoints.
        total_seconds: everything that the caller waited for.
        step_seconds_p10: a tenth of the steps took less, waiting included.
        step_seconds_p50: their median.
        step_seconds_p90: a tenth of the steps took more.
        steps_by_kind: kind (images of one size, with the teacher asked or not) -> its steps, and
            their median seconds.
        steady_train_seconds: the steps, each with the median of its kind: train_seconds on an
            otherwise idle machine.
        disturbed: whether, among steps of one kind, the ninth decile is more than 1.3 times the
            median: something else ran on the machine.
        peak_device_bytes: most memory that torch reserved on the CUDA device; None on the CPU.
        peak_host_bytes: most memory of the process since it started.
        data_wait_share: wait_seconds as a share in [0, 1] of train_seconds.
        teacher_forwards: images that went through the teacher, on all processes, without warm-up.
        teacher_forwards_saved: images whose logits a teacher cache had.
        cache_bytes: size of the teacher cache on disk at the end; 0 without one.
        cache_fill_seconds: that the first process spent on writing it, beside the training.
        top1_last: accuracy in [0, 1] on the validation set after the last epoch; None without
            labels, like the next two.
        top1_best: best of all validations; chosen on the validation set, so it flatters.
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
    score_seconds: float | None
    startup_seconds: float
    train_seconds: float
    wait_seconds: float
    teacher_seconds: float
    student_seconds: float
    optimizer_seconds: float
    validation_seconds: float
    checkpoint_seconds: float
    total_seconds: float
    step_seconds_p10: float
    step_seconds_p50: float
    step_seconds_p90: float
    steps_by_kind: dict[str, Steps]
    steady_train_seconds: float
    disturbed: bool
    peak_device_bytes: int | None
    peak_host_bytes: int
    data_wait_share: float
    teacher_forwards: int
    teacher_forwards_saved: int
    cache_bytes: int
    cache_fill_seconds: float
    top1_last: float | None
    top1_best: float | None
    top5_last: float | None
    curve: list[dict[str, float]]
    student: Path

    def save(self, folder: Path) -> None:
        """Write result.json, with the machine and the versions, into the run's folder."""
        fields = asdict(self) | {"student": self.student.name}
        fields |= {"machine": describe_machine(), "versions": describe_versions()}
        write_text(folder / "result.json", json.dumps(fields, indent=2) + "\n")


def make_result(
    context: Context,
    loader: Loader,
    teacher: Teacher,
    *,
    rows: int,
    epochs: int,
    steps: int,
    evaluations: Sequence[Evaluation],
    curve: list[dict[str, float]],
    student: Path,
) -> Result:
    """Collect the cost and accuracy of a run; a collective.

    The phases of the context's timer are over, and the teacher has counted its images; the other
    arguments are as in `Result`.
    """
    recipe, timer = context.recipe, context.timer
    subset = Subset.load(recipe.data.subset) if recipe.data.subset else None
    # 0.5 and not 0.4995: reports name runs by what was asked for.
    asked = subset.keep_ratio if subset else None
    images_per_step = loader.batch_size * context.ranks.world
    step_seconds, counts = timer.steps.summary(), teacher.state_dict()
    seconds: dict[str, Any] = {
        # "closing" is in the total alone.
        f"{name}_seconds": value
        for name, value in (timer.seconds | {"total": timer.total}).items()
        if name != "closing"
    }
    return Result(
        name=recipe.run.name or recipe.run.out.resolve().name,
        seed=recipe.run.seed,
        rows=rows,
        keep_ratio=asked or rows / loader.beton.num_rows,
        metric=subset.metric if subset else None,
        strategy=subset.strategy if subset else None,
        images_per_epoch=steps * images_per_step // epochs,
        epochs=epochs,
        steps=steps,
        batch_size=images_per_step,
        processes=context.ranks.world,
        backend=loader.backend,
        device=loader.device.type,
        score_seconds=_score_seconds(recipe, subset),
        **seconds,
        step_seconds_p10=step_seconds.p10,
        step_seconds_p50=step_seconds.p50,
        step_seconds_p90=step_seconds.p90,
        steps_by_kind=step_seconds.kinds,
        steady_train_seconds=step_seconds.steady_seconds,
        disturbed=step_seconds.is_disturbed,
        peak_device_bytes=(
            torch.cuda.max_memory_reserved(loader.device) if loader.device.type == "cuda" else None
        ),
        # Linux counts in KiB.
        peak_host_bytes=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        data_wait_share=timer.seconds["wait"] / timer.seconds["train"],
        teacher_forwards=counts["num_forwards"],
        teacher_forwards_saved=counts["num_saved"],
        cache_bytes=teacher.cache_bytes,
        cache_fill_seconds=counts["fill_seconds"],
        top1_last=evaluations[-1].top1 if evaluations else None,
        top1_best=max((evaluation.top1 for evaluation in evaluations), default=None),
        top5_last=evaluations[-1].top5 if evaluations else None,
        curve=curve,
        student=student,
    )


def _score_seconds(recipe: Recipe, subset: Subset | None) -> float | None:
    """Charge a run for scoring only where it uses difficulties or class std."""
    is_random = subset is not None and subset.strategy == "random"
    if subset is None or (is_random and recipe.loss.reshaping != "class_std"):
        return 0.0
    return subset.score_seconds
