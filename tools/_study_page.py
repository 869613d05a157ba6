"""How the study of benchmarks/wallclock.py reads: set-up, table, findings, chart.

Nothing here expects an outcome: the sentences follow the numbers, whichever way they fall.
"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

HALF, OURS, FULL, RANDOM = 0.5, "medium50-centroid", "full", "random50"
PICTURE = "wallclock-cifar10.png"
_MUTED, _STRONG = "#9aa5b1", "#4c72b0"
_ABOVE: dict[str, Any] = {
    "loc": "lower right",
    "bbox_to_anchor": (1, 1),
    "frameon": False,
    "fontsize": 8,
}
_LINE = 108

Study = Mapping[str, Any]


def study_in_readme(study: Study) -> str:
    """Set-up, table, chart and findings."""
    start = f"{set_up(study)} `make study IMAGES=folder` measures it."
    return _markdown(start, study_table(study), _picture("docs/images"), *findings(study))


def study_in_choosing(study: Study) -> str:
    """The same, under a heading of its own, for who chooses a strategy."""
    return _markdown(
        "## What was measured on CIFAR-10",
        set_up(study),
        study_table(study),
        _picture("images"),
        *findings(study),
    )


def study_in_log(study: Study) -> str:
    """The same as an entry of the experiment log, with best validations and what came before."""
    made = study["prepared"]
    teacher, score = made["teacher"], made["score"]
    reached = f", top-1 {100 * teacher['top1_last']:.1f}%" if "top1_last" in teacher else ""
    return _markdown(
        f"## {study['date']}: students on some of the rows",
        f"{set_up(study)} One teacher ({teacher['network']}{reached}) in "
        f"{teacher['seconds']:.0f} s; conversion {made['convert']['seconds']:.1f} s; the scoring "
        f"pass {score['pass_seconds']:.1f} s, {score['seconds']:.1f} s with the start of its "
        f"process, compiled code cached. Commit {study['commit']}; every run with its curve is in "
        "`benchmarks/results/wallclock-cifar10.json`.",
        study_table(study, best=True),
        *findings(study),
    )


def _markdown(*parts: str) -> str:
    """Paragraphs, wrapped where they are sentences."""
    wrapper = textwrap.TextWrapper(_LINE, break_on_hyphens=False, break_long_words=False)
    return "\n\n".join(p if p[0] in "|#!" else wrapper.fill(p) for p in parts) + "\n"


def _picture(folder: str) -> str:
    """The chart."""
    return f"![Top-1 and cost of each run]({folder}/{PICTURE})"


def set_up(study: Study) -> str:
    """What the study is of, in a sentence."""
    settings, rows = study["settings"], study["prepared"]["convert"]
    seeds = num_seeds(study)
    machine = study["machine"]
    place = (
        ", ".join(machine["gpus"])
        if settings["device"] != "cpu"
        else (f"{machine['cpu']}, {machine['cores']} cores")
    )
    return (
        f"{settings['teacher']} → {settings['student']} on {rows['train_rows']:,} training images "
        f"of CIFAR-10, {settings['epochs']} epochs each, tested on {rows['val_rows']:,}; mean ± sd "
        f"over {seeds} seed{'s' if seeds > 1 else ''}; {place}."
    )


def num_seeds(study: Study) -> int:
    """Seeds of a variant that is done."""
    return max(summary["top1_last"]["n"] for summary in cells_of(study).values())


def cells_of(study: Mapping[str, Any]) -> Mapping[str, Any]:
    """The cells' summaries, which results from before the contrasts call so."""
    return study["cells"] if "cells" in study else study["summary"]


def done(study: Study) -> dict[str, Mapping[str, Any]]:
    """The lines of the table that have all seeds; sentences speak of these alone."""
    seeds = num_seeds(study)
    return {name: s for name, s in cells_of(study).items() if s["top1_last"]["n"] == seeds}


def study_table(study: Study, *, best: bool = False) -> str:
    """A line per run, in Markdown."""
    headings = ["run", "top-1 last, %", *(["top-1 best, %"] if best else [])]
    headings += [f"over {RANDOM}, points", "training, s", "scoring, s"]
    headings += ["training, ratio", "with scoring", "at 100 epochs", "waiting, %"]
    lines = [" | ".join(headings), "|".join(["---", *["--:"] * (len(headings) - 1)])]
    seeds = num_seeds(study)
    for name, summary in cells_of(study).items():
        n = summary["top1_last"]["n"]
        cells = [
            f"`{name}`" + (f" ({n} of {seeds} seeds so far)" if n < seeds else ""),
            in_words(summary["top1_last"], 1, scale=100),
            *([in_words(summary["top1_best"], 1, scale=100)] if best else []),
            "–"
            if name == RANDOM
            else in_words(summary["top1_last_over_random50"], 1, scale=100, sign=True),
            in_words(summary["train_seconds"], 1),
            in_words({**summary["score_seconds"], "sd": None}, 1),
            in_words(summary["train_over_full"], 3),
            in_words(summary["with_scoring_over_full"], 3),
            in_words({**summary["with_scoring_at_100_epochs"], "sd": None}, 3),
            in_words({**summary["data_wait_share"], "sd": None}, 1, scale=100),
        ]
        lines.append(" | ".join(cells))
    return "\n".join(f"|{line}|" if "---" in line else f"| {line} |" for line in lines)


