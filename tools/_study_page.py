"""How the study of benchmarks/wallclock.py reads: set-up, table, findings, chart.

Nothing here expects an outcome: the sentences follow the numbers, whichever way they fall.
"""

import hashlib
import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

FULL, OURS = "full", "medium50-loss+reshape"
# What the README speaks of; all contrasts stand in docs/choosing.md.
HEADLINES = (OURS, f"{FULL}+cache", f"{OURS}+cache")
PICTURE = "wallclock-cifar10.png"
_LINE = 108

Study = Mapping[str, Any]


def study_in_readme(study: Study) -> str:
    """Chart, set-up, and a line per contrast of the headlines."""
    contrasts = [c for c in study["contrasts"] if c["name"].split(" - ")[0] in HEADLINES]
    shown = {FULL, *(name for c in contrasts for name in c["name"].split(" - "))}
    cells = {name: cell for name, cell in study["cells"].items() if name in shown}
    headlines = {**study, "contrasts": contrasts, "cells": cells}
    return _markdown(_picture("docs/images"), set_up(study), findings(headlines), *costs(headlines))


def study_in_choosing(study: Study) -> str:
    """The same with the table, under a heading of its own, for who chooses a strategy."""
    return _markdown(
        "## What was measured on CIFAR-10",
        set_up(study),
        study_table(study),
        _picture("images"),
        findings(study),
        *costs(study),
    )


def study_in_log(study: Study) -> str:
    """The same as an entry of the experiment log, with what came before and what was left out."""
    made = study["prepared"]
    reduced = f"Smaller than planned: {study['reduced']}." if study["reduced"] else ""
    disturbed = sum(cell["disturbed"] for cell in study["cells"].values())
    runs = sum(cell["top1_last"]["n"] for cell in study["cells"].values())
    return _markdown(
        f"## {study['date']}: students on some of the rows, on all for half as long, and cached",
        f"{set_up(study)} The teacher took {made['teacher']['seconds']:.0f} s, the first scoring "
        f"pass {made['score']['pass_seconds']:.1f} s. {reduced} {disturbed} of {runs} runs were "
        "disturbed by other work, which accuracy does not mind: their wall clock says nothing, and "
        "cost is of steps measured in turn. Commit "
        f"{study['commit']}; every run is in `benchmarks/results/wallclock-cifar10.json`.",
        study_table(study),
        findings(study),
        *costs(study),
    )


def _markdown(*parts: str) -> str:
    """Paragraphs, wrapped where they are sentences."""
    wrapper = textwrap.TextWrapper(_LINE, break_on_hyphens=False, break_long_words=False)
    shown = (part if part[0] in "|#!-" else wrapper.fill(part) for part in parts if part)
    return "\n\n".join(shown) + "\n"


def _picture(folder: str) -> str:
    return f"![Top-1 of each run over what it cost]({folder}/{PICTURE})"


def set_up(study: Study) -> str:
    """What the study is of, the teacher's accuracy included."""
    settings, rows, machine = study["settings"], study["prepared"]["convert"], study["machine"]
    place = (
        ", ".join(machine["gpus"])
        if settings["device"] != "cpu"
        else f"{machine['cpu']}, {machine['cores']} cores"
    )
    teacher, seeds = study["teacher"], len(study["seeds"])
    return (
        f"{settings['teacher']} → {settings['student']} on {rows['train_rows']:,} training images "
        f"of CIFAR-10 at {settings['image_size']} pixels, {settings['epochs']} epochs (fewer where "
        f"the name says so), tested on {rows['val_rows']:,}, {seeds} seed{'s' * (seeds > 1)}; "
        f"{place}. The teacher is right on {100 * teacher['train_top1']:.1f}% of the training rows "
        f"and {100 * teacher['test_top1']:.1f}% of the test rows."
    )


def study_table(study: Study) -> str:
    """A line per cell, in Markdown, by cost."""
    headings = ["cell", "seeds", "top-1 last, %", "steps", "cost", "cost, later student"]
    headings += ["wall clock, ratio", "disturbed runs"]
    lines = [" | ".join(headings), "|".join(["---", *["--:"] * (len(headings) - 1)])]
    by_cost = sorted(study["cells"].items(), key=lambda item: item[1]["cost_ratio"]["mean"] or 0.0)
    for name, cell in by_cost:
        cells = [
            f"`{name}`",
            str(cell["top1_last"]["n"]),
            in_words(cell["top1_last"], 1, scale=100),
            in_words({**cell["steps"], "sd": None}, 0),
            in_words({**cell["cost_ratio"], "sd": None}, 3),
            in_words({**cell["later_cost_ratio"], "sd": None}, 3),
            in_words(cell["total_over_full"], 2),
            str(cell["disturbed"]),
        ]
        lines.append(" | ".join(cells))
    return "\n".join(f"|{line}|" if "---" in line else f"| {line} |" for line in lines)


