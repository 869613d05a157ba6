"""What do students on half of the rows reach, and what do they cost, against one on all of them?

    python benchmarks/wallclock.py --images cifar10          # folders train/ and test/ in it

A teacher is trained once on all rows and scores them once, on training views. Then every variant
distills a student for every seed, each in a process of its own with the same set-up, seed by seed,
and within a seed in random order, so that a machine that slows down favors none. Accuracy is
compared within a budget: `full@E/2` takes as many steps on all rows as a half takes in all epochs,
and `infobatch@2E/3` about as many. The contrasts are fixed in `CONTRASTS`. The JSON is written
after every run, and the script continues where it was stopped.
"""

import argparse
import json
import os
import random
import shutil
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _contrasts import compare
from _harness import RESULTS, ROOT, commit, write_result
from _study import Preparation, refuse_other, train_process

from fastprune.costs import Cost, cost_ratio
from fastprune.environment import describe_machine

LONG_SCHEDULE = 100
KEPT_OF_RESULT = (
    "rows",
    "images_per_epoch",
    "epochs",
    "steps",
    "train_seconds",
    "startup_seconds",
    "validation_seconds",
    "wait_seconds",
    "teacher_seconds",
    "student_seconds",
    "optimizer_seconds",
    "checkpoint_seconds",
    "data_wait_share",
    "steady_train_seconds",
    "step_seconds_p10",
    "step_seconds_p50",
    "step_seconds_p90",
    "disturbed",
    "top1_last",
    "top1_best",
    "curve",
)


@dataclass(frozen=True)
class Variant:
    """A way to train the student.

    Attributes:
        keep_ratio: share of the rows; None for all, which the JSON calls 1.
        strategy: how they are chosen.
        metric: what they are ranked by; None where no difficulty is looked at.
        reshaping: whether the teacher's logits are reshaped by class.
        epochs_share: of the study's epochs.
        settings: further settings of the recipe.
    """

    keep_ratio: float | None = None
    strategy: str = "medium"
    metric: str | None = None
    reshaping: bool = False
    epochs_share: float = 1.0
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def needs_scores(self) -> bool:
        """Whether a pass of the teacher must come before."""
        return self.metric is not None or self.reshaping


VARIANTS = {
    "full": Variant(),
    "full@E/2": Variant(epochs_share=0.5),
    "full+reshape": Variant(reshaping=True),
    "random50": Variant(0.5, "random"),
    "medium50-centroid": Variant(0.5, "medium", "centroid"),
    "medium50-loss": Variant(0.5, "medium", "loss"),
    "random50+reshape": Variant(0.5, "random", reshaping=True),
    "medium50-centroid+reshape": Variant(0.5, "medium", "centroid", reshaping=True),
    "medium50-loss+reshape": Variant(0.5, "medium", "loss", reshaping=True),
    "random70": Variant(0.7, "random"),
    "medium70-centroid": Variant(0.7, "medium", "centroid"),
    "random30": Variant(0.3, "random"),
    "random30+reshape": Variant(0.3, "random", reshaping=True),
    "medium30-loss+reshape": Variant(0.3, "medium", "loss", reshaping=True),
    "full@3E/10": Variant(epochs_share=0.3),
    "hard50-loss": Variant(0.5, "hard", "loss"),
    "hard50-centroid": Variant(0.5, "hard", "centroid"),
    "easy50-centroid": Variant(0.5, "easy", "centroid"),
    "infobatch": Variant(settings={"pruning.rule": "infobatch"}),
    # It skips about a quarter of the rows: two thirds of the epochs have the steps of a half.
    "infobatch@2E/3": Variant(epochs_share=2 / 3, settings={"pruning.rule": "infobatch"}),
}

