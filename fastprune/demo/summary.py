"""The demo's results: a table on the terminal, result.json and report.png."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from numpy.typing import NDArray
from rich.table import Table

from fastprune.base.environment import describe_machine, describe_versions
from fastprune.base.files import atomic_path, write_text
from fastprune.distillation.costs import Cost, cost_ratio
from fastprune.distillation.result import Result
from fastprune.rows.score_table import ScoreTable
from fastprune.rows.subset import Subset

_SAMPLES_PER_LINE = 10
_COLORS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860")
_GRAY = "#bbbbbb"


@dataclass(frozen=True)
class RunPicture:
    """A run in the picture.

    Attributes:
        name: legend entry.
        cost_ratio: its cost over the full run's.
        top1: accuracy in [0, 1] after the last epoch.
        score_seconds: spent on scoring and selecting before the run began.
        train_seconds: spent in epochs.
        other_seconds: start-up and validation.
    """

    name: str
    cost_ratio: float
    top1: float
    score_seconds: float
    train_seconds: float
    other_seconds: float


@dataclass(frozen=True)
class Sample:
    """An image worth a look.

    Attributes:
        pixels: (H, W, 3) uint8.
        label: name of the class that the row is labelled with.
        score: its difficulty.
    """

    pixels: NDArray[np.uint8]
    label: str
    score: float


@dataclass(frozen=True)
class KeptPicture:
    """A selection in the picture.

    Attributes:
        metric: name of the difficulty.
        scores: (N,) difficulty of every row.
        kept: (K,) rows that were kept.
        samples: caption -> images to show in a line.
    """

    metric: str
    scores: NDArray[np.float32]
    kept: NDArray[np.int64]
    samples: Mapping[str, Sequence[Sample]]


@dataclass(frozen=True)
class StudentRun:
    """A student, and the cost before its training could begin.

    Attributes:
        name: of its kind, "full" among them.
        result: cost and accuracy of its training.
        score_seconds: spent on the teacher's pass and the selection; 0 where neither is needed.
    """

    name: str
    result: Result
    score_seconds: float

    @property
    def paid_seconds(self) -> float:
        """Scoring and training by the wall clock, which the ratio to full compares."""
        return self.score_seconds + self.result.train_seconds


@dataclass(frozen=True)
class DemoResult:
    """Everything the demo measured.

    Attributes:
        runs: the students; of every seed one of each kind.
        table: the scores.
        kept: the medium subset.
        samples: caption -> images to show.
        step_seconds: seconds of every step, in order.
        wrong_label_share: share in [0, 1] of the training images that carry a wrong label on
            purpose; 0 for the user's own.
    """

    runs: Sequence[StudentRun]
    table: ScoreTable
    kept: Subset
    samples: dict[str, list[Sample]]
    step_seconds: dict[str, float]
    wrong_label_share: float = 0.0

    def ratio_to_full(self, run: StudentRun) -> float:
        """Divide a run's seconds by the wall clock by the full run's with the same seed."""
        return run.paid_seconds / self._full(run).paid_seconds

    def cost_ratio(self, run: StudentRun) -> float:
        """Divide a run's cost by the full run's with the same seed."""
        return cost_ratio(self._cost(run), self._cost(self._full(run)))

    def _cost(self, run: StudentRun) -> Cost:
        startup_seconds = run.result.startup_seconds
        return Cost(self.steady_train_seconds(run), run.score_seconds, startup_seconds)

    def steady_train_seconds(self, run: StudentRun) -> float:
        """Seconds of a run's steps at the pace of the quietest run that does the same in a step.

        These runs are so short that one may pass while the machine is busy from end to end, where
        its own median would be of no use. Steps with a cache do other work: they keep their own.
        """
        if run.result.teacher_forwards_saved:
            return run.result.steady_train_seconds
        alike = [other.result for other in self.runs if not other.result.teacher_forwards_saved]
        return run.result.steps * min(r.steady_train_seconds / r.steps for r in alike)

    @property
    def disturbed(self) -> list[str]:
        """Names of the runs during which something else ran on the machine."""
        return [f"{run.name}, seed {run.result.seed}" for run in self.runs if run.result.disturbed]

    def _full(self, run: StudentRun) -> StudentRun:
        """The run on all rows with the same seed."""
        seed = run.result.seed
        return next(r for r in self.runs if r.name == "full" and r.result.seed == seed)

    def save(self, folder: Path) -> None:
        """Write report.png and, last, result.json: where it is, everything is."""
        assert self.kept.metric is not None, "the subset was selected here"
        draw_comparison(
            folder / "report.png",
            [
                RunPicture(
                    name=run.name,
                    cost_ratio=self.cost_ratio(run),
                    # The pictures have labels, and the last epoch is validated.
                    top1=run.result.top1_last or 0.0,
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
            "wrong_label_share": self.wrong_label_share,
            "machine": describe_machine(),
            "versions": describe_versions(),
        }
        write_text(folder / "result.json", json.dumps(fields, indent=2) + "\n")

    def _fields(self, run: StudentRun) -> dict[str, Any]:
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
            "cost_ratio": self.cost_ratio(run),
            "ratio_to_full": self.ratio_to_full(run),
            "steady_train_seconds": self.steady_train_seconds(run),
            "startup_seconds": result.startup_seconds,
            "disturbed": result.disturbed,
            "data_wait_share": result.data_wait_share,
            "top1_last": result.top1_last,
            "top1_best": result.top1_best,
        }


def result_table(result: DemoResult) -> Table:
    """Lay the runs side by side, one line per kind; over several seeds mean ± sd."""
    seeds = len({run.result.seed for run in result.runs})
    remarks = [
        "Cost: steps at the median pace of the quietest run alike, scoring and start-up, over "
        "those of full."
    ]
    if result.wrong_label_share:
        share = f"{result.wrong_label_share:.0%}"
        remarks.append(f"{share} of the training pictures carry a wrong label on purpose.")
    if seeds > 1:
        remarks.append(f"Mean of {seeds} seeds ± sd.")
    if result.disturbed:
        busy = "; ".join(result.disturbed)
        remarks.append(f"The machine was busy with something else ({busy}): mistrust seconds.")
    table = Table(caption=" ".join(remarks), caption_justify="left")
    table.add_column("run")
    for heading in (
        "images/epoch",
        "training, s",
        "scoring, s",
        "total, s",
        "cost ratio",
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
            _mean([result.cost_ratio(run) for run in runs], 3),
            # Its runs have labels, so they are validated.
            _mean([100 * (run.result.top1_last or 0.0) for run in runs], 1),
            _mean([100 * (run.result.top1_best or 0.0) for run in runs], 1),
        )
    return table


def _mean(values: list[float], digits: int) -> str:
    """The mean, with ± the standard deviation where there are several values."""
    text = f"{statistics.mean(values):.{digits}f}"
    if len(values) < 2:
        return text
    return f"{text} ± {statistics.stdev(values):.{digits}f}"


def sample_rows(scores: NDArray[np.float32], kept: NDArray[np.int64]) -> dict[str, list[int]]:
    """Choose rows worth a look: the easiest and hardest, and an even walk through the kept ones.

    Args:
        scores: (N,) difficulty of every row.
        kept: (K,) kept rows.

    Returns:
        Caption -> at most ten rows.
    """
    # Ties break by row, as in a selection.
    order = np.argsort(scores, kind="stable")
    kept_order = kept[np.argsort(scores[kept], kind="stable")]
    steps = np.linspace(0, len(kept) - 1, min(_SAMPLES_PER_LINE, len(kept))).round().astype(int)
    return {
        "easiest": order[:_SAMPLES_PER_LINE].tolist(),
        "kept": kept_order[steps].tolist(),
        "hardest": order[::-1][:_SAMPLES_PER_LINE].tolist(),
    }


def draw_comparison(path: str | Path, runs: Sequence[RunPicture], kept: KeptPicture) -> None:
    """Draw accuracy over cost, seconds by use, the kept window, and sample pictures as a PNG.

    Args:
        path: the PNG to write.
        runs: at least one; repeated names share a color.
        kept: the selection that the runs are about.

    Raises:
        ArtifactError: the file cannot be written.
    """
    figure = Figure(figsize=(12, 9), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 1)
    charts: SubFigure = figure.add_subfigure(grid[0])
    sheet: SubFigure = figure.add_subfigure(grid[1])
    accuracy, seconds, histogram = charts.subplots(1, 3)
    colors = {name: _COLORS[i % len(_COLORS)] for i, name in enumerate(_names(runs))}
    _draw_accuracy(accuracy, runs, colors)
    _draw_seconds(seconds, runs, colors)
    _draw_histogram(histogram, kept)
    _draw_samples(sheet, kept)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _names(runs: Sequence[RunPicture]) -> list[str]:
    return list(dict.fromkeys(run.name for run in runs))


def _draw_accuracy(axes: Axes, runs: Sequence[RunPicture], colors: Mapping[str, str]) -> None:
    for name, color in colors.items():
        ours = [run for run in runs if run.name == name]
        reached = [100 * run.top1 for run in ours]
        axes.plot([run.cost_ratio for run in ours], reached, "o", color=color, label=name)
    axes.set_xlim(left=0)
    axes.set_xlabel("cost, over that of full")
    axes.set_ylabel("top-1 after the last epoch, %")
    axes.set_title("Accuracy over cost: a dot is a run")
    axes.legend()
    axes.grid(alpha=0.3)


def _draw_seconds(axes: Axes, runs: Sequence[RunPicture], colors: Mapping[str, str]) -> None:
    names = _names(runs)
    parts = {
        "training": [np.mean([r.train_seconds for r in runs if r.name == n]) for n in names],
        "scoring": [np.mean([r.score_seconds for r in runs if r.name == n]) for n in names],
        "start-up, validation": [
            np.mean([r.other_seconds for r in runs if r.name == n]) for n in names
        ],
    }
    bottom = np.zeros(len(names))
    styles: list[dict[str, Any]] = [
        {"color": [colors[name] for name in names]},
        {"color": [colors[name] for name in names], "hatch": "//", "edgecolor": "white"},
        {"color": _GRAY},
    ]
    for (label, values), style in zip(parts.items(), styles, strict=True):
        axes.bar(names, values, bottom=bottom, label=label, **style)
        bottom += np.array(values)
    axes.set_ylabel("seconds by the clock")
    axes.tick_params(axis="x", labelsize=7)
    axes.set_title("Where the time went")
    axes.legend()


def _draw_histogram(axes: Axes, kept: KeptPicture) -> None:
    bins = np.histogram_bin_edges(kept.scores, bins=50).tolist()
    axes.hist(kept.scores, bins=bins, color=_GRAY, label="all rows")
    axes.hist(kept.scores[kept.kept], bins=bins, color=_COLORS[1], label="kept")
    axes.set_xlabel(f"{kept.metric}, larger is harder")
    axes.set_ylabel("rows")
    axes.set_title("What was kept")
    axes.legend()


def _draw_samples(sheet: SubFigure, kept: KeptPicture) -> None:
    columns = max(len(pictures) for pictures in kept.samples.values())
    grid = sheet.subplots(len(kept.samples), columns, squeeze=False)
    for row, (caption, pictures) in enumerate(kept.samples.items()):
        for column in range(columns):
            axes = grid[row, column]
            axes.axis("off")
            if column < len(pictures):
                sample = pictures[column]
                axes.imshow(sample.pixels)
                # A class name may hold dollar signs; it is no formula.
                axes.set_title(f"{sample.label}\n{sample.score:.3g}", fontsize=7, parse_math=False)
        grid[row, 0].text(
            -0.15, 0.5, caption, transform=grid[row, 0].transAxes, ha="right", va="center"
        )