def in_words(value: Mapping[str, Any], digits: int, *, scale: float = 1) -> str:
    """`61.2 ± 0.4`; a dash where there is nothing."""
    if value["mean"] is None:
        return "–"
    text = f"{scale * value['mean']:.{digits}f}"
    return text if value["sd"] is None else f"{text} ± {scale * value['sd']:.{digits}f}"


def findings(study: Study) -> str:
    """The contrasts' sentences as a list, whichever way they fall."""
    lines = []
    for contrast in study["contrasts"]:
        name, rest = contrast["sentence"].split(": ", 1)
        cell, other = name.split(" - ")
        if contrast["n"] == len(study["seeds"]):  # the set-up says so
            rest = rest.replace(f", {contrast['n']} seeds", "")
        words = textwrap.wrap(
            f"- `{cell}` against `{other}`: {rest}".replace("-0.0", "0.0"),
            _LINE,
            subsequent_indent="  ",
            break_on_hyphens=False,
        )
        lines.append("\n".join(words))
    return "\n".join(lines)


def costs(study: Study) -> list[str]:
    """What the cells of the contrasts cost, and where the numbers come from."""
    cells = study["cells"]
    known = [name for name, cell in cells.items() if cell["cost_ratio"]["mean"] is not None]
    if FULL not in known or OURS not in known:
        return []
    later = [
        f"{cell['later_cost_ratio']['mean']:.2f} with `{name}`"
        for name, cell in cells.items()
        if cell["later_cost_ratio"]["mean"] is not None
    ]
    known.sort(key=lambda name: cells[name]["cost_ratio"]["mean"])
    reached = ", ".join(
        f"`{name}` {100 * cells[name]['top1_last']['mean']:.1f}% at "
        f"{cells[name]['cost_ratio']['mean']:.2f}"
        for name in known
    )
    text = (
        f"Points are percentage points of top-1 after the last epoch, in pairs by seed, with the "
        f"95% interval of each contrast by itself; Holm's procedure at 5% over all of them decides "
        f"what is a difference. Cost is steps times their median seconds measured in turn, scoring "
        f"and start-up, over `{FULL}`. Top-1 and cost: {reached}."
    )
    if later:
        text += f" A later student, which finds scores and a whole cache, costs {', '.join(later)}."
    return [text]


def source_of(study: Study) -> str:
    """A digest of the study that its chart carries, so that a chart of an older one is noticed."""
    text = json.dumps(study, sort_keys=True).encode()
    return hashlib.blake2b(text, digest_size=8).hexdigest()


def draw_study(study: Study, path: Path) -> None:
    """Top-1 of every run over what it cost, as a PNG; nothing where costs are not known yet."""
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    palette = mpl.colormaps["tab20"]
    for number, (name, cell) in enumerate(study["cells"].items()):
        runs = [
            run for run in study["runs"] if run["name"] == name and run["seed"] in study["seeds"]
        ]
        cost, reached = cell["cost_ratio"]["mean"], cell["top1_last"]
        if cost is None:
            continue
        # Dark colors first: neighbors in a palette of pairs look alike.
        color = palette((2 * number) % 20 + (2 * number) // 20)
        tops = [100 * run["top1_last"] for run in runs]
        axes.plot([r["cost_ratio"] for r in runs], tops, "o", color=color, alpha=0.45, ms=4)
        half = None if reached["half_width"] is None else 100 * reached["half_width"]
        bar: dict[str, Any] = {"fmt": "x", "color": color, "capsize": 4}
        axes.errorbar([cost], [100 * reached["mean"]], yerr=half, label=name, **bar)
        later = cell["later_cost_ratio"]["mean"]
        if later is not None:
            axes.plot(
                [later],
                [100 * reached["mean"]],
                "o",
                color=color,
                mfc="none",
                ms=9,
                label=f"{name}, a later student",
            )
    axes.set_xlim(left=0)
    axes.set_xlabel("cost: steps at their median in turn, scoring, start-up; full = 1")
    axes.set_ylabel("top-1 after the last epoch, %")
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Software": None, "Source": source_of(study)}
    figure.savefig(path, format="png", dpi=110, metadata=metadata)
