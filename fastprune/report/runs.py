"""Run folders as `fastprune train` wrote them, finished or not."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field

from fastprune.base.errors import ArtifactError, InvalidValueError
from fastprune.base.files import read_text
from fastprune.base.headers import Header, parse_json, read_header
from fastprune.distillation.costs import Steps
from fastprune.rows.subset import Subset

_RECIPE, _RESULT, _METRICS = "recipe.json", "result.json", "metrics.jsonl"
# runs/, runs/medium-0/ and study/cell/seed/ are the depths people use; a deeper search would walk
# into image folders.
_LEVELS = ("*", "*/*", "*/*/*")
_CURE = (
    "It is damaged, or not of this version of `fastprune train`: leave the run out, or train again."
)


class _Record(Header):
    """A part of a run's JSON: the keys that reports use are checked, the others kept as they are.

    Reports compare runs of several versions, whose recipes have different keys.
    """

    model_config = ConfigDict(extra="allow")


class Data(_Record):
    """Section `data` of a recipe."""

    train: str
    val: str | None = None
    subset: str | None = None
    image_size: int


class Network(_Record):
    """Sections `student` and `teacher` of a recipe."""

    network: str
    checkpoint: str | None = None
    weights: str | None = None


class _Rule(_Record):
    """Section `pruning` of a recipe."""

    rule: str


class _Loss(_Record):
    """Section `loss` of a recipe."""

    reshaping: str = "none"


class _Schedule(_Record):
    """Section `schedule` of a recipe."""

    epochs: int


class _RunSection(_Record):
    """Section `run` of a recipe."""

    out: str
    name: str | None = None
    seed: int


class RecordedRecipe(_Record):
    """Content of recipe.json, the settings as resolved."""

    data: Data
    student: Network
    teacher: Network | None = None
    loss: _Loss = _Loss()
    pruning: _Rule | None = None
    schedule: _Schedule
    run: _RunSection


class _Validation(_Record):
    """A validation in result.json."""

    epoch: float
    train_seconds: float
    top1: float


class RecordedResult(_Record):
    """Content of result.json; numbers that only some versions record are looked up by name."""

    epochs: int
    curve: tuple[_Validation, ...]
    keep_ratio: float | None = None
    strategy: str | None = None
    metric: str | None = None
    score_seconds: float | None = None
    disturbed: bool = False
    steps_by_kind: dict[str, Steps] = Field(default_factory=dict)
    device: str | None = None
    backend: str = "an unknown engine"
    machine: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)


@dataclass(frozen=True)
class Point:
    """A validation.

    Attributes:
        epoch: passes complete by then.
        seconds: of training by then; in an unfinished run, of its log.
        top1: accuracy in [0, 1].
    """

    epoch: float
    seconds: float
    top1: float


@dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
        folder: path of the run.
        name: of the run; runs of one name differ by their seed.
        selection: the rows it was trained on, in words.
        curve: the validations so far.
        score_seconds: scoring before the run could begin; 0 where it needs no scores, None where
            the seconds are not recorded.
        recipe: the settings.
        result: costs and accuracy; None for an unfinished run.
        teacher_top1: accuracy in [0, 1] of the teacher on its validation images, where fastprune
            trained it and its run is still there; else None.
        finished: when the result was written, local time; None for an unfinished run.
    """

    folder: Path
    name: str
    selection: str
    curve: tuple[Point, ...]
    score_seconds: float | None
    recipe: RecordedRecipe
    result: RecordedResult | None
    teacher_top1: float | None
    finished: datetime | None

    @property
    def seed(self) -> int:
        """Of the student's weights."""
        return self.recipe.run.seed

    @property
    def keeps_all(self) -> bool:
        """Whether every epoch has all rows of the beton."""
        return self.recipe.data.subset is None and self.recipe.pruning is None

    @property
    def epochs(self) -> int:
        """Passes over the rows, as planned."""
        return self.recipe.schedule.epochs if self.result is None else self.result.epochs

    @property
    def is_finished(self) -> bool:
        """Whether the run has a result."""
        return self.result is not None

    @property
    def is_disturbed(self) -> bool:
        """Whether its steps varied too much for its seconds to be trusted."""
        return self.result is not None and self.result.disturbed

    @property
    def top1_last(self) -> float | None:
        """Accuracy in [0, 1] of the last validation; None before the first."""
        return self.curve[-1].top1 if self.curve else None

    @property
    def top1_best(self) -> float | None:
        """Accuracy in [0, 1] of the best validation; None before the first."""
        return max((point.top1 for point in self.curve), default=None)

    def number(self, key: str) -> float | None:
        """Look up a number of result.json; None where it is not recorded."""
        value = getattr(self.result, key, None)
        return float(value) if isinstance(value, int | float) else None

    def paid_seconds(self, *, total: bool = False) -> float | None:
        """Add scoring and training; with `total`, start-up and validation too."""
        spent = self.number("total_seconds" if total else "train_seconds")
        return None if spent is None or self.score_seconds is None else self.score_seconds + spent


def read_runs(paths: Iterable[str | Path], *, score_seconds: float | None = None) -> list[Run]:
    """Read run folders, and run folders inside of other folders.

    Args:
        paths: run folders, or folders with run folders in them, up to three levels down.
        score_seconds: seconds of scoring, for runs whose subset does not record them.

    Returns:
        The runs, in the order of the paths, each once; below a path, by name. Where two have the
        same name and seed, their folder is added to the name.

    Raises:
        ArtifactError: a folder does not exist, or is not a run and holds none, or a file in it is
            damaged.
        InvalidValueError: score_seconds is negative.
    """
    if score_seconds is not None and score_seconds < 0:
        raise InvalidValueError(f"score_seconds ({score_seconds}) must be >= 0.")
    folders = dict.fromkeys(folder for path in paths for folder in _run_folders(Path(path)))
    runs = [_read_run(folder, score_seconds) for folder in folders]
    # Two experiments of one name and seed would be averaged as if they were one.
    keys = [(run.name, run.seed) for run in runs]
    return [
        run if keys.count(key) == 1 else replace(run, name=f"{run.name} ({run.folder})")
        for run, key in zip(runs, keys, strict=True)
    ]


