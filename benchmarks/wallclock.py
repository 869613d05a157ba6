"""What do students on half of the rows reach, and what do they cost, against one on all of them?

    python benchmarks/wallclock.py --images cifar10          # folders train/ and test/ in it

A teacher is trained once on all rows and scores them once, on training views. Then every cell
distills a student for every seed, each in a process of its own, seed by seed, and within a seed in
random order. Accuracy is compared within a budget: `full@E/2` takes as many steps on all rows as a
half takes in all epochs, and `infobatch@2E/3` about as many. The contrasts are fixed in
_cells.py. Accuracy does not mind what else the machine does, but seconds do: at the end, steps of
all cells are measured in turn, and cost is steps x their median + scoring + start-up.

The JSON is written after every run, and the script continues where it was stopped. `--only runs`
leaves the measuring in turn for a quiet hour, `--only turns` does it for the seeds that are whole.
"""

import argparse
import collections
import json
import random
import shutil
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from _cells import CELLS, CONTRASTS, FURTHER_CELLS, MARGINS, VARIANTS
from _contrasts import compare, half_width
from _harness import RESULTS, ROOT, commit, write_result
from _study import Command, Preparation, read_result, refuse_other, start_training, train_process
from _turns import cost_seconds, steps_in_turn

from fastprune.base.environment import describe_machine

KEPT_OF_RESULT = (
    "rows",
    "images_per_epoch",
    "epochs",
    "steps",
    "train_seconds",
    "startup_seconds",
    "validation_seconds",
    "steady_train_seconds",
    "step_seconds_p10",
    "step_seconds_p50",
    "step_seconds_p90",
    "disturbed",
    "teacher_forwards",
    "teacher_forwards_saved",
    "cache_bytes",
    "cache_fill_seconds",
    "top1_last",
)
NUM_VIEWS = 8  # of a cached cell: they recur after so many epochs
SCORINGS_IN_TURN = 3
_POLL_SECONDS = 0.2


def main() -> None:
    arguments = parse()
    name = f"wallclock-{arguments.name}"
    work = arguments.work or ROOT / "build" / name
    if arguments.restart:
        shutil.rmtree(work, ignore_errors=True)
        (RESULTS / f"{name}.json").unlink(missing_ok=True)
    study = Study(arguments, name, work)
    study.prepare()
    if arguments.only != "turns":
        run_all(study, arguments)
    if arguments.only != "runs":
        study.measure_in_turn()
    for contrast in compare(study.runs, CONTRASTS, margins=MARGINS):
        print(contrast["sentence"])
    print(f"{len(study.runs)} runs -> {RESULTS / name}.json")


def run_all(study: "Study", arguments: argparse.Namespace) -> None:
    """Train what is missing, seed by seed, several at a time."""
    missing = collections.deque(
        (variant, seed)
        for seed in range(arguments.seeds)
        # In another order for each seed: what runs first on a warm machine is chance.
        for variant in random.Random(seed).sample(arguments.variants, len(arguments.variants))
        if not study.has(variant, seed)
    )
    total, done, started = len(missing), 0, time.perf_counter()
    running: dict[tuple[str, int], Command] = {}
    while missing or running:
        while missing and len(running) < arguments.processes:
            variant, seed = missing.popleft()
            running[variant, seed] = study.start(variant, seed)
        time.sleep(_POLL_SECONDS)
        for (variant, seed), command in list(running.items()):
            if command.is_done:
                run = study.finish(variant, seed, command)
                del running[variant, seed]
                done += 1
                left = (time.perf_counter() - started) / done * (total - done)
                print(
                    f"{variant}, seed {seed}: top-1 {run['top1_last']:.1%}; {done} of {total} "
                    f"runs, {left / 60:.0f} minutes left",
                    flush=True,
                )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="has folders train and test")
    parser.add_argument("--name", default="cifar10", help="of the result: wallclock-NAME.json")
    parser.add_argument("--per-class", type=int, default=2000, help="training images; 0 for all")
    parser.add_argument("--val-per-class", type=int, default=0, help="test images; 0 for all")
    parser.add_argument("--image-size", type=int, default=16, help="side of a view in pixels")
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--processes", type=int, default=2, help="runs at a time")
    parser.add_argument("--steps-in-turn", type=int, default=300, help="of each cell")
    parser.add_argument("--only", choices=("runs", "turns"), help="a part of the work")
    parser.add_argument("--reduced", help="what is smaller than usual and why, for the JSON")
    parser.add_argument("--teacher", default="resnet20", help="network of the teacher")
    parser.add_argument("--teacher-checkpoint", type=Path, help="its weights; default: trained")
    parser.add_argument("--teacher-epochs", type=int, default=30)
    parser.add_argument("--student", default="resnet8", help="network of the students")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, help="folder for betons and runs; default: build/")
    parser.add_argument("--restart", action="store_true", help="forget what was measured")
    cells = ",".join((*CELLS, *FURTHER_CELLS))
    parser.add_argument("--variants", type=known_variants, default=cells, metavar="NAME,NAME")
    return parser.parse_args()


