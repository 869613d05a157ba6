"""The page about training runs: the verdict, accuracy, cost, and where the time went."""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from fastprune.base.errors import InvalidValueError
from fastprune.base.files import atomic_path, write_text
from fastprune.report.comparison import (
    Comparison,
    Group,
    configuration_differences,
    difference,
    mean,
    verdict,
    warnings_about,
)
from fastprune.report.page import (
    facts,
    heading,
    note,
    page,
    picture,
    table,
    text_table,
    verdict_list,
    warning,
)
from fastprune.report.run_charts import accuracy_png, cost_png, seconds_png
from fastprune.report.runs import Run, read_runs

_REACHED = (
    "run",
    "trained on",
    "seeds",
    "epochs",
    "top-1 last, %",
    "Δ to baseline, points",
    "top-1 best, %",
)
_COST = (
    "run",
    "images per epoch",
    "training, s",
    "scoring, s",
    "total, s",
    "cost",
    "steps, ratio",
    "waiting, %",
)
_TAUGHT = (
    "run",
    "who pays",
    "images through the teacher",
    "saved by the cache",
    "cache, MB",
    "filling, s",
)


def report_runs(
    paths: Iterable[str | Path],
    out_path: str | Path,
    *,
    reference: str | None = None,
    convert_seconds: float | None = None,
    score_seconds: float | None = None,
) -> Comparison:
    """Write an HTML page, with its pictures in it and beside it, about training runs.

    Runs of one name are taken together, as seeds of the same experiment. The pictures also go to
    `<out>-cost.png`, `<out>-accuracy.png` and `<out>-seconds.png`.

    Args:
        paths: run folders, or folders that hold some.
        out_path: the page to write.
        reference: name of the runs that the others are compared with; by default those on all rows.
        convert_seconds: of converting the images, to be counted in; None to leave them out.
        score_seconds: of scoring, for runs whose subset does not record them.

    Returns:
        The runs on the page, in groups.

    Raises:
        ArtifactError: a folder is not a run, or a file cannot be read or written.
        InvalidValueError: seconds are negative, or no finished run has the reference's name.
    """
    if convert_seconds is not None and convert_seconds < 0:
        raise InvalidValueError(f"convert_seconds ({convert_seconds}) must be >= 0.")
    runs = read_runs(paths, score_seconds=score_seconds)
    comparison = Comparison.of(runs, reference)
    out_path = Path(out_path)
    parts = [
        verdict_list(verdict(comparison.groups, comparison.baseline)),
        *map(warning, warnings_about(comparison.groups)),
        *_accuracy_over_cost(comparison, out_path),
        *_accuracy(comparison, out_path),
        *_costs(comparison, convert_seconds, out_path),
        *_settings(comparison.groups),
        *_origin(runs),
    ]
    write_text(out_path, page("Training runs", parts))
    return comparison


def summarize_runs(comparison: Comparison) -> str:
    """Lay out accuracy and cost of the finished runs for a terminal, with the same numbers."""
    cost_columns = [_COST.index(name) for name in ("training, s", "scoring, s", "total, s", "cost")]
    reached_columns = [_REACHED.index(name) for name in ("top-1 last, %", "Δ to baseline, points")]
    lines = []
    for group in comparison.finished:
        cost = _cost_line(group, comparison, convert_seconds=None)
        reached = _accuracy_line(group, comparison.baseline)
        lines.append(
            [group.name, *(cost[i] for i in cost_columns), *(reached[i] for i in reached_columns)]
        )
    headings = ["run", *(_COST[i] for i in cost_columns), *(_REACHED[i] for i in reached_columns)]
    remarks = warnings_about(comparison.groups)
    return "\n".join([text_table(headings, lines), *remarks])


def _write_png(out_path: Path, name: str, png: bytes) -> None:
    with atomic_path(out_path.with_name(f"{out_path.stem}-{name}.png")) as temporary:
        temporary.write_bytes(png)


def _accuracy_over_cost(comparison: Comparison, out_path: Path) -> list[str]:
    """Begin the page with the chart that answers its question."""
    png = cost_png(comparison)
    if png is None:
        return []
    _write_png(out_path, "cost", png)
    return [
        heading("Accuracy over cost"),
        picture(png, "Top-1 of each run over what it cost", may_scroll=True),
        note(
            "A dot is a run; a cross the mean of its seeds, with the 95% interval of that mean "
            "(Student's t). Intervals that overlap may still differ in pairs: see Δ below."
        ),
    ]


