"""The stations in order: convert, teacher, score, select, four kinds of students, report."""

import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastprune.base.environment import describe_machine, describe_versions
from fastprune.base.errors import InvalidValueError
from fastprune.base.files import lock, write_text
from fastprune.beton.convert.writer import convert
from fastprune.beton.opening import open_beton
from fastprune.demo.images import prepare_images
from fastprune.demo.pictures import WRONG_LABEL_SHARE
from fastprune.difficulty.score import score
from fastprune.distillation.trainer import distill
from fastprune.networks import build_network
from fastprune.report.comparison import Comparison
from fastprune.report.runs import Run
from fastprune.report.scores import report_scores
from fastprune.report.training import report_runs, summarize_runs
from fastprune.selection.subsets import make_subset
from fastprune.settings import DemoSettings, Recipe, make_recipe, takes_settings

logger = logging.getLogger(__name__)

_METRIC = "loss"
# Random is the baseline that every claim is held against.
_STRATEGIES = ("medium", "random")


@dataclass(frozen=True)
class _Kind:
    """A kind of student: its rows (None for all), and what is done with the teacher's logits."""

    strategy: str | None = None
    is_cached: bool = False
    is_reshaped: bool = False


_KINDS = {
    "full": _Kind(),
    "full+cache": _Kind(is_cached=True),
    "medium+reshape": _Kind("medium", is_reshaped=True),
    "random": _Kind("random"),
}
# With a cache, views come again after a third of the epochs: the teacher is asked for no others.
_EPOCHS_PER_VIEW = 3
# Small, so that a few thousand images still give hundreds of steps.
_BATCH_SIZE = 32

# A folder is cleared only if it holds this file, which a demo wrote, and only of these names.
_MARK = ".fastprune-demo"
_BETON_SUFFIXES = (
    "",
    ".manifest.parquet",
    ".partial",
    ".partial.journal",
    ".partial.manifest.parquet",
)
_WRITTEN = (
    "images",
    *(f"{name}.beton{suffix}" for name in ("train", "val") for suffix in _BETON_SUFFIXES),
    "teacher",
    "scores.parquet",
    "scores.parquet.partial",  # a resumed pass would look too cheap
    "medium.npy",
    "medium.json",
    "random.npy",
    "random.json",
    "runs",
    "caches",
    "report.html",
    *(f"report-{name}.png" for name in ("cost", "accuracy", "seconds")),
    "scores.html",
    "scores-hardest.csv",
    "scores-suspected.csv",
    "result.json",
)
# Keeps the demo within minutes on two cores.
_LARGEST_VIEW = 32


@takes_settings(DemoSettings)
def run_demo(*, settings: DemoSettings) -> str:
    """Walk the whole way and write it all into a folder.

    Args:
        settings: the fields of `DemoSettings`, as keywords.

    Returns:
        A table of plain text: accuracy and cost of each kind of student, as in report.html and
        result.json.

    Raises:
        FastpruneError: the images, the settings or the disk do not allow it; the text has the
            cure.
    """
    _check(settings)
    seconds: dict[str, float] = {}
    with _cleared_folder(settings.out) as out:
        train, val = out / "train.beton", out / "val.beton"
        with _timed("convert", seconds):
            folders = prepare_images(settings.images, out / "images", per_class=settings.per_class)
            convert(folders[0], train)
            convert(folders[1], val)
        _require_enough(train, settings.keep)
        beton = open_beton(train)
        sides = np.minimum(beton.widths, beton.heights)
        image_size = settings.image_size or int(min(np.median(sides), _LARGEST_VIEW))
        with _timed("teacher", seconds):
            checkpoint = settings.teacher_checkpoint or _train_teacher(settings, image_size)
        with _timed("score", seconds):
            table = score(
                train,
                settings.teacher,
                out / "scores.parquet",
                checkpoint=checkpoint,
                image_size=image_size,
                # Scores and class std are of the kind of views that the students are taught with.
                views=1,
            )
        with _timed("select", seconds):
            for name in _STRATEGIES:
                make_subset(table, keep_ratio=settings.keep, strategy=name, metric=_METRIC).save(
                    out / f"{name}.npy"
                )
        _distill_students(settings, image_size, checkpoint, seconds)
        report_scores(
            out / "scores.parquet",
            out / "scores.html",
            subset_path=out / "medium.npy",
            beton_path=train,
        )
        comparison = report_runs([out / "runs"], out / "report.html", reference="full")
        wrong_share = WRONG_LABEL_SHARE if settings.images is None else 0.0
        fields = {
            "runs": _run_fields(comparison),
            "keep_ratio": settings.keep,
            "step_seconds": seconds,
            "wrong_label_share": wrong_share,
            "machine": describe_machine(),
            "versions": describe_versions(),
        }
        # Last: a folder with result.json has everything else.
        write_text(out / "result.json", json.dumps(fields, indent=2) + "\n")
    summary = summarize_runs(comparison)
    if not wrong_share:
        return summary
    return f"{summary}\n{wrong_share:.0%} of the training pictures carry a wrong label on purpose."


def _train_teacher(settings: DemoSettings, image_size: int) -> Path:
    """Train the teacher on all rows; returns its weights."""
    recipe = _recipe(
        settings,
        image_size,
        network=settings.teacher,
        epochs=settings.teacher_epochs,
        # No label smoothing: it flattens the logits whose spread the students use.
        run={"out": settings.out / "teacher", "seed": 0},
    )
    return distill(recipe).student


