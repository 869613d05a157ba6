"""Charts of a score table: the metric and what is kept of it, classes, how metrics agree."""

import io

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fastprune.artifacts.scores import ScoreTable
from fastprune.selection.blend import ranks

_ALL, _KEPT = "#c8c8c8", "#4c72b0"
_BINS = 80
_TOP_PERCENTILE = 99.9
_MOST_BARS = 60


def histogram_png(scores: NDArray[np.float32], kept: NDArray[np.int64] | None, name: str) -> bytes:
    """How often each score occurs, and how many of those rows are kept.

    Args:
        scores: (N,) difficulty of every row.
        kept: (K,) rows, or None.
        name: of the metric.

    Returns:
        A PNG. The few scores above the 99.9th percentile are in the last bar.
    """
    figure, axes = _figure(8, 3.2)
    low, high = float(scores.min()), float(np.percentile(scores, _TOP_PERCENTILE))
    edges = np.linspace(low, high if high > low else low + 1, _BINS + 1)
    clipped = np.minimum(scores, edges[-1])
    bins = edges.tolist()
    axes.hist(clipped, bins, color=_ALL, label=f"all {len(scores):,} rows")
    if kept is not None:
        axes.hist(clipped[kept], bins, color=_KEPT, label=f"{len(kept):,} kept")
    axes.set_xlabel(f"{name} (larger is harder)")
    axes.set_ylabel("rows")
    axes.legend()
    return _png(figure)


def class_counts_png(
    counts: NDArray[np.int64], kept_counts: NDArray[np.int64], names: list[str]
) -> bytes:
    """Rows of every class, and how many of them are kept.

    Args:
        counts: (C,) rows per class.
        kept_counts: (C,) kept rows per class.
        names: C class names, shown where there are few.

    Returns:
        A PNG.
    """
    figure, axes = _figure(8, 2.8)
    places = np.arange(len(counts))
    if len(counts) <= _MOST_BARS:
        axes.bar(places, counts, color=_ALL, label="all")
        axes.bar(places, kept_counts, color=_KEPT, label="kept")
        axes.set_xticks(places, names, rotation=45, ha="right", fontsize=8)
    else:
        axes.fill_between(places, counts, step="mid", color=_ALL, label="all")
        axes.fill_between(places, kept_counts, step="mid", color=_KEPT, label="kept")
        axes.set_xlabel("class")
    axes.set_ylabel("rows")
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return _png(figure)


def correlation_png(table: ScoreTable, names: list[str]) -> bytes:
    """How alike the metrics rank the rows: Spearman's correlation of each pair.

    Args:
        table: the scores.
        names: the metrics to compare.

    Returns:
        A PNG.
    """
    correlations = rank_correlations(table, names)
    side = 1.6 + 0.6 * len(names)
    figure, axes = _figure(side + 1, side)
    image = axes.imshow(correlations, vmin=-1, vmax=1, cmap="RdBu_r")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    for (i, j), value in np.ndenumerate(correlations):
        color = "white" if abs(value) > 0.6 else "black"
        axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=color, fontsize=8)
    figure.colorbar(image, ax=axes, shrink=0.8)
    return _png(figure)


def rank_correlations(table: ScoreTable, names: list[str]) -> NDArray[np.float64]:
    """Spearman's correlation of each pair of metrics, (M, M); 0 beside a metric that is constant.

    Equal scores share the mean of their ranks.
    """
    centered = []
    for name in names:
        places = ranks(table.metric(name))
        places -= places.mean()
        length = np.linalg.norm(places)
        centered.append(places / length if length > 0 else places)
    stacked = np.stack(centered)
    correlations: NDArray[np.float64] = stacked @ stacked.T
    np.fill_diagonal(correlations, 1.0)
    return correlations


def _figure(width_inches: float, height_inches: float) -> tuple[Figure, Axes]:
    """A figure that no window shows."""
    figure = Figure(figsize=(width_inches, height_inches), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _png(figure: Figure) -> bytes:
    """The figure as PNG bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
