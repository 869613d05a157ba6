"""Pictures of a score table: charts of the metric, classes and ranks; thumbnails."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastprune.base.errors import BetonError
from fastprune.beton.beton import Beton
from fastprune.beton.layout import JPG
from fastprune.report.charts import new_figure, png_of
from fastprune.rows.score_table import ScoreTable
from fastprune.selection.subsets import ranks

_ALL, _KEPT = "#c8c8c8", "#4c72b0"
_BINS = 80
# A handful of outliers would squeeze all other bars to the left.
_TOP_PERCENTILE = 99.9
# More class names do not fit under a chart of eight inches.
_MOST_BARS = 60

THUMBNAIL_SIDE = 128


def histogram_png(scores: NDArray[np.float32], kept: NDArray[np.int64] | None, name: str) -> bytes:
    """Draw how often each score occurs, and how many of these rows are kept.

    Args:
        scores: (N,) difficulty of every row.
        kept: (K,) rows, or None.
        name: of the metric.

    Returns:
        A PNG. The few scores above the 99.9th percentile are in the last bar.
    """
    figure = new_figure(8, 3.2)
    axes = figure.subplots()
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
    return png_of(figure)


def class_counts_png(
    counts: NDArray[np.int64], kept_counts: NDArray[np.int64], names: list[str]
) -> bytes:
    """Draw the rows of every class, and how many of them are kept.

    Args:
        counts: (C,) rows per class.
        kept_counts: (C,) kept rows per class.
        names: C class names, shown where there are few.
    """
    figure = new_figure(8, 2.8)
    axes = figure.subplots()
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
    return png_of(figure)


def correlation_png(table: ScoreTable, names: list[str]) -> bytes:
    """Draw how alike the metrics rank the rows: Spearman's correlation of each pair.

    Args:
        table: the scores.
        names: the metrics to compare.
    """
    correlations = rank_correlations(table, names)
    side = 1.6 + 0.6 * len(names)
    figure = new_figure(side + 1, side)
    axes = figure.subplots()
    image = axes.imshow(correlations, vmin=-1, vmax=1, cmap="RdBu_r")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    for (i, j), value in np.ndenumerate(correlations):
        color = "white" if abs(value) > 0.6 else "black"
        axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=color, fontsize=8)
    figure.colorbar(image, ax=axes, shrink=0.8)
    return png_of(figure)


def rank_correlations(table: ScoreTable, names: list[str]) -> NDArray[np.float64]:
    """Compute Spearman's correlation of each pair of metrics, (M, M); 0 beside a constant one.

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


def thumbnail_png(beton: Beton, row: int) -> bytes:
    """Draw one image of a beton at most THUMBNAIL_SIDE pixels wide and high, as a PNG.

    Small images are enlarged to whole multiples, so that their pixels stay squares.
    """
    image = read_image(beton, row)
    longest = max(image.size)
    if longest > THUMBNAIL_SIDE:
        scale = THUMBNAIL_SIDE / longest
        width, height = (max(1, round(side * scale)) for side in image.size)
        small = image.resize((width, height), Image.Resampling.LANCZOS)
    else:
        factor = THUMBNAIL_SIDE // longest
        size = (image.width * factor, image.height * factor)
        small = image.resize(size, Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    return buffer.getvalue()


def read_image(beton: Beton, row: int) -> Image.Image:
    """Decode one whole image of a beton, RGB.

    Raises:
        BetonError: the image cannot be decoded.
    """
    data: NDArray[np.uint8] = beton.image_bytes(row)
    if beton.modes[row] == JPG:
        try:
            return Image.open(io.BytesIO(data.tobytes())).convert("RGB")
        except OSError as error:
            raise BetonError(
                f"row {row:,} of {beton.path} cannot be decoded. See what is damaged: "
                f"fastprune check {beton.path} --deep"
            ) from error
    return Image.fromarray(data.reshape(beton.heights[row], beton.widths[row], 3))
