"""How benchmarks/decode.py reads: a line of the README's table, and a chart."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_OURS, _PEERS = "#4c72b0", "#9aa5b1"


def decode_line(result: Mapping[str, Any]) -> str:
    """Our views per second over FFCV's functions with the most threads, in both layouts."""
    threads = max(result["threads"], key=int)
    ratios = result["threads"][threads]["ratios"]
    original, fast = (
        ratios[f"{ours} over stock ffcv"]["median"] for ours in ("ours", "ours, restart rows")
    )
    return (
        f"decoding views from memory on {threads} threads, over FFCV's functions | "
        f"{original:.2f}×, {fast:.2f}× with restart rows"
    )


def decode_in_readme(result: Mapping[str, Any]) -> str:
    """The chart, with what it shows."""
    threads = max(result["threads"], key=int)
    return f"![Views of 224 pixels per second on {threads} threads](docs/images/decode.png)\n"


def draw_decode(result: Mapping[str, Any], path: Path) -> None:
    """A bar of views per second for each candidate, with the most threads, as a PNG."""
    threads = max(result["threads"], key=int)
    measured = result["threads"][threads]["images_per_second"]
    names = sorted(measured, key=lambda name: -measured[name]["median"])
    figure = Figure(figsize=(8, 0.9 + 0.32 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    rates = [measured[name]["median"] for name in names]
    colors = [_OURS if name.startswith("ours") else _PEERS for name in names]
    bars = axes.barh(names, rates, color=colors)
    axes.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"views of 224 pixels per second, {threads} threads, median")
    figure.savefig(path, format="png", dpi=110, metadata={"Software": None})
