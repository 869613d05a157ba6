"""Run folders, and runs of one name over several seeds: means, spreads, ratios."""

import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from fastprune.base.errors import ArtifactError, InvalidValueError
from fastprune.base.untrusted import member, parse_json, read_json, read_text
from fastprune.distillation.costs import Cost
from fastprune.rows.subset import Subset

_RECIPE, _RESULT, _METRICS = "recipe.json", "result.json", "metrics.jsonl"
# runs/, runs/medium-0/ and study/cell/seed/ are the depths people use; a deeper search would walk
# into image folders.
_LEVELS = ("*", "*/*", "*/*/*")
_REFERENCE_NAME = "full"


@dataclass(frozen=True)
class Point:
    """A validation.

    Attributes:
        epoch: passes that were complete.
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
        seed: of the run.
        selection: rows it was trained on, in words.
        keeps_all: whether every epoch has all rows of the beton.
        epochs: as planned.
        curve: the validations so far.
        score_seconds: that scoring took before the run could begin; 0 where it needs no scores,
            None where that is not recorded.
        recipe: content of recipe.json, the settings as resolved.
        result: content of result.json; None for an unfinished run.
        teacher_top1: accuracy in [0, 1] of the teacher on its validation images, where a run of
            fastprune trained it and is still there; else None.
        finished: when the result was written, local time; None for an unfinished run.
    """

    folder: Path
    name: str
    seed: int
    selection: str
    keeps_all: bool
    epochs: int
    curve: tuple[Point, ...]
    score_seconds: float | None
    recipe: dict[str, Any]
    result: dict[str, Any] | None
    teacher_top1: float | None
    finished: datetime | None

    @property
    def is_finished(self) -> bool:
        """Whether it came to its end."""
        return self.result is not None

    @property
    def is_disturbed(self) -> bool:
        """Whether its steps took so different times that its seconds cannot be trusted."""
        return bool((self.result or {}).get("disturbed"))

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
        value = None if self.result is None else self.result.get(key)
        return float(value) if isinstance(value, int | float) else None

    def paid_seconds(self, *, total: bool = False) -> float | None:
        """Add scoring and training; with `total`, start-up and validation too."""
        spent = self.number("total_seconds" if total else "train_seconds")
        return None if spent is None or self.score_seconds is None else self.score_seconds + spent


