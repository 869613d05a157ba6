"""Draw the charts of the documentation from benchmarks/results: python benchmarks/charts.py."""

import json
from pathlib import Path
from typing import Any

from _harness import RESULTS, ROOT
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

IMAGES = ROOT / "docs" / "images"
DECODERS = {
    "spdl": "SPDL",
    "torchvision": "torchvision",
    "dali cpu": "DALI (CPU)",
    "stock ffcv": "FFCV",
    "ours": "fastprune",
    "ours, restart rows": "fastprune, fast layout",
}


def main() -> None:
    result = json.loads((RESULTS / "decode.json").read_text(encoding="utf-8"))
    for path in draw_decoders(result, IMAGES):
        print(path)


def draw_decoders(result: dict[str, Any], folder: Path) -> list[Path]:
    """Views per second of one thread, as folder/decode.png and folder/decode.svg."""
    measured = result["threads"]["1"]["images_per_second"]
    rates = {title: measured[name] for name, title in DECODERS.items() if name in measured}
    medians = [rate["median"] for rate in rates.values()]
    reach = [
        [rate["median"] - rate["min"] for rate in rates.values()],
        [rate["max"] - rate["median"] for rate in rates.values()],
    ]
    colors = ["#1f6feb" if "fastprune" in title else "#9aa4b2" for title in rates]
    figure = Figure(figsize=(7, 0.5 * len(rates) + 1), layout="constrained")
    axes = figure.add_subplot()
    bars = axes.barh(list(rates), medians, xerr=reach, color=colors, ecolor="#57606a")
    axes.bar_label(bars, labels=[f"{median:,.0f}" for median in medians], padding=6)
    axes.set_xlabel(f"random resized crops of 224 pixels per second, one core ({_machine(result)})")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.15)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "decode.png", folder / "decode.svg"]
    FigureCanvasAgg(figure).print_png(paths[0], metadata={"Software": None})
    FigureCanvasSVG(figure).print_svg(paths[1], metadata={"Date": None})
    return paths


def _machine(result: dict[str, Any]) -> str:
    """Its CPU."""
    return str(result["machine"]["cpu"])


if __name__ == "__main__":
    main()