def in_words(value: Mapping[str, Any], digits: int, *, scale: float = 1, sign: bool = False) -> str:
    """`61.2 ± 0.4`; a dash where there is nothing."""
    if value["mean"] is None:
        return "–"
    # A mean that rounds to zero has no sign.
    mean = round(scale * value["mean"], digits) + 0.0
    text = f"{mean:{'+' if sign and mean else ''}.{digits}f}"
    return text if value["sd"] is None else f"{text} ± {scale * value['sd']:.{digits}f}"


def findings(study: Study) -> list[str]:
    """What the numbers say, whichever way they fall."""
    return [*_accuracy_findings(study), *_cost_findings(study)]


def _accuracy_findings(study: Study) -> list[str]:
    """Who reached what on half of the rows, with the random half beside it."""
    summary = done(study)
    halves = dict.fromkeys(
        run["name"] for run in study["runs"] if run["keep_ratio"] == HALF and run["name"] in summary
    )
    ranked = sorted(halves, key=lambda name: -summary[name]["top1_last"]["mean"])
    if FULL not in summary or RANDOM not in halves or len(ranked) < 2:
        return []
    top = {name: in_words(summary[name]["top1_last"], 1, scale=100) for name in summary}
    first = next(name for name in ranked if name != RANDOM)
    gap = in_words(summary[first]["top1_last_over_random50"], 1, scale=100, sign=True)
    means = [summary[name]["top1_last"]["mean"] for name in halves]
    place = 1 + sum(mean > summary[RANDOM]["top1_last"]["mean"] for mean in means)
    return [
        f"After the last epoch `{FULL}` is at {top[FULL]}%. On half of the rows `{RANDOM}` is at "
        f"{top[RANDOM]}%, number {place} of {len(ranked)}; the best of the others, `{first}`, "
        f"is at {top[first]}%, {gap} points from `{RANDOM}` seed by seed."
    ]


def _cost_findings(study: Study) -> list[str]:
    """What half of the rows cost, with the arithmetic for a long schedule."""
    summary, name = done(study), OURS
    if FULL not in summary or name not in summary:
        return []
    ours, full, epochs = summary[name], summary[FULL], study["settings"]["epochs"]
    score, epoch, full_epoch = (
        ours["score_seconds"]["mean"],
        ours["train_seconds"]["mean"] / epochs,
        full["train_seconds"]["mean"] / epochs,
    )
    long = (score + 100 * epoch) / (100 * full_epoch)
    return [
        f"`{name}` trains for {in_words(ours['train_over_full'], 3)} of the seconds of `{FULL}`; "
        f"with the scoring pass it is {in_words(ours['with_scoring_over_full'], 3)} at these "
        f"{epochs} epochs, and at 100 epochs ({score:.2f} + 100 × {epoch:.3f}) / "
        f"(100 × {full_epoch:.3f}) = {long:.3f}. Training is the epochs, without start-up, "
        f"validation and compilation; with them, and with scoring, it is "
        f"{in_words(ours['total_over_full'], 3)}."
    ]


def draw_study(study: Study, path: Path) -> None:
    """Top-1 of every run and what each cost, side by side, as a PNG."""
    names = list(cells_of(study))
    figure = Figure(figsize=(10, 0.9 + 0.36 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    accuracy, cost = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    _draw_accuracy(accuracy, study, names)
    _draw_cost(cost, study, names)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=110, metadata={"Software": None})


def _draw_accuracy(axes: Axes, study: Study, names: Sequence[str]) -> None:
    """A dot for each seed, a bar for their mean, a line at random50."""
    for place, name in enumerate(names):
        reached = [100 * run["top1_last"] for run in study["runs"] if run["name"] == name]
        axes.plot(reached, [place] * len(reached), "o", color=_MUTED, markersize=5)
        mean = 100 * cells_of(study)[name]["top1_last"]["mean"]
        axes.plot([mean], [place], "|", color=_STRONG, markersize=16, markeredgewidth=2.5)
    if RANDOM in names:
        mean = 100 * cells_of(study)[RANDOM]["top1_last"]["mean"]
        axes.axvline(mean, color=_STRONG, linestyle=":", linewidth=1, label=f"mean of {RANDOM}")
        axes.legend(**_ABOVE)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("top-1 after the last epoch, %: each seed, and the mean")


def _draw_cost(axes: Axes, study: Study, names: Sequence[str]) -> None:
    """Training and scoring over the training of full."""
    full = cells_of(study).get(FULL, {}).get("train_seconds", {}).get("mean")
    if full is None:
        axes.set_axis_off()
        return
    places = range(len(names))
    train, score = (
        [cells_of(study)[name][key]["mean"] / full for name in names]
        for key in ("train_seconds", "score_seconds")
    )
    axes.barh(places, train, color=_STRONG, label="training")
    axes.barh(places, score, left=train, color=_MUTED, label="scoring")
    axes.set_xlabel("seconds over those of training on all rows")
    axes.legend(ncols=2, **_ABOVE)
    axes.grid(axis="x", alpha=0.3)