# The cells of the study: one budget, and `full` at twice that. The others are for --variants.
CELLS = (
    "full",
    "full@E/2",
    "full+reshape",
    "random50",
    "random50+reshape",
    "medium50-loss",
    "medium50-loss+reshape",
    "medium50-centroid+reshape",
    "hard50-loss",
    "infobatch@2E/3",
)
CONTRASTS = (
    ("medium50-loss+reshape", "random50"),
    ("medium50-loss+reshape", "random50+reshape"),
    ("medium50-loss+reshape", "infobatch@2E/3"),
    ("medium50-loss+reshape", "full@E/2"),
    ("full+reshape", "full"),
    ("medium30-loss+reshape", "random30"),
    ("medium30-loss+reshape", "random30+reshape"),
    ("medium30-loss+reshape", "full@3E/10"),
)


def main() -> None:
    arguments = parse()
    name = f"wallclock-{arguments.name}"
    work = arguments.work or ROOT / "build" / name
    if arguments.restart:
        shutil.rmtree(work, ignore_errors=True)
        (RESULTS / f"{name}.json").unlink(missing_ok=True)
    study = Study(arguments, name, work)
    study.prepare()
    for seed in range(arguments.seeds):
        # In another order for each seed: what runs first on a warm machine is chance.
        for variant in random.Random(seed).sample(arguments.variants, len(arguments.variants)):
            if not study.has(variant, seed):
                study.run(variant, seed)
    for contrast in compare(study.runs, CONTRASTS):
        print(contrast["sentence"])
    print(f"{len(study.runs)} runs -> {RESULTS / name}.json")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="has folders train and test")
    parser.add_argument("--name", default="cifar10", help="of the result: wallclock-NAME.json")
    parser.add_argument("--per-class", type=int, default=600, help="training images; 0 for all")
    parser.add_argument("--val-per-class", type=int, default=0, help="test images; 0 for all")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--validate-every", type=int, default=8)
    parser.add_argument("--teacher", default="resnet20", help="network of the teacher")
    parser.add_argument("--teacher-checkpoint", type=Path, help="its weights; default: trained")
    parser.add_argument("--teacher-epochs", type=int, default=16)
    parser.add_argument("--student", default="resnet8", help="network of the students")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, help="folder for betons and runs; default: build/")
    parser.add_argument("--restart", action="store_true", help="forget what was measured")
    parser.add_argument(
        "--variants", type=known_variants, default=",".join(CELLS), metavar="NAME,NAME"
    )
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
        self._prepared = Preparation(work)
        self.runs: list[dict[str, Any]] = []
        self._path = RESULTS / f"{name}.json"
        self._earlier: dict[str, Any] | None = None
        if self._path.exists():
            self._earlier = json.loads(self._path.read_text(encoding="utf-8"))
            ours = {"settings": self._settings(), "machine": describe_machine()}
            refuse_other(self._earlier, ours, made=self._path)
            self.runs = self._earlier["runs"]

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

    def run(self, name: str, seed: int) -> None:
        """Distill a student, and write the JSON."""
        variant, asked, prepared = VARIANTS[name], self._arguments, self._prepared
        print(f"{name}, seed {seed} ...", flush=True)
        settings = {
            **prepared.betons(),
            "student.network": asked.student,
            "teacher.network": asked.teacher,
            "teacher.checkpoint": prepared.teacher,
            "schedule.epochs": max(1, round(asked.epochs * variant.epochs_share)),
            "run.name": name,
            "run.seed": seed,
            "run.device": asked.device,
            "run.validate_every": asked.validate_every,
            "loss.reshaping": "class_std" if variant.reshaping else "none",
            **variant.settings,
        }
        select_seconds = 0.0
        if variant.keep_ratio is not None:
            settings["data.subset"], select_seconds = prepared.select(
                f"{name}-{seed}",
                keep_ratio=variant.keep_ratio,
                strategy=variant.strategy,
                metric=variant.metric,
                seed=seed,
            )
        result, process_seconds = train_process(
            prepared.folder / "runs" / f"{name}-{seed}", settings
        )
        scored = prepared.facts["score"]["pass_seconds"] if variant.needs_scores else 0.0
        score_seconds = scored + select_seconds
        self.runs.append(
            {
                "name": name,
                "seed": seed,
                "keep_ratio": variant.keep_ratio or 1.0,
                "strategy": None if variant.keep_ratio is None else variant.strategy,
                "metric": variant.metric,
                "reshaping": variant.reshaping,
                "score_seconds": score_seconds,
                "process_seconds": process_seconds,
                "total_seconds": score_seconds + process_seconds,
                "commit": commit(),
                **{key: result[key] for key in KEPT_OF_RESULT if key in result},
            }
        )
        self._write()

    def _settings(self) -> dict[str, Any]:
        """What must be the same for runs to stand in one table."""
        left_out = ("images", "name", "work", "restart", "variants", "seeds", "teacher_checkpoint")
        settings = {key: v for key, v in vars(self._arguments).items() if key not in left_out}
        threads = {key: os.environ.get(key) for key in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")}
        return settings | {key: value for key, value in threads.items() if value is not None}

    def _write(self) -> None:
        """Write everything that is known so far."""
        facts = self._prepared.facts
        result = {
            "question": "accuracy and cost of distilling on some of the rows, against all of them",
            "settings": self._settings(),
            "prepared": facts,
            "chance": 1 / facts["convert"]["classes"],
            "runs": self.runs,
            "teacher": {
                "train_top1": facts["score"]["teacher_top1"],
                "test_top1": facts["compile"]["teacher_top1"],
            },
            "cells": summarize(self.runs),
            "contrasts": compare(self.runs, CONTRASTS),
            "arithmetic": (
                "cost_ratio = (steady_train_seconds + score_seconds + startup_seconds) / the same "
                "of full; with_scoring_at_100_epochs = (score_seconds + 100 * train_seconds / "
                "epochs) / (100 * train_seconds of full / epochs); both seed by seed"
            ),
        }
        write_result(self._name, result)


def inputs(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What was prepared that all runs of a table have in common."""
    return {
        "training images": facts["convert"].get("train_fingerprint"),
        "test images": facts["convert"].get("val_fingerprint"),
        "weights of the teacher": facts["teacher"].get("weights"),
    }


def summarize(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds of every variant, and ratios seed by seed."""
    names = dict.fromkeys(run["name"] for run in runs)
    return {name: summarize_variant(name, runs) for name in names}


def summarize_variant(name: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One line of the table."""
    ours = {run["seed"]: run for run in runs if run["name"] == name}
    full = {run["seed"]: run for run in runs if run["name"] == "full"}
    baseline = {run["seed"]: run for run in runs if run["name"] == "random50"}
    both = [(run, full[seed]) for seed, run in ours.items() if seed in full]
    keys = ("top1_last", "top1_best", "train_seconds", "score_seconds", "total_seconds")
    keys += ("data_wait_share",)
    return {
        **{key: mean_and_sd(run[key] for run in ours.values()) for key in keys},
        "cost_ratio": mean_and_sd(
            cost_ratio(cost(a), cost(b))
            for a, b in both
            if "steady_train_seconds" in a and "steady_train_seconds" in b
        ),
        "disturbed": sum(run.get("disturbed", False) for run in ours.values()),
        "train_over_full": mean_and_sd(a["train_seconds"] / b["train_seconds"] for a, b in both),
        "with_scoring_over_full": mean_and_sd(
            (a["score_seconds"] + a["train_seconds"]) / b["train_seconds"] for a, b in both
        ),
        "with_scoring_at_100_epochs": mean_and_sd(at_long_schedule(a, b) for a, b in both),
        "total_over_full": mean_and_sd(a["total_seconds"] / b["total_seconds"] for a, b in both),
        "top1_last_over_random50": mean_and_sd(
            run["top1_last"] - baseline[seed]["top1_last"]
            for seed, run in ours.items()
            if seed in baseline
        ),
    }


def cost(run: Mapping[str, Any]) -> Cost:
    """What a student cost until it was trained."""
    return Cost(run["steady_train_seconds"], run["score_seconds"], run["startup_seconds"])


def at_long_schedule(ours: Mapping[str, Any], full: Mapping[str, Any]) -> float:
    """Scoring and training over the full run's training, both for 100 epochs."""
    epoch, full_epoch = (run["train_seconds"] / run["epochs"] for run in (ours, full))
    return (ours["score_seconds"] + LONG_SCHEDULE * epoch) / (LONG_SCHEDULE * full_epoch)


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