def _run_folders(path: Path) -> Iterator[Path]:
    if (path / _RECIPE).is_file():
        yield path
        return
    if not path.is_dir():
        raise ArtifactError(f"{path} does not exist. Name the folder of a run (run.out).")
    found = [file.parent for level in _LEVELS for file in sorted(path.glob(f"{level}/{_RECIPE}"))]
    if not found:
        raise ArtifactError(
            f"{path} is not a run and holds none: it has no {_RECIPE}. Name the folder that "
            "`fastprune train` wrote (run.out)."
        )
    yield from found


def _read_run(folder: Path, given_score_seconds: float | None) -> Run:
    recipe = read_header(folder / _RECIPE, RecordedRecipe, cure=_CURE)
    result, finished = None, None
    if (folder / _RESULT).exists():
        result = read_header(folder / _RESULT, RecordedResult, cure=_CURE)
        written = (folder / _RESULT).stat().st_mtime
        finished = datetime.fromtimestamp(written).astimezone()
    subset = _load_subset(recipe, folder)
    # medium-0 and medium_seed0 are runs of seed 0 of one experiment, "medium".
    folder_name = re.sub(rf"(?<=.)[-_](seed)?{recipe.run.seed}$", "", folder.resolve().name)
    return Run(
        folder=folder,
        name=recipe.run.name or folder_name,
        selection=_selection(recipe, result, subset),
        curve=tuple(_unfinished_curve(folder))
        if result is None
        else tuple(Point(p.epoch, p.train_seconds, p.top1) for p in result.curve),
        score_seconds=_score_seconds(recipe, result, subset, given_score_seconds),
        recipe=recipe,
        result=result,
        teacher_top1=_teacher_top1(recipe, folder),
        finished=finished,
    )


def _unfinished_curve(folder: Path) -> Iterator[Point]:
    """Yield the validations in metrics.jsonl."""
    try:
        lines = read_text(folder / _METRICS).splitlines()
    except (OSError, ValueError):
        return
    before = latest = 0.0
    for line in lines:
        try:
            fields = parse_json(line)
            seconds = float(fields["seconds"])
            # A resumed process counts from zero again, so its seconds add to those before it.
            if seconds < latest:
                before += latest
            latest = seconds
            if "top1" in fields:
                yield Point(fields["epoch"], before + latest, fields["top1"])
        except (KeyError, TypeError, ValueError):
            # The run may be writing its last line right now.
            continue


def _find(name: str, recipe: RecordedRecipe, folder: Path) -> Path:
    """Find a file that a recipe names, from whichever folder the report is made.

    Relative names are relative to the folder in which the training was started. It follows from
    the run's own name there, `run.out`, and from where the run is.
    """
    path, out, here = Path(name), Path(recipe.run.out), folder.resolve()
    is_relative = not path.is_absolute() and not out.is_absolute() and ".." not in out.parts
    if is_relative and here.parts[-len(out.parts) :] == out.parts:
        return here.parents[len(out.parts) - 1] / path
    return path


def _load_subset(recipe: RecordedRecipe, folder: Path) -> Subset | None:
    """Load the subset of the run; None where there is none, or it has moved since."""
    if recipe.data.subset is None:
        return None
    try:
        return Subset.load(_find(recipe.data.subset, recipe, folder))
    except (ArtifactError, InvalidValueError):
        return None


def _teacher_top1(recipe: RecordedRecipe, folder: Path) -> float | None:
    """Accuracy that the teacher's own run reached; None where that run is not there."""
    if recipe.teacher is None or recipe.teacher.checkpoint is None:
        return None
    path = _find(recipe.teacher.checkpoint, recipe, folder).parent / _RESULT
    try:
        result = json.loads(read_text(path))
        return float(result["top1_last"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _selection(recipe: RecordedRecipe, result: RecordedResult | None, subset: Subset | None) -> str:
    """Describe the rows: `all rows`, `50% medium by centroid`, `all rows, infobatch`."""
    ending = "" if recipe.pruning is None else f", {recipe.pruning.rule}"
    if recipe.data.subset is None:
        return f"all rows{ending}"
    # The run's own record comes first: the subset may have been replaced after the training.
    source = result if result is not None and result.strategy is not None else subset
    if source is None or source.strategy is None:
        return Path(recipe.data.subset).name + ending
    share = "" if source.keep_ratio is None else f"{100 * source.keep_ratio:.3g}% "
    by = "" if source.strategy == "random" else f" by {source.metric}"
    return f"{share}{source.strategy}{by}{ending}"


def _score_seconds(
    recipe: RecordedRecipe,
    result: RecordedResult | None,
    subset: Subset | None,
    given: float | None,
) -> float | None:
    """Charge a run for scoring only where it uses difficulties or class std."""
    if recipe.data.subset is None:
        return 0.0
    if result is not None and result.score_seconds is not None:
        return result.score_seconds
    if subset is None:
        return given
    if subset.strategy == "random" and recipe.loss.reshaping != "class_std":
        return 0.0
    return given if subset.score_seconds is None else subset.score_seconds