def _accuracy(comparison: Comparison, out_path: Path) -> list[str]:
    groups = comparison.groups
    parts = [
        heading("Accuracy"),
        table(_REACHED, [_accuracy_line(g, comparison.baseline) for g in groups], text=(0, 1)),
        note(
            "Accuracies: mean ± standard deviation over seeds. Δ: mean difference over the seeds "
            "that both have ± half of its 95% interval (Student's t, in pairs), each comparison by "
            "itself: of twenty that do not differ, one is expected to look as if it did. The best "
            "of all validations is chosen on the validation set, so it flatters: compare the last."
        ),
    ]
    if any(run.curve for group in groups for run in group.runs):
        png = accuracy_png(groups)
        _write_png(out_path, "accuracy", png)
        # The log of an unfinished run does not separate phases.
        unfinished = (
            ""
            if all(group.is_finished for group in groups)
            else " An unfinished run is dashed; its seconds include start-up and validation."
        )
        parts += [
            picture(png, "Top-1 over seconds and over epochs", may_scroll=True),
            note(
                "A thin line is a run, a thick one the mean of its seeds. Seconds count scoring "
                f"and the epochs, without start-up and validation.{unfinished}"
            ),
        ]
    return parts


def _accuracy_line(group: Group, baseline: Group | None) -> list[str]:
    is_compared = baseline is not None and group is not baseline and group.is_finished
    delta = difference(group, baseline) if is_compared and baseline is not None else None
    return [
        group.name,
        group.runs[0].selection,
        str(len(group.runs)),
        ", ".join(dict.fromkeys(_epochs(run) for run in group.runs)),
        mean_and_sd([_percent(run.top1_last) for run in group.runs], 2),
        str(delta or "–"),
        mean_and_sd([_percent(run.top1_best) for run in group.runs], 2),
    ]


def _costs(comparison: Comparison, convert_seconds: float | None, out_path: Path) -> list[str]:
    finished = comparison.finished
    if not finished:
        return [heading("Cost"), note("No run is finished yet.")]
    png = seconds_png(finished, convert_seconds=convert_seconds)
    _write_png(out_path, "seconds", png)
    lines = [_cost_line(group, comparison, convert_seconds=convert_seconds) for group in finished]
    return [
        heading("Cost"),
        table(_COST, lines),
        note(_cost_note(comparison, convert_seconds)),
        *_taught(finished),
        heading("Where the time went"),
        picture(png, "Seconds of each run by use", may_scroll=True),
        note("The mean of each name's runs."),
    ]


def _cost_line(group: Group, comparison: Comparison, *, convert_seconds: float | None) -> list[str]:
    """Write one line of the table; a dash stands for a number that is not recorded."""
    baseline = comparison.baseline
    paid = [run.paid_seconds(total=True) for run in group.runs]
    totals = [None if seconds is None else seconds + (convert_seconds or 0.0) for seconds in paid]
    steps = mean(group.numbers("steps"))
    their_steps = None if baseline is None else mean(baseline.numbers("steps"))
    return [
        group.name,
        mean_and_sd([mean(group.numbers("images_per_epoch"))], 0),
        mean_and_sd(group.numbers("train_seconds"), 1),
        mean_and_sd([mean([run.score_seconds for run in group.runs])], 1),
        mean_and_sd(totals, 1),
        # Two digits: medians of equal steps spread by a few percent.
        "–" if baseline is None else mean_and_sd(comparison.costs(group), 2),
        f"{steps / their_steps:.2f}" if steps and their_steps else "–",
        mean_and_sd([_percent(share) for share in group.numbers("data_wait_share")], 1),
    ]


def _cost_note(comparison: Comparison, convert_seconds: float | None) -> str:
    """Explain the table, and name the costs that are missing from it."""
    baseline = comparison.baseline
    remarks = [
        "Training is the epochs, without start-up and validation. Total is the time from start to "
        "end, "
        + (
            "with scoring. Conversion is not counted: give its seconds by --convert-seconds."
            if convert_seconds is None
            else f"with scoring and {convert_seconds:,.1f} s of conversion."
        ),
        "No ratios: name the runs to compare with by --reference."
        if baseline is None
        else "Cost is training, scoring and start-up over the same of "
        f"{baseline.name}, seed by seed. Each step counts with the median of its kind, over all "
        "runs here that do the same work in a step, so that a run beside other load costs no more. "
        "Waiting is the share of training in which no batch was there.",
    ]
    if any(run.score_seconds is None for run in comparison.runs if run.is_finished):
        remarks.append(
            "A dash stands for what is not recorded: where a subset does not record its scores' "
            "seconds, give them by --score-seconds."
        )
    return " ".join(remarks)


