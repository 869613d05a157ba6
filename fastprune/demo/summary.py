"""What the demo found: a table, result.json and report.png."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from fastprune.artifacts.atomic import write_text
from fastprune.artifacts.scores import ScoreTable
from fastprune.artifacts.subset import Subset
from fastprune.distillation.result import Result
from fastprune.environment import describe_machine, describe_versions
from fastprune.report.comparison import KeptPicture, RunPicture, Sample, draw_comparison

_SAMPLES_PER_LINE = 10


@dataclass(frozen=True)
class StudentRun:
    """A student and what was paid before its training could begin.

    Attributes:
        name: "full", "medium" or "random".
        result: what its training cost and reached.
        score_seconds: spent on the teacher's pass and the selection; 0 for "full", which needs
            neither.
    """

    name: str
    result: Result
    score_seconds: float

    @property
    def paid_seconds(self) -> float:
        """Scoring and training, what the ratio to full compares."""
        return self.score_seconds + self.result.train_seconds


@dataclass(frozen=True)
class DemoResult:
    """Everything the demo found.

    Attributes:
        runs: the students; of every seed a full, a medium and a random one.
        table: the scores.
        kept: the medium subset.
        samples: caption -> images to show.
        step_seconds: seconds of every step, in order.
    """

    runs: Sequence[StudentRun]
    table: ScoreTable
    kept: Subset
    samples: dict[str, list[Sample]]
    step_seconds: dict[str, float]

    def ratio_to_full(self, run: StudentRun) -> float:
        """Scoring and training of a run over those of the full run with the same seed."""
        seed = run.result.seed
        full = next(r for r in self.runs if r.name == "full" and r.result.seed == seed)
        return run.paid_seconds / full.paid_seconds

    def save(self, folder: Path) -> None:
        """Write report.png and, last, result.json."""
        assert self.kept.metric is not None, "the subset was selected here"
        draw_comparison(
            folder / "report.png",
            [
                RunPicture(
                    name=run.name,
                    curve=run.result.curve,
                    score_seconds=run.score_seconds,
                    train_seconds=run.result.train_seconds,
                    other_seconds=run.result.total_seconds - run.result.train_seconds,
                )
                for run in self.runs
            ],
            KeptPicture(
                metric=self.kept.metric,
                scores=self.table.metric(self.kept.metric),
                kept=self.kept.rows,
                samples=self.samples,
            ),
        )
        fields = {
            "runs": [self._fields(run) for run in self.runs],
            "keep_ratio": self.kept.keep_ratio,
            "step_seconds": self.step_seconds,
            "machine": describe_machine(),
            "versions": describe_versions(),
        }
        write_text(folder / "result.json", json.dumps(fields, indent=2) + "\n")

    def _fields(self, run: StudentRun) -> dict[str, Any]:
        """One entry of `runs` in result.json."""
        result = run.result
        return {
            "name": run.name,
            "seed": result.seed,
            "rows": result.rows,
            "images_per_epoch": result.images_per_epoch,
            "epochs": result.epochs,
            "train_seconds": result.train_seconds,
            "score_seconds": run.score_seconds,
            "total_seconds": run.score_seconds + result.total_seconds,
            "ratio_to_full": self.ratio_to_full(run),
            "data_wait_share": result.data_wait_share,
            "top1_last": result.top1_last,
            "top1_best": result.top1_best,
        }


def result_table(result: DemoResult) -> Table:
    """The runs side by side, one line per kind; over several seeds mean ± standard deviation."""
    seeds = len({run.result.seed for run in result.runs})
    table = Table(caption=f"mean of {seeds} seeds ± sd" if seeds > 1 else None)
    table.add_column("run")
    for heading in (
        "images/epoch",
        "training, s",
        "scoring, s",
        "total, s",
        "ratio to full",
        "top-1 last, %",
        "top-1 best, %",
    ):
        table.add_column(heading, justify="right")
    for name in dict.fromkeys(run.name for run in result.runs):
        runs = [run for run in result.runs if run.name == name]
        table.add_row(
            name,
            f"{runs[0].result.images_per_epoch:,}",
            _mean([run.result.train_seconds for run in runs], 1),
            _mean([run.score_seconds for run in runs], 1),
            _mean([run.score_seconds + run.result.total_seconds for run in runs], 1),
            _mean([result.ratio_to_full(run) for run in runs], 3),
            _mean([100 * run.result.top1_last for run in runs], 1),
            _mean([100 * run.result.top1_best for run in runs], 1),
        )
    return table


def _mean(values: list[float], digits: int) -> str:
    """The mean, with ± the standard deviation where there are several values."""
    text = f"{statistics.mean(values):.{digits}f}"
    if len(values) < 2:
        return text
    return f"{text} ± {statistics.stdev(values):.{digits}f}"


def sample_rows(scores: NDArray[np.float32], kept: NDArray[np.int64]) -> dict[str, list[int]]:
    """Rows worth a look: the easiest and hardest of all, and an even walk through the kept ones.

    Args:
        scores: (N,) difficulty of every row.
        kept: (K,) kept rows.

    Returns:
        Caption -> at most ten rows.
    """
    order = np.argsort(scores, kind="stable")
    kept_order = kept[np.argsort(scores[kept], kind="stable")]
    steps = np.linspace(0, len(kept) - 1, min(_SAMPLES_PER_LINE, len(kept))).round().astype(int)
    return {
        "easiest": order[:_SAMPLES_PER_LINE].tolist(),
        "kept": kept_order[steps].tolist(),
        "hardest": order[::-1][:_SAMPLES_PER_LINE].tolist(),
    }