def read_runs(paths: Iterable[str | Path], *, score_seconds: float | None = None) -> list[Run]:
    """Read run folders, and those inside of other folders.

    Args:
        paths: run folders, or folders with run folders in them, up to three levels down.
        score_seconds: seconds of scoring, for runs whose subset does not record them.

    Returns:
        The runs, in the order of the paths, each once; below a path, by name. Where two have the
        same name and seed, their folder is added to the name.

    Raises:
        ArtifactError: a folder does not exist, is no run and holds none, or a file in it is
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
            f"{path} is no run and holds none: there is no {_RECIPE} in it. Name the folder that "
            "`fastprune train` wrote (run.out)."
        )
    yield from found


def _read_run(folder: Path, score_seconds: float | None) -> Run:
    recipe = _read_json(folder / _RECIPE)
    result = _read_json(folder / _RESULT) if (folder / _RESULT).exists() else None
    try:
        _require_sections(recipe)
        seed = member(recipe["run"], "seed", int)
        subset = _subset(recipe, folder)
        teacher = recipe.get("teacher") or {}
        teacher_result = _find(teacher.get("checkpoint"), recipe, folder).parent / _RESULT
        # medium-0 and medium_seed0 are runs of seed 0 of one experiment, "medium".
        folder_name = re.sub(rf"(?<=.)[-_](seed)?{seed}$", "", folder.resolve().name)
        if result is None:
            curve = tuple(_unfinished_curve(folder))
        else:
            curve = tuple(
                Point(*(member(point, name, float) for name in ("epoch", "train_seconds", "top1")))
                for point in member(result, "curve", list)
            )
        return Run(
            folder=folder,
            name=recipe["run"]["name"] or folder_name,
            seed=seed,
            selection=_selection(recipe, result, subset),
            keeps_all=recipe["data"]["subset"] is None and recipe.get("pruning") is None,
            epochs=member(result or recipe["schedule"], "epochs", int),
            curve=curve,
            score_seconds=_score_seconds(recipe, result, subset, score_seconds),
            recipe=recipe,
            result=result,
            teacher_top1=_read_json(teacher_result)["top1_last"]
            if teacher.get("checkpoint") and teacher_result.is_file()
            else None,
            finished=None
            if result is None
            else datetime.fromtimestamp((folder / _RESULT).stat().st_mtime).astimezone(),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{folder} was not written by this version of `fastprune train` ({error!r} in its "
            f"{_RECIPE} or {_RESULT}). Leave it out, or train again."
        ) from error


def _require_sections(recipe: Any) -> None:
    """Refuse what is no recipe as it was resolved.

    Raises:
        ValueError: a section is missing or none.
    """
    for section in ("data", "student", "schedule", "run"):
        member(recipe, section, dict)
    member(recipe, "teacher", dict, None)
    member(recipe["student"], "network", str)
    member(recipe["run"], "name", str, None)


def _read_json(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{path} cannot be read as JSON ({error}). Remove the damaged run, or name others."
        ) from error


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
        except ValueError:
            # The run may be writing its last line right now.
            continue
        # A resumed process counts its seconds from zero again: they add to those before it.
        if fields["seconds"] < latest:
            before += latest
        latest = fields["seconds"]
        if "top1" in fields:
            yield Point(fields["epoch"], before + latest, fields["top1"])


def _find(name: str | None, recipe: dict[str, Any], folder: Path) -> Path:
    """Find a file that a recipe names, wherever the report is written.

    Relative names are relative to the folder in which the training was started. It follows from
    the run's own name there, `run.out`, and from where the run is.
    """
    path, out, here = Path(name or ""), Path(recipe["run"]["out"]), folder.resolve()
    is_relative = not path.is_absolute() and not out.is_absolute() and ".." not in out.parts
    if is_relative and here.parts[-len(out.parts) :] == out.parts:
        return here.parents[len(out.parts) - 1] / path
    return path


def _subset(recipe: dict[str, Any], folder: Path) -> Subset | None:
    """Load the subset of the run; None where there is none, or it has moved since."""
    name = recipe["data"]["subset"]
    if name is None:
        return None
    try:
        return Subset.load(_find(name, recipe, folder))
    except (ArtifactError, InvalidValueError):
        return None


def _selection(recipe: dict[str, Any], result: dict[str, Any] | None, subset: Subset | None) -> str:
    """Say on which rows: `all rows`, `50% medium by centroid`, `all rows, infobatch`."""
    ending = f", {recipe['pruning']['rule']}" if recipe.get("pruning") else ""
    if not recipe["data"]["subset"]:
        return f"all rows{ending}"
    # The run's own record comes first: the subset may have been replaced after the training.
    recorded = result or {}
    ratio, strategy, metric = (
        recorded.get(name, None if subset is None else getattr(subset, name))
        for name in ("keep_ratio", "strategy", "metric")
    )
    if strategy is None:
        return Path(recipe["data"]["subset"]).name + ending
    share = "" if ratio is None else f"{100 * ratio:.3g}% "
    return f"{share}{strategy}" + ("" if strategy == "random" else f" by {metric}") + ending


def _score_seconds(
    recipe: dict[str, Any],
    result: dict[str, Any] | None,
    subset: Subset | None,
    given: float | None,
) -> float | None:
    """Charge a run for scoring only where it uses difficulties or class std."""
    if recipe["data"]["subset"] is None:
        return 0.0
    own = (result or {}).get("score_seconds")
    if own is not None:
        return float(own)
    is_random = subset is not None and subset.strategy == "random"
    if is_random and recipe["loss"]["reshaping"] != "class_std":
        return 0.0
    recorded = None if subset is None else subset.score_seconds
    return given if recorded is None else recorded


@dataclass(frozen=True)
class Group:
    """Runs that differ by their seed.

    Attributes:
        name: of the runs.
        runs: one or more, all finished or none.
    """

    name: str
    runs: tuple[Run, ...]

    @property
    def is_finished(self) -> bool:
        """Whether its runs came to their end."""
        return self.runs[0].is_finished


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Put runs of one name together, finished and unfinished ones apart, in order."""
    members: dict[tuple[str, bool], list[Run]] = {}
    for run in runs:
        members.setdefault((run.name, run.is_finished), []).append(run)
    return [
        Group(name if is_finished else f"{name} (unfinished)", tuple(group))
        for (name, is_finished), group in members.items()
    ]