def _distill_students(
    settings: DemoSettings, image_size: int, checkpoint: Path, seconds: dict[str, float]
) -> None:
    """Train a student of each kind for every seed."""
    (settings.out / "caches").mkdir()
    for seed in range(settings.seeds):
        for name, kind in _KINDS.items():
            teacher: dict[str, object] = {"network": settings.teacher, "checkpoint": checkpoint}
            if kind.is_cached:
                # One for each seed: the views depend on it.
                teacher["cache"] = settings.out / "caches" / str(seed)
            recipe = _recipe(
                settings,
                image_size,
                network=settings.student,
                epochs=settings.epochs,
                run={"out": settings.out / "runs" / f"{name}-{seed}", "seed": seed},
                teacher=teacher,
                loss={"reshaping": "class_std" if kind.is_reshaped else "none"},
                subset=settings.out / f"{kind.strategy}.npy" if kind.strategy else None,
                num_views=-(-settings.epochs // _EPOCHS_PER_VIEW) if kind.is_cached else None,
            )
            with _timed(f"distill {name}, seed {seed}", seconds):
                distill(recipe)


def _run_fields(comparison: Comparison) -> list[dict[str, object]]:
    """List cost and accuracy of each student, for result.json."""
    assert comparison.baseline is not None, "it was asked for by name"
    full = {run.seed: run.paid_seconds() or 0.0 for run in comparison.baseline.runs}

    def fields(run: Run, cost: float | None) -> dict[str, object]:
        paid = run.paid_seconds() or 0.0
        recorded = ("rows", "images_per_epoch", "train_seconds", "startup_seconds")
        return {
            "name": run.name,
            "seed": run.seed,
            "epochs": run.epochs,
            **{name: getattr(run.result, name) for name in (*recorded, "data_wait_share")},
            "score_seconds": run.score_seconds,
            "total_seconds": run.paid_seconds(total=True),
            "cost_ratio": cost,
            "ratio_to_full": paid / full[run.seed],
            "steady_train_seconds": comparison.steady_seconds[id(run)],
            "disturbed": run.is_disturbed,
            "top1_last": run.top1_last,
            "top1_best": run.top1_best,
        }

    return [
        fields(run, cost)
        for group in comparison.groups
        for run, cost in zip(group.runs, comparison.costs(group), strict=True)
    ]


def _check(settings: DemoSettings) -> None:
    """Refuse settings that would only fail after minutes of work."""
    for name in (settings.teacher, settings.student):
        build_network(name, num_classes=2)
    _check_places(settings)


def _check_places(settings: DemoSettings) -> None:
    """Refuse paths that do not exist, or would be cleared away with an earlier demo."""
    out, images, checkpoint = settings.out.resolve(), settings.images, settings.teacher_checkpoint
    if checkpoint is not None and not checkpoint.is_file():
        raise InvalidValueError(f"teacher checkpoint {checkpoint} does not exist.")
    if images is not None and not images.is_dir():
        raise InvalidValueError(
            f"image folder {images} does not exist. Name one that holds a folder per class."
        )
    for what, path in (("teacher checkpoint", checkpoint), ("image folder", images)):
        if path is not None and path.resolve().is_relative_to(out):
            raise InvalidValueError(
                f"{what} {path} lies in the folder that the demo replaces. Name another --out, or "
                f"copy the {what} away first."
            )
    # With train/ in it, the folder's other children are not classes.
    if images is None or (images / "train").is_dir():
        return
    if out.parent == images.resolve():
        raise InvalidValueError(
            f"--out {settings.out} would be a class of the image folder {images}. Name another."
        )


@contextmanager
def _cleared_folder(out: Path) -> Iterator[Path]:
    """Remove an earlier demo from the folder, and lock it against other processes."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidValueError(f"--out {out} cannot be made: {error.strerror}.") from error
    if any(out.iterdir()) and not (out / _MARK).exists():
        raise InvalidValueError(f"{out} holds files that no demo wrote. Name another --out.")
    with lock(out / _MARK, wait=False):
        for name in _WRITTEN:
            if (out / name).is_dir():
                shutil.rmtree(out / name)
            else:
                (out / name).unlink(missing_ok=True)
        yield out


@contextmanager
def _timed(name: str, steps: dict[str, float]) -> Iterator[None]:
    """Log that a step begins, and record how long it took."""
    logger.info("%s ...", name)
    started = time.perf_counter()
    yield
    steps[name] = time.perf_counter() - started


def _require_enough(train: Path, keep: float) -> None:
    """Refuse images that would only fail after minutes of teacher training."""
    beton = open_beton(train)
    if beton.num_classes < 2:
        raise InvalidValueError("the images have one class; a teacher needs at least two.")
    num_rows = beton.num_rows
    kept = round(keep * num_rows)
    if kept < _BATCH_SIZE:
        raise InvalidValueError(
            f"keep ({keep}) leaves {kept} of {num_rows:,} training images, but a batch has "
            f"{_BATCH_SIZE}. Keep more, or take more images."
        )


def _recipe(
    settings: DemoSettings,
    image_size: int,
    *,
    network: str,
    epochs: int,
    subset: Path | None = None,
    num_views: int | None = None,
    **sections: dict[str, object],
) -> Recipe:
    """Fill in the settings that teacher and students share."""
    return make_recipe(
        {
            "data": {
                "train": settings.out / "train.beton",
                "val": settings.out / "val.beton",
                "subset": subset,
                "num_views": num_views,
                "image_size": image_size,
                "batch_size": _BATCH_SIZE,
            },
            "student": {"network": network},
            "schedule": {
                "epochs": epochs,
                "learning_rate": 0.1,
                "weight_decay": 5e-4,
                "nesterov": True,
                "policy": "one_cycle",
            },
            **sections,
        }
    )
