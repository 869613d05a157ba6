"""One picture of several runs: what they reached, what they cost, and what was kept."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from numpy.typing import NDArray

from fastprune.artifacts.atomic import atomic_path

_COLORS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860")
_GREY = "#bbbbbb"


@dataclass(frozen=True)
class RunPicture:
    """What the picture shows of a run.

    Attributes:
        name: legend entry.
        curve: one dict per validation, with train_seconds and top1 in [0, 1].
        score_seconds: spent on scoring and selecting before the run began.
        train_seconds: spent in epochs.
        other_seconds: start-up and validation.
    """

    name: str
    curve: Sequence[Mapping[str, float]]
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
    """What the picture shows of a selection.

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


def draw_comparison(path: str | Path, runs: Sequence[RunPicture], kept: KeptPicture) -> None:
    """Draw accuracy over time, seconds by use, the kept window, and sample pictures as a PNG.

    Args:
        path: the PNG to write.
        runs: at least one; repeated names share a colour.
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
    """The runs' names in order, each once."""
    return list(dict.fromkeys(run.name for run in runs))


def _draw_accuracy(axes: Axes, runs: Sequence[RunPicture], colors: Mapping[str, str]) -> None:
    """Top-1 over the seconds that were paid for it."""
    labelled = set()
    for run in runs:
        seconds = [run.score_seconds + point["train_seconds"] for point in run.curve]
        label = None if run.name in labelled else run.name
        labelled.add(run.name)
        top1 = [100 * point["top1"] for point in run.curve]
        axes.plot(seconds, top1, marker=".", color=colors[run.name], label=label)
    axes.set_xlabel("seconds of scoring and training")
    axes.set_ylabel("top-1 on the validation set, %")
    axes.set_title("Accuracy over time")
    axes.legend()
    axes.grid(alpha=0.3)


def _draw_seconds(axes: Axes, runs: Sequence[RunPicture], colors: Mapping[str, str]) -> None:
    """What every run's seconds were spent on."""
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
        {"color": _GREY},
    ]
    for (label, values), style in zip(parts.items(), styles, strict=True):
        axes.bar(names, values, bottom=bottom, label=label, **style)
        bottom += np.array(values)
    axes.set_ylabel("seconds")
    axes.set_title("What it cost")
    axes.legend()


def _draw_histogram(axes: Axes, kept: KeptPicture) -> None:
    """The distribution of the metric, with the kept rows in it."""
    bins = np.histogram_bin_edges(kept.scores, bins=50).tolist()
    axes.hist(kept.scores, bins=bins, color=_GREY, label="all rows")
    axes.hist(kept.scores[kept.kept], bins=bins, color=_COLORS[1], label="kept")
    axes.set_xlabel(f"{kept.metric}, larger is harder")
    axes.set_ylabel("rows")
    axes.set_title("What was kept")
    axes.legend()


def _draw_samples(sheet: SubFigure, kept: KeptPicture) -> None:
    """One line of pictures per caption, each with its label and score."""
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