def known_variants(text: str) -> list[str]:
    """The names between commas."""
    names = text.split(",")
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"{unknown[0]!r} is not known. Known: {', '.join(VARIANTS)}."
        )
    return names


class Study:
    """The runs so far, on disk after each.

    Attributes:
        runs: as in the JSON.
    """

    def __init__(self, arguments: argparse.Namespace, name: str, work: Path) -> None:
        self._arguments = arguments
        self._name = name
        self._prepared = Preparation(work, image_size=arguments.image_size)
        self._select_seconds: dict[str, float] = {}
        self.runs: list[dict[str, Any]] = []
        self._in_turn: dict[str, Any] | None = None
        self._path = RESULTS / f"{name}.json"
        self._earlier: dict[str, Any] | None = None
        if self._path.exists():
            self._earlier = json.loads(self._path.read_text(encoding="utf-8"))
            ours = {"settings": self._settings(), "machine": describe_machine()}
            refuse_other(self._earlier, ours, made=self._path)
            self.runs = self._earlier["runs"]
            self._in_turn = self._earlier["in_turn"]

    def prepare(self) -> None:
        """Make what all runs start from."""
        asked, prepared = self._arguments, self._prepared
        prepared.convert(asked.images, asked.per_class or None, asked.val_per_class or None)
        if asked.teacher_checkpoint is None:
            prepared.train_teacher(asked.teacher, asked.teacher_epochs, asked.device)
        else:
            prepared.take_teacher(asked.teacher, asked.teacher_checkpoint)
        prepared.score(asked.teacher, asked.device)
        if self._earlier is not None:
            theirs, ours = inputs(self._earlier["prepared"]), inputs(prepared.facts)
            refuse_other(theirs, ours, made=self._path)

    def has(self, name: str, seed: int) -> bool:
        """Whether this run is done."""
        return any(run["name"] == name and run["seed"] == seed for run in self.runs)

    def start(self, name: str, seed: int) -> Command:
        """Start to distill a student."""
        # A cache of its own: its views are of this seed, and an interrupted run's are not kept.
        shutil.rmtree(self._cache(f"{name}-{seed}"), ignore_errors=True)
        return start_training(self._folder(name, seed), self._recipe(name, seed))

    def finish(self, name: str, seed: int, command: Command) -> dict[str, Any]:
        """Take in a run that ended, and write the JSON."""
        variant, process_seconds = VARIANTS[name], command.wait()
        result = read_result(self._folder(name, seed))
        scored = self._prepared.facts["score"]["pass_seconds"] if variant.needs_scores else 0.0
        score_seconds = scored + self._select_seconds.get(f"{name}-{seed}", 0.0)
        run = {
            "name": name,
            "seed": seed,
            "keep_ratio": variant.keep_ratio or 1.0,
            "strategy": None if variant.keep_ratio is None else variant.strategy,
            "metric": variant.metric,
            "reshaping": variant.reshaping,
            "needs_scores": variant.needs_scores,
            "score_seconds": score_seconds,
            "process_seconds": process_seconds,
            "total_seconds": score_seconds + process_seconds,
            "commit": commit(),
            **{key: result[key] for key in KEPT_OF_RESULT},
        }
        self.runs.append(run)
        self._write()
        return run

    def measure_in_turn(self) -> None:
        """Measure steps, start-up and scoring of all cells that ran, unless that was done."""
        names = list(dict.fromkeys(run["name"] for run in self.runs))
        if not names or (self._in_turn is not None and set(names) <= self._in_turn["runs"].keys()):
            return
        print("steps in turn ...", flush=True)
        turns = self._prepared.folder / "turns"
        runs: dict[str, dict[str, Any]] = {}
        for name in names:
            steps_of_epoch = min(
                run["steps"] // run["epochs"] for run in self.runs if run["name"] == name
            )
            epochs = -(-self._arguments.steps_in_turn // steps_of_epoch)
            runs[name] = self._recipe(name, 0) | {"schedule.epochs": epochs}
            runs[name]["run.validate_every"] = epochs
            if VARIANTS[name].is_cached:
                # One run fills a cache while the others work, one finds all of it.
                whole, empty = (self._cache(f"turns-{name}-{kind}") for kind in ("whole", "empty"))
                for cache in (whole, empty):
                    shutil.rmtree(cache, ignore_errors=True)
                views = {"data.num_views": epochs, "teacher.cache": empty}
                runs[name] |= views
                runs[f"{name}: cached"] = runs[name] | {"teacher.cache": whole}
                train_process(turns.with_name("fill"), runs[f"{name}: cached"])
        scorings = [
            self._prepared.score_again(self._arguments.teacher, self._arguments.device)
            for _ in range(SCORINGS_IN_TURN)
        ]
        self._in_turn = {
            "runs": steps_in_turn(turns, runs),
            "score_seconds": statistics.median(scorings),
            "scorings": scorings,
            "commit": commit(),
        }
        self._write()

    def _folder(self, name: str, seed: int) -> Path:
        return self._prepared.folder / "runs" / f"{name}-{seed}".replace("/", "over")

    def _cache(self, name: str) -> Path:
        folder = self._prepared.folder / "caches"
        folder.mkdir(exist_ok=True)
        return folder / name.replace("/", "over")

    def _recipe(self, name: str, seed: int) -> dict[str, Any]:
        """Settings of a student; makes its subset."""
        variant, asked, prepared = VARIANTS[name], self._arguments, self._prepared
        epochs = max(1, round(asked.epochs * variant.epochs_share))
        settings = {
            **prepared.betons(),
            "student.network": asked.student,
            "teacher.network": asked.teacher,
            "teacher.checkpoint": prepared.teacher,
            "schedule.epochs": epochs,
            "run.name": name,
            "run.seed": seed,
            "run.device": asked.device,
            # The last epoch alone: the best one would be chosen on the test set.
            "run.validate_every": epochs,
            "loss.reshaping": "class_std" if variant.reshaping else "none",
            **variant.settings,
        }
        if asked.device == "cpu":
            settings["data.num_workers"] = 1
        if variant.is_cached:
            settings["data.num_views"] = NUM_VIEWS
            settings["teacher.cache"] = self._cache(f"{name}-{seed}")
        if variant.keep_ratio is not None:
            key = f"{name}-{seed}"
            settings["data.subset"], self._select_seconds[key] = prepared.select(
                key,
                keep_ratio=variant.keep_ratio,
                strategy=variant.strategy,
                metric=variant.metric,
                seed=seed,
            )
        return settings

    def _settings(self) -> dict[str, Any]:
        """What must be the same for runs to stand in one table."""
        left_out = ("images", "name", "work", "restart", "variants", "seeds", "teacher_checkpoint")
        left_out += ("processes", "only", "reduced", "steps_in_turn")
        return {key: v for key, v in vars(self._arguments).items() if key not in left_out}

    def _write(self) -> None:
        """Write everything that is known so far."""
        facts = self._prepared.facts
        write_result(
            self._name,
            {
                "question": "accuracy and cost of distilling on some rows, against all of them",
                "settings": self._settings(),
                "reduced": self._arguments.reduced or (self._earlier or {}).get("reduced"),
                "prepared": facts,
                "chance": 1 / facts["convert"]["classes"],
                "teacher": {
                    "train_top1": facts["score"]["teacher_top1"],
                    "test_top1": facts["compile"]["teacher_top1"],
                },
                "in_turn": self._in_turn,
                **summarize(self.runs, self._in_turn),
                "runs": with_costs(self.runs, self._in_turn),
                "arithmetic": ARITHMETIC,
            },
        )


def inputs(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What was prepared that all runs of a table have in common."""
    return {
        "training images": facts["convert"].get("train_fingerprint"),
        "test images": facts["convert"].get("val_fingerprint"),
        "weights of the teacher": facts["teacher"].get("weights"),
    }


ARITHMETIC = (
    "cost_ratio = (steps x median step seconds in turn + score_seconds in turn, where scores are "
    "used, + startup_seconds in turn) / the same of full, seed by seed. A cached cell counts the "
    "images that went through the teacher at the median of a step that fills, the others at that "
    "of a step that finds all logits; later_cost_ratio is of a student that finds scores and a "
    "whole cache. total_over_full is by the wall clock, of runs beside whatever else ran."
)


def summarize(
    runs: Sequence[Mapping[str, Any]], in_turn: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Cells and contrasts, of the seeds that are whole: those that every one of CELLS has."""
    names = list(dict.fromkeys(run["name"] for run in runs))
    must = [name for name in names if name in CELLS] or names
    seeds = [{run["seed"] for run in runs if run["name"] == name} for name in must]
    whole = sorted(set.intersection(*seeds)) if seeds else []
    counted = [run for run in runs if run["seed"] in whole]
    return {
        "seeds": whole,
        "cells": {name: summarize_cell(name, counted, in_turn) for name in names if counted},
        "contrasts": compare(counted, CONTRASTS, margins=MARGINS),
    }


def with_costs(
    runs: Sequence[Mapping[str, Any]], in_turn: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    """The runs with their cost over that of `full` with the same seed, where that is known."""
    full = {run["seed"]: run for run in runs if run["name"] == "full"}
    known = {} if in_turn is None else in_turn["runs"]
    return [
        {
            **run,
            "cost_ratio": cost_seconds(run, in_turn) / cost_seconds(full[run["seed"]], in_turn)
            if in_turn is not None and run["seed"] in full and {run["name"], "full"} <= known.keys()
            else None,
        }
        for run in runs
    ]


def summarize_cell(
    name: str, runs: Sequence[Mapping[str, Any]], in_turn: Mapping[str, Any] | None
) -> dict[str, Any]:
    """One line of the table; what needs a cell that did not run, or the turns, is empty."""
    ours = {run["seed"]: run for run in runs if run["name"] == name}
    full = {run["seed"]: run for run in runs if run["name"] == "full"}
    both = [(run, full[seed]) for seed, run in ours.items() if seed in full]
    timed = both if in_turn is not None and name in in_turn["runs"] else []
    is_cached = in_turn is not None and f"{name}: cached" in in_turn["runs"]
    reached = [run["top1_last"] for run in ours.values()]
    return {
        "top1_last": mean_and_sd(reached) | {"half_width": half_width(reached)},
        "steps": mean_and_sd(run["steps"] for run in ours.values()),
        "cost_ratio": mean_and_sd(
            cost_seconds(a, in_turn) / cost_seconds(b, in_turn) for a, b in timed
        ),
        "later_cost_ratio": mean_and_sd(
            cost_seconds(a, in_turn, is_later=True) / cost_seconds(b, in_turn)
            for a, b in (timed if is_cached else [])
        ),
        "total_seconds": mean_and_sd(run["total_seconds"] for run in ours.values()),
        "total_over_full": mean_and_sd(a["total_seconds"] / b["total_seconds"] for a, b in both),
        "disturbed": sum(run["disturbed"] for run in ours.values()),
    }


def mean_and_sd(values: Iterable[float]) -> dict[str, Any]:
    """Mean, standard deviation (null for a single value) and count."""
    known = list(values)
    return {
        "mean": statistics.mean(known) if known else None,
        "sd": statistics.stdev(known) if len(known) > 1 else None,
        "n": len(known),
    }


if __name__ == "__main__":
    main()
