"""Figures without a display, their bytes and colors: the base of every chart."""

import io

from fastprune.base.errors import importing

with importing("matplotlib", extra="report", purpose="a report"):
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

# matplotlib's palettes: ten colors that differ clearly, twenty in pairs of dark and light.
_TEN = 10


def new_figure(width_inches: float, height_inches: float) -> Figure:
    """Make an empty figure."""
    # A canvas of its own: pyplot would look for a display and keep every figure alive.
    figure = Figure(figsize=(width_inches, height_inches), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png_of(figure: Figure) -> bytes:
    """Render a figure as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def add_legend(figure: Figure) -> None:
    """Put the legend above the axes, where a phone shows it without scrolling."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=5, fontsize=8)


def colors(count: int) -> list[object]:
    """Choose a color for each of `count` groups."""
    palette = mpl.colormaps["tab10" if count <= _TEN else "tab20"]
    return [palette(number % palette.N) for number in range(count)]


def plain(name: str) -> str:
    """Escape a name: matplotlib reads text between dollar signs as a formula."""
    return name.replace("$", r"\$")
