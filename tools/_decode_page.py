"""How benchmarks/decode.py reads: a line of the README's table, and a chart."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_OURS, _PEERS = "#4c72b0", "#9aa5b1"
_DECODERS = {
    "spdl": "SPDL",
    "torchvision": "torchvision",
    "dali cpu": "DALI (CPU)",
    "stock ffcv": "FFCV",
    "ours": "fastprune",
    "ours, restart rows": "fastprune, fast layout",
}


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


def decode_in_docs(result: Mapping[str, Any]) -> str:
    """The chart, with what it shows."""
    del result
    return "![Views of 224 pixels per second and core](images/decode.png)\n"


def draw_decode(result: Mapping[str, Any], path: Path) -> None:
    """Views per second of one thread, with the least and the most of all rounds, as a PNG."""
    measured = result["threads"]["1"]["images_per_second"]
    rates = {title: measured[name] for name, title in _DECODERS.items() if name in measured}
    medians = [rate["median"] for rate in rates.values()]
    reach = [
        [rate["median"] - rate["min"] for rate in rates.values()],
        [rate["max"] - rate["median"] for rate in rates.values()],
    ]
    figure = Figure(figsize=(8, 0.45 * len(rates) + 1), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colors = [_OURS if "fastprune" in title else _PEERS for title in rates]
    bars = axes.barh(list(rates), medians, xerr=reach, color=colors, ecolor="#57606a")
    axes.bar_label(bars, labels=[f"{median:,.0f}" for median in medians], padding=6)
    axes.set_xlabel(
        f"random resized crops of 224 pixels per second, one core ({result['machine']['cpu']})"
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.15)
    figure.savefig(path, format="png", dpi=110, metadata={"Software": None})