def choose_reference(groups: Sequence[Group], name: str | None) -> Group | None:
    """Choose the group that the others are compared with.

    Args:
        groups: all groups.
        name: the one that is asked for; None for the finished one that trains on all rows, among
            several the one called "full".

    Returns:
        The group; None where none is asked for and none, or more than one, fits.

    Raises:
        InvalidValueError: no finished run has that name.
    """
    finished = {group.name: group for group in groups if group.is_finished}
    if name is not None:
        if name not in finished:
            known = ", ".join(finished) or "none"
            raise InvalidValueError(
                f"reference {name!r} is not among the finished runs: {known}. Name one of these."
            )
        return finished[name]
    full = {name: group for name, group in finished.items() if group.runs[0].keeps_all}
    if len(full) == 1:
        return next(iter(full.values()))
    return full.get(_REFERENCE_NAME)


def cost_ratios(group: Group, reference: Group, *, with_scoring: bool) -> list[float]:
    """Divide the cost of each run by that of the reference run with the same seed.

    Steps count with their median, which does not see a phase in which the machine was busy; where
    a run does not record it, seconds by the wall clock are compared.

    Args:
        group: the runs.
        reference: the runs to compare with.
        with_scoring: count scoring and start-up, or training alone.

    Returns:
        A ratio per seed that both have; where they share none, the ratio of the means. Empty where
        a number is not recorded.
    """
    runs = (*group.runs, *reference.runs)
    is_steady = all(run.number("steady_train_seconds") is not None for run in runs)

    def cost(run: Run) -> float | None:
        if with_scoring:
            return steady_cost(run, is_steady=is_steady)
        return run.number("steady_train_seconds" if is_steady else "train_seconds")

    references = {run.seed: cost(run) for run in reference.runs}
    pairs = [(cost(run), references[run.seed]) for run in group.runs if run.seed in references]
    if not pairs:
        pairs = [(mean([cost(r) for r in group.runs]), mean([cost(r) for r in reference.runs]))]
    return [ours / theirs for ours, theirs in pairs if ours is not None and theirs]


def steady_cost(run: Run, *, is_steady: bool = True) -> float | None:
    """Seconds of training, scoring and start-up; None where one is not recorded.

    Args:
        run: a finished run.
        is_steady: count each step with the median, or training by the wall clock.
    """
    train = run.number("steady_train_seconds" if is_steady else "train_seconds")
    if train is None or run.score_seconds is None:
        return None
    return Cost(train, run.score_seconds, run.number("startup_seconds") or 0.0).seconds


def mean(values: Sequence[float | None]) -> float | None:
    """Average the values; None where one is missing."""
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known and len(known) == len(values) else None


def mean_and_sd(values: Sequence[float | None], digits: int) -> str:
    """Format as `61.2 ± 0.4`; a single value alone, and a dash where one is missing."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return "–"
    text = f"{statistics.mean(known):,.{digits}f}"
    return text if len(known) < 2 else f"{text} ± {statistics.stdev(known):,.{digits}f}"
