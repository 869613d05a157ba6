"""What the report reads of run folders: result.json, or metrics.jsonl of an unfinished run."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastprune.artifacts.subset import Subset
from fastprune.errors import ArtifactError, InvalidValueError

_RECIPE, _RESULT, _METRICS = "recipe.json", "result.json", "metrics.jsonl"
_LEVELS = ("*", "*/*", "*/*/*")


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
        folder: where it is.
        name: of the run; runs of one name differ by their seed.
        seed: of the run.
        selection: what it was trained on, in words.
        keeps_all: whether every epoch has all rows of the beton.
        epochs: as planned.
        curve: the validations so far.
        score_seconds: that scoring took before the run could begin; 0 where it needs no scores,
            None where that is not recorded.
        result: what result.json holds; None for an unfinished run.
    """

    folder: Path
    name: str
    seed: int
    selection: str
    keeps_all: bool
    epochs: int
    curve: tuple[Point, ...]
    score_seconds: float | None
    result: dict[str, Any] | None

    @property
    def is_finished(self) -> bool:
        """Whether it came to its end."""
        return self.result is not None

    @property
    def top1_last(self) -> float | None:
        """Accuracy in [0, 1] of the last validation; None before the first."""
        return self.curve[-1].top1 if self.curve else None

    @property
    def top1_best(self) -> float | None:
        """Accuracy in [0, 1] of the best validation; None before the first."""
        return max((point.top1 for point in self.curve), default=None)

    def number(self, key: str) -> float | None:
        """A number of result.json; None where it is not recorded."""
        value = None if self.result is None else self.result.get(key)
        return float(value) if isinstance(value, int | float) else None

    def paid_seconds(self, *, total: bool = False) -> float | None:
        """Scoring and training; with `total`, start-up and validation too."""
        spent = self.number("total_seconds" if total else "train_seconds")
        return None if spent is None or self.score_seconds is None else self.score_seconds + spent


def read_runs(paths: Iterable[str | Path], *, score_seconds: float | None = None) -> list[Run]:
    """Read run folders, and those inside of other folders.

    Args:
        paths: run folders, or folders with run folders in them, up to three levels down.
        score_seconds: what scoring took, for runs on a subset that does not tell.

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
    return list(_told_apart([_read_run(folder, score_seconds) for folder in folders]))


def _run_folders(path: Path) -> Iterator[Path]:
    """The folder itself, or the runs in it."""
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
    """What is known of one run."""
    recipe = _read_json(folder / _RECIPE)
    result = _read_json(folder / _RESULT) if (folder / _RESULT).exists() else None
    try:
        name, seed = recipe["run"]["name"], recipe["run"]["seed"]
        keeps_all = recipe["data"]["subset"] is None and recipe.get("pruning") is None
        return Run(
            folder=folder,
            name=name or _without_seed(folder.resolve().name, seed),
            seed=seed,
            selection=_selection(recipe, result),
            keeps_all=keeps_all,
            epochs=(result or recipe["schedule"])["epochs"],
            curve=tuple(_unfinished_curve(folder) if result is None else _curve(result)),
            score_seconds=_score_seconds(recipe, score_seconds),
            result=result,
        )
    except (KeyError, TypeError) as error:
        raise ArtifactError(
            f"{folder} was not written by this version of `fastprune train` ({error!r} in its "
            f"{_RECIPE} or {_RESULT}). Leave it out, or train again."
        ) from error


def _read_json(path: Path) -> Any:
    """The content of a JSON file of a run."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{path} cannot be read as JSON ({error}). Remove the damaged run, or name others."
        ) from error


def _without_seed(folder_name: str, seed: int) -> str:
    """`medium` for the folders medium-0 and medium_seed0 of seed 0."""
    return re.sub(rf"(?<=.)[-_](seed)?{seed}$", "", folder_name)


def _curve(result: dict[str, Any]) -> Iterator[Point]:
    """The validations of a finished run."""
    for point in result["curve"]:
        yield Point(point["epoch"], point["train_seconds"], point["top1"])


def _unfinished_curve(folder: Path) -> Iterator[Point]:
    """The validations in metrics.jsonl; a line that was being written is left out.

    A run that was gone on with counts from zero again: its seconds are added to those before.
    """
    try:
        lines = (folder / _METRICS).read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    before = latest = 0.0
    for line in lines:
        try:
            fields = json.loads(line)
        except ValueError:
            continue
        if fields["seconds"] < latest:
            before += latest
        latest = fields["seconds"]
        if "top1" in fields:
            yield Point(fields["epoch"], before + latest, fields["top1"])


def _subset(recipe: dict[str, Any]) -> Subset | None:
    """The subset of the run, where it still is where it was."""
    try:
        return Subset.load(recipe["data"]["subset"])
    except (ArtifactError, InvalidValueError):
        return None


def _selection(recipe: dict[str, Any], result: dict[str, Any] | None) -> str:
    """Such as: all rows; 50% medium by centroid; all rows, infobatch."""
    pruning = recipe.get("pruning")
    ending = f", {pruning['rule']}" if pruning else ""
    return (_kept(recipe, result) if recipe["data"]["subset"] else "all rows") + ending


def _kept(recipe: dict[str, Any], result: dict[str, Any] | None) -> str:
    """What the subset keeps, as far as the run or the subset tells."""
    subset, told = _subset(recipe), result or {}
    ratio, strategy, metric = (
        told.get(name, None if subset is None else getattr(subset, name))
        for name in ("keep_ratio", "strategy", "metric")
    )
    if strategy is None:
        return Path(recipe["data"]["subset"]).name
    share = "" if ratio is None else f"{100 * ratio:.3g}% "
    return f"{share}{strategy}" + ("" if strategy == "random" else f" by {metric}")


def _score_seconds(recipe: dict[str, Any], given: float | None) -> float | None:
    """What scoring cost this run: nothing where it needs neither difficulties nor class std."""
    if recipe["data"]["subset"] is None:
        return 0.0
    subset = _subset(recipe)
    is_random = subset is not None and subset.strategy == "random"
    if is_random and recipe["loss"]["reshaping"] != "class_std":
        return 0.0
    recorded = None if subset is None else subset.score_seconds
    return given if recorded is None else recorded


def _told_apart(runs: list[Run]) -> Iterator[Run]:
    """The runs; of those with the same name and seed, each is called by its folder too."""
    places = [(run.name, run.seed) for run in runs]
    for run, place in zip(runs, places, strict=True):
        if places.count(place) == 1:
            yield run
        else:
            yield replace(run, name=f"{run.name} ({run.folder})")
