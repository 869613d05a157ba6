"""Charts of training runs: accuracy over cost, time and epochs, and where the time went."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from fastprune.report.charts import add_legend, colors, new_figure, plain, png_of
from fastprune.report.comparison import Comparison, Group, half_width
from fastprune.report.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The uses of a run's seconds, each with the same color on every page: Okabe and Ito's, which the
# color-blind can tell apart, and grays for the remainders.
PART_COLORS = {
    "conversion": "#999999",
    "scoring": "#e69f00",
    "start-up": "#555555",
    "waiting for data": "#d55e00",
    "teacher": "#0072b2",
    "student": "#56b4e9",
    "optimizer": "#009e73",
    "training, other": "#b8c4cc",
    "validation": "#cc79a7",
    "checkpoints": "#f0e442",
    "other": "#dddddd",
}

_BAR_INCHES = 0.34


def time_parts(run: Run, *, convert_seconds: float | None) -> Mapping[str, float]:
    """Split a run's seconds by use, in the order of `PART_COLORS`.

    Args:
        run: a finished run.
        convert_seconds: of converting the images; None to leave them out.

    Returns:
        Part -> seconds; parts that are not recorded are in "training, other" or "other", so that
        the sum is what the run cost. Where the host waited for data while the device was at work,
        the device's work is shown.
    """

    def seconds(name: str) -> float:
        return run.number(f"{name}_seconds") or 0.0

    work = sum(map(seconds, ("teacher", "student", "optimizer")))
    around = sum(map(seconds, ("startup", "validation", "checkpoint")))
    # Device clocks may overlap host waits by a little; a share is never negative.
    idle = max(0.0, seconds("train") - work)
    waiting = min(seconds("wait"), idle)
    parts = {
        "conversion": convert_seconds or 0.0,
        "scoring": run.score_seconds or 0.0,
        "start-up": seconds("startup"),
        "waiting for data": waiting,
        "teacher": seconds("teacher"),
        "student": seconds("student"),
        "optimizer": seconds("optimizer"),
        "training, other": idle - waiting,
        "validation": seconds("validation"),
        "checkpoints": seconds("checkpoint"),
        "other": max(0.0, seconds("total") - seconds("train") - around),
    }
    return {name: value for name, value in parts.items() if value > 0}


def cost_png(comparison: Comparison) -> bytes | None:
    """Draw top-1 after the last epoch over what the student cost.

    A dot is a run; a cross is a group's mean, with the 95% interval of the mean over its seeds.

    Returns:
        A PNG; None where no finished group has both numbers for each of its runs.
    """
    figure = new_figure(11, 4.6)
    axes = figure.subplots()
    groups, baseline = comparison.finished, comparison.baseline
    drawn = 0
    for group, color in zip(groups, colors(len(groups)), strict=True):
        costs = [cost for cost in comparison.costs(group) if cost is not None]
        reached = [100 * run.top1_last for run in group.runs if run.top1_last is not None]
        if not len(costs) == len(reached) == len(group.runs):
            continue
        drawn += 1
        axes.plot(costs, reached, "o", color=color, markersize=5, alpha=0.5)
        axes.errorbar(
            [fmean(costs)],
            [fmean(reached)],
            yerr=half_width(reached),
            fmt="x",
            color=color,
            capsize=4,
            label=plain(group.name),
        )
    if not drawn:
        return None
    axes.set_xlim(left=0)
    axes.set_xlabel(
        "cost, seconds of steps at their median, scoring and start-up"
        if baseline is None
        else f"cost: steps at their median, scoring and start-up; {plain(baseline.name)} = 1"
    )
    axes.set_ylabel("top-1 after the last epoch, %")
    axes.grid(alpha=0.3)
    add_legend(figure)
    return png_of(figure)


def accuracy_png(groups: Sequence[Group]) -> bytes:
    """Draw top-1 over the seconds that were paid for it, and over epochs.

    A thin line is a run, a thick one the mean of a group's seeds. An unfinished run is dashed.

    Args:
        groups: at least one.
    """
    figure = new_figure(11, 4.6)
    over_time, over_epochs = figure.subplots(1, 2, sharey=True)
    for group, color in zip(groups, colors(len(groups)), strict=True):
        draw_group(over_time, group, color, by_epoch=False)
        draw_group(over_epochs, group, color, by_epoch=True)
    over_time.set_xlabel("seconds of scoring and training")
    over_time.set_ylabel("top-1 on the validation set, %")
    over_epochs.set_xlabel("epochs")
    over_epochs.locator_params(axis="x", integer=True)
    for axes in (over_time, over_epochs):
        axes.set_xlim(left=0)
        # From zero: a cut axis makes a fraction of a point look like a victory.
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    add_legend(figure)
    return png_of(figure)


def seconds_png(groups: Sequence[Group], *, convert_seconds: float | None) -> bytes:
    """Draw the use of each group's seconds, the mean of its runs.

    Args:
        groups: finished ones, at least one.
        convert_seconds: of converting the images; None to leave them out.
    """
    figure = new_figure(11, 1.9 + _BAR_INCHES * len(groups))
    axes = figure.subplots()
    spent = [_mean_parts(group, convert_seconds) for group in groups]
    shown = [name for name in PART_COLORS if any(name in parts for parts in spent)]
    left = np.zeros(len(groups))
    for name in shown:
        widths = np.array([parts.get(name, 0.0) for parts in spent])
        axes.barh(
            [plain(group.name) for group in groups],
            widths,
            left=left,
            color=PART_COLORS[name],
            label=name,
        )
        left += widths
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    add_legend(figure)
    return png_of(figure)


def draw_group(axes: "Axes", group: Group, color: object, *, by_epoch: bool) -> None:
    """Draw a group's runs, and their mean over the validations that all of them have."""
    runs = [run for run in group.runs if run.curve]
    style = "-" if group.is_finished else "--"
    bold: dict[str, Any] = {"color": color, "lw": 1.8, "label": plain(group.name)}
    thin: dict[str, Any] = {"color": color, "lw": 0.7, "alpha": 0.4}
    for run in runs:
        x, y = _curve([run], by_epoch=by_epoch)
        axes.plot(x, y, style, marker=".", markersize=4, **(thin if len(runs) > 1 else bold))
    if len(runs) > 1:
        axes.plot(*_curve(runs, by_epoch=by_epoch), style, **bold)


def _curve(runs: Sequence[Run], *, by_epoch: bool) -> tuple[list[float], list[float]]:
    """Average the validations that all runs have: (epochs or seconds, accuracy in percent)."""
    validated = [{point.epoch: point for point in run.curve} for run in runs]
    epochs = [epoch for epoch in validated[0] if all(epoch in points for points in validated)]
    paid = fmean(run.score_seconds or 0.0 for run in runs)
    seconds = [paid + fmean(points[epoch].seconds for points in validated) for epoch in epochs]
    percent = [100 * fmean(points[epoch].top1 for points in validated) for epoch in epochs]
    return epochs if by_epoch else seconds, percent


def _mean_parts(group: Group, convert_seconds: float | None) -> Mapping[str, float]:
    """Part -> seconds, the mean of a group's runs."""
    spent = [time_parts(run, convert_seconds=convert_seconds) for run in group.runs]
    names = dict.fromkeys(name for parts in spent for name in parts)
    return {name: fmean(parts.get(name, 0.0) for parts in spent) for name in names}