def _taught(groups: Sequence[Group]) -> list[str]:
    """Show who asked the teacher, where a run had its logits from a cache."""
    if not any(any(group.numbers("teacher_forwards_saved")) for group in groups):
        return []
    lines = []
    for group in groups:
        forwards = mean(group.numbers("teacher_forwards"))
        saved = mean(group.numbers("teacher_forwards_saved"))
        cache_bytes = mean(group.numbers("cache_bytes"))
        payer = "later student" if saved and not forwards else "first student"
        lines.append(
            [
                group.name,
                payer if saved else "every epoch",
                mean_and_sd([forwards], 0),
                mean_and_sd([saved], 0),
                mean_and_sd([None if cache_bytes is None else cache_bytes / 1e6], 1),
                mean_and_sd([mean(group.numbers("cache_fill_seconds"))], 1),
            ]
        )
    return [
        table(_TAUGHT, lines),
        note(
            "A teacher cache is paid for by the first student, or by scoring, and read by later "
            "ones. Filling ran beside the training."
        ),
    ]


def _settings(groups: Sequence[Group]) -> list[str]:
    if len(groups) < 2:
        return []
    differing = configuration_differences(groups)
    if not differing:
        return [heading("Settings that differ"), note("None: the runs have one recipe.")]
    lines = [[name, *values] for name, values in differing.items()]
    columns = ["setting", *(group.name for group in groups)]
    return [
        heading("Settings that differ"),
        table(columns, lines, text=range(len(columns))),
        note("Everything else in the recipes is the same, apart from seed, name and folder."),
    ]


def mean_and_sd(values: Sequence[float | None], digits: int) -> str:
    """Format as `61.2 ± 0.4`; a single value alone, and a dash where one is missing."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return "–"
    text = f"{statistics.mean(known):,.{digits}f}"
    return text if len(known) < 2 else f"{text} ± {statistics.stdev(known):,.{digits}f}"


def _epochs(run: Run) -> str:
    """Count the planned epochs, and for an unfinished run the validated ones."""
    if run.is_finished:
        return str(run.epochs)
    done = run.curve[-1].epoch if run.curve else 0
    return f"{done:g} of {run.epochs}"


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _origin(runs: Sequence[Run]) -> list[str]:
    def listed(texts: Iterable[str]) -> str:
        return "; ".join(sorted(set(texts))) or "not recorded"

    dates = [run.finished for run in runs if run.finished is not None]
    days = sorted({f"{date:%Y-%m-%d %H:%M}" for date in dates})
    return [
        heading("Where it comes from"),
        facts(
            {
                "data set": listed(_data_set(run) for run in runs),
                "teacher": listed(_teacher(run) for run in runs),
                "student": listed(run.recipe.student.network for run in runs),
                "results of": " to ".join(dict.fromkeys([*days[:1], *days[-1:]])) or "–",
                "runs": ", ".join(str(run.folder) for run in runs),
                "machine": listed(_machine(run) for run in runs if run.is_finished),
            }
        ),
    ]


def _data_set(run: Run) -> str:
    """Describe it as `train.beton, tested on val.beton, 32 pixels`."""
    data = run.recipe.data
    return f"{data.train}, tested on {data.val}, {data.image_size} pixels"


def _teacher(run: Run) -> str:
    """Describe it as `resnet20, top-1 67.5%`, as far as its own run is there."""
    teacher = run.recipe.teacher
    if teacher is None:
        return "none: trained on the labels"
    reached = (
        "accuracy not recorded"
        if run.teacher_top1 is None
        else f"top-1 {run.teacher_top1:.2%} in its own run"
    )
    return f"{teacher.network} ({teacher.weights or teacher.checkpoint}), {reached}"


def _machine(run: Run) -> str:
    """Describe it as `AMD EPYC, 2 cores, torch 2.14.1, on cuda with dali`."""
    result = run.result
    assert result is not None, "only finished runs name their machine"
    machine = result.machine
    words = [machine.get("cpu", "unknown"), f"{machine.get('cores', '?')} cores"]
    words += [*machine.get("gpus", []), f"torch {result.versions.get('torch', '?')}"]
    if result.device is not None:
        words.append(f"on {result.device} with {result.backend}")
    return ", ".join(words)
