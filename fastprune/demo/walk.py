"""The stations in order: convert, teacher, score, select, and four kinds of students."""

import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastprune.base.errors import InvalidValueError
from fastprune.base.files import lock
from fastprune.beton.convert.writer import convert
from fastprune.beton.reader import open_beton
from fastprune.demo.images import prepare_images
from fastprune.demo.pictures import WRONG_LABEL_SHARE
from fastprune.demo.summary import DemoResult, Sample, StudentRun, sample_rows
from fastprune.difficulty.teacher import score
from fastprune.distillation.trainer import distill
from fastprune.networks import build_network
from fastprune.report.score_pictures import read_image
from fastprune.selection.subsets import make_subset
from fastprune.settings import Recipe, make_recipe

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

# A folder is only cleared where this file says that a demo wrote it, and only of these names.
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
    "report.png",
    "result.json",
)
# Keeps the demo within minutes on two cores, whatever the user's images are.
_LARGEST_VIEW = 32


@dataclass(frozen=True)
class DemoSettings:
    """The demo's settings.

    Attributes:
        images: ImageFolder to use; None draws pictures.
        out: folder to write; an earlier demo in it is replaced.
        keep: share of the rows that the pruned runs keep, in (0, 1].
        epochs: passes of every student over its rows.
        seeds: students per kind of run.
        teacher: network of the teacher.
        teacher_checkpoint: its weights; None trains it first.
        teacher_epochs: passes of the teacher over all rows.
        student: network of the students.
        per_class: training images per class at most; None for all.
        image_size: side of a view in pixels; None for the images' own, at most 32.
    """

    images: Path | None = None
    out: Path = Path("demo")
    keep: float = 0.5
    epochs: int = 12
    seeds: int = 1
    teacher: str = "resnet20"
    teacher_checkpoint: Path | None = None
    teacher_epochs: int = 10
    student: str = "resnet8"
    per_class: int | None = None
    image_size: int | None = None


def run_demo(settings: DemoSettings) -> DemoResult:
    """Walk the whole way and write it all into a folder.

    Args:
        settings: images, networks, epochs, folder.

    Returns:
        Cost and accuracy of every student; the same as in result.json.

    Raises:
        FastpruneError: the images, the settings or the disk do not allow it; the text says why.
    """
    _check(settings)
    with _cleared_folder(settings.out) as out:
        steps: dict[str, float] = {}
        with _timed("convert", steps):
            folders = prepare_images(settings.images, out / "images", per_class=settings.per_class)
            train, val = out / "train.beton", out / "val.beton"
            convert(folders[0], train)
            convert(folders[1], val)
        _require_enough(train, settings.keep)
        beton = open_beton(train)
        sides = np.minimum(beton.widths, beton.heights)
        image_size = settings.image_size or int(min(np.median(sides), _LARGEST_VIEW))
        with _timed("teacher", steps):
            checkpoint = settings.teacher_checkpoint
            if checkpoint is None:
                recipe = _recipe(
                    settings,
                    image_size,
                    network=settings.teacher,
                    epochs=settings.teacher_epochs,
                    # No label smoothing: it flattens the logits whose spread the students use.
                    run={"out": out / "teacher", "seed": 0},
                )
                checkpoint = distill(recipe).student
        with _timed("score", steps):
            table = score(
                train,
                settings.teacher,
                out / "scores.parquet",
                checkpoint=checkpoint,
                image_size=image_size,
                # As the students' images: what is scored, and what class std are of, is taught.
                views="train",
            )
        with _timed("select", steps):
            subsets = {
                name: make_subset(table, keep_ratio=settings.keep, strategy=name, metric=_METRIC)
                for name in _STRATEGIES
            }
            for name, subset in subsets.items():
                subset.save(out / f"{name}.npy")
        result = DemoResult(
            runs=_distill_students(settings, image_size, checkpoint, steps),
            table=table,
            kept=subsets["medium"],
            samples=_samples(train, table.metric(_METRIC), subsets["medium"].rows),
            step_seconds=steps,
            wrong_label_share=WRONG_LABEL_SHARE if settings.images is None else 0.0,
        )
        result.save(out)
    return result


def _distill_students(
    settings: DemoSettings, image_size: int, checkpoint: Path, steps: dict[str, float]
) -> list[StudentRun]:
    """Train a student of each kind for every seed."""
    runs = []
    (settings.out / "caches").mkdir()
    for seed in range(settings.seeds):
        for name, kind in _KINDS.items():
            with _timed(f"distill {name}, seed {seed}", steps):
                teacher: dict[str, object] = {
                    "network": settings.teacher,
                    "checkpoint": checkpoint,
                }
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
                # Random rows need no scores.
                is_scored = kind.is_reshaped or kind.strategy == "medium"
                paid = steps["score"] + steps["select"] if is_scored else 0.0
                runs.append(StudentRun(name, distill(recipe), score_seconds=paid))
    return runs


def _check(settings: DemoSettings) -> None:
    """Refuse settings that would only fail after minutes of work."""
    if not 0 < settings.keep <= 1:
        raise InvalidValueError(f"keep ({settings.keep}) must be in (0, 1].")
    for name in ("epochs", "seeds", "teacher_epochs", "per_class", "image_size"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise InvalidValueError(f"{name} ({value}) must be at least 1.")
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
    # With train/ in it, the folder's other children are no classes.
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


def _samples(
    train: Path, scores: NDArray[np.float32], kept: NDArray[np.int64]
) -> dict[str, list[Sample]]:
    """Read pictures of the easiest, some kept and the hardest rows."""
    beton = open_beton(train)
    names = beton.class_names

    def sample(row: int) -> Sample:
        image = read_image(beton, row)
        image.thumbnail((_LARGEST_VIEW, _LARGEST_VIEW))
        label = int(beton.labels[row])
        return Sample(np.asarray(image), names[label] if names else str(label), float(scores[row]))

    return {caption: list(map(sample, rows)) for caption, rows in sample_rows(scores, kept).items()}
