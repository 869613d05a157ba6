"""The page about training runs: the verdict, accuracy, cost, and where the time went."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from fastprune.base.errors import InvalidValueError
from fastprune.base.files import atomic_path, write_text
from fastprune.report.page import (
    facts,
    heading,
    note,
    page,
    picture,
    table,
    verdict_list,
    warning,
)
from fastprune.report.run_charts import accuracy_png, cost_png, seconds_png
from fastprune.report.runs import (
    Group,
    Run,
    choose_reference,
    cost_ratios,
    group_runs,
    mean,
    mean_and_sd,
    read_runs,
)
from fastprune.report.verdict import (
    configuration_differences,
    difference,
    verdict,
    warnings_about,
)

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
    "ratio",
    "with scoring",
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
) -> list[Run]:
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
        The runs that are on the page.

    Raises:
        ArtifactError: a folder is no run, or a file cannot be read or written.
        InvalidValueError: seconds are negative, or no finished run has the reference's name.
    """
    if convert_seconds is not None and convert_seconds < 0:
        raise InvalidValueError(f"convert_seconds ({convert_seconds}) must be >= 0.")
    runs = read_runs(paths, score_seconds=score_seconds)
    groups = group_runs(runs)
    baseline = choose_reference(groups, reference)
    groups.sort(key=lambda group: group is not baseline)
    out_path = Path(out_path)
    parts = [
        verdict_list(verdict(groups, baseline)),
        *map(warning, warnings_about(groups)),
        *_accuracy_over_cost(groups, baseline, out_path),
        *_accuracy(groups, baseline, out_path),
        *_costs(groups, baseline, convert_seconds, out_path),
        *_settings(groups),
        *_origin(runs),
    ]
    write_text(out_path, page("Training runs", parts))
    return runs


def _write_png(out_path: Path, what: str, png: bytes) -> None:
    with atomic_path(out_path.with_name(f"{out_path.stem}-{what}.png")) as temporary:
        temporary.write_bytes(png)


def _accuracy_over_cost(
    groups: Sequence[Group], baseline: Group | None, out_path: Path
) -> list[str]:
    """The chart that a page of finished runs begins with."""
    png = cost_png([group for group in groups if group.is_finished], baseline)
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


def _accuracy(groups: Sequence[Group], baseline: Group | None, out_path: Path) -> list[str]:
    def delta(group: Group) -> str:
        if baseline is None or group is baseline or not group.is_finished:
            return "–"
        return str(difference(group, baseline) or "–")

    lines = [
        [
            group.name,
            group.runs[0].selection,
            ", ".join(str(run.seed) for run in group.runs),
            ", ".join(dict.fromkeys(_epochs(run) for run in group.runs)),
            mean_and_sd([_percent(run.top1_last) for run in group.runs], 2),
            delta(group),
            mean_and_sd([_percent(run.top1_best) for run in group.runs], 2),
        ]
        for group in groups
    ]
    parts = [
        heading("Accuracy"),
        table(_REACHED, lines, text=(0, 1)),
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
        # Seconds of an unfinished run are those of its log, which has no phases.
        unfinished = (
            ""
            if all(group.is_finished for group in groups)
            else " An unfinished run is dashed; its seconds have start-up and validation in them."
        )
        parts += [
            picture(png, "Top-1 over seconds and over epochs", may_scroll=True),
            note(
                "A thin line is a run, a thick one the mean of its seeds. Seconds count scoring "
                f"and the epochs, without start-up and validation.{unfinished}"
            ),
        ]
    return parts


def _costs(
    groups: Sequence[Group],
    baseline: Group | None,
    convert_seconds: float | None,
    out_path: Path,
) -> list[str]:
    finished = [group for group in groups if group.is_finished]
    if not finished:
        return [heading("Cost"), note("No run is finished yet.")]
    png = seconds_png(finished, convert_seconds=convert_seconds)
    _write_png(out_path, "seconds", png)
    return [
        heading("Cost"),
        table(_COST, [_cost_line(group, baseline, convert_seconds) for group in finished]),
        note(_cost_note(finished, baseline, convert_seconds)),
        *_taught(finished),
        heading("Where the time went"),
        picture(png, "Seconds of each run by use", may_scroll=True),
        note("The mean of each name's runs."),
    ]


def _cost_line(group: Group, baseline: Group | None, convert_seconds: float | None) -> list[str]:
    """Write one line of the table; a dash stands for a number that is not recorded."""
    runs = group.runs
    paid = [run.paid_seconds(total=True) for run in runs]
    totals = [None if seconds is None else seconds + (convert_seconds or 0.0) for seconds in paid]
    ratios = (
        [] if baseline is None else cost_ratios(group, baseline, with_scoring=with_scoring)
        for with_scoring in (False, True)
    )
    steps = mean([run.number("steps") for run in runs])
    their_steps = None if baseline is None else mean([r.number("steps") for r in baseline.runs])
    return [
        group.name,
        mean_and_sd([mean([run.number("images_per_epoch") for run in runs])], 0),
        mean_and_sd([run.number("train_seconds") for run in runs], 1),
        mean_and_sd([mean([run.score_seconds for run in runs])], 1),
        mean_and_sd(totals, 1),
        *(mean_and_sd(values, 3) for values in ratios),
        f"{steps / their_steps:.3f}" if steps and their_steps else "–",
        mean_and_sd([_percent(run.number("data_wait_share")) for run in runs], 1),
    ]


def _cost_note(
    groups: Sequence[Group], baseline: Group | None, convert_seconds: float | None
) -> str:
    """Explain the table, and name the costs that are missing from it."""
    remarks = [
        "Training is the epochs, without start-up and validation. Total is what was waited for, "
        + (
            "with scoring. Conversion is not counted: give its seconds by --convert-seconds."
            if convert_seconds is None
            else f"with scoring and {convert_seconds:,.1f} s of conversion."
        ),
        "No ratios: name the runs to compare with by --reference."
        if baseline is None
        else f"Ratios, of training, and of training, scoring and start-up, are to {baseline.name}, "
        "seed by seed. They count each step with the median, so that a phase in which something "
        "else ran on the machine does not change them. Waiting is the share of training in which "
        "no batch was there.",
    ]
    if any(run.score_seconds is None for group in groups for run in group.runs):
        remarks.append(
            "A dash stands for what is not recorded: where a subset does not record its scores' "
            "seconds, give them by --score-seconds."
        )
    return " ".join(remarks)


def _taught(groups: Sequence[Group]) -> list[str]:
    """Say who asked the teacher, where a run had its logits from a cache."""
    if not any(run.number("teacher_forwards_saved") for group in groups for run in group.runs):
        return []
    lines = []
    for group in groups:
        forwards, saved, cache_bytes, seconds = (
            mean([run.number(name) for run in group.runs])
            for name in (
                "teacher_forwards",
                "teacher_forwards_saved",
                "cache_bytes",
                "cache_fill_seconds",
            )
        )
        payer = "later student" if saved and not forwards else "first student"
        lines.append(
            [
                group.name,
                payer if saved else "every epoch",
                mean_and_sd([forwards], 0),
                mean_and_sd([saved], 0),
                mean_and_sd([None if cache_bytes is None else cache_bytes / 1e6], 1),
                mean_and_sd([seconds], 1),
            ]
        )
    return [
        table(_TAUGHT, lines),
        note(
            "A teacher cache is paid for by the first student, or by scoring, and asked by later "
            "ones. Filling ran beside the training."
        ),
    ]


def _settings(groups: Sequence[Group]) -> list[str]:
    differing = configuration_differences(groups)
    if len(groups) < 2:
        return []
    if not differing:
        return [heading("Settings that differ"), note("None: the runs have one recipe.")]
    lines = [[name, *values] for name, values in differing.items()]
    columns = ["setting", *(group.name for group in groups)]
    return [
        heading("Settings that differ"),
        table(columns, lines, text=range(len(columns))),
        note("Everything else in the recipes is the same, seed, name and folder aside."),
    ]


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
                "student": listed(run.recipe["student"]["network"] for run in runs),
                "results of": " to ".join(dict.fromkeys([*days[:1], *days[-1:]])) or "–",
                "runs": ", ".join(str(run.folder) for run in runs),
                "machine": listed(_machine(run) for run in runs if run.is_finished),
            }
        ),
    ]


def _data_set(run: Run) -> str:
    """Describe it as `train.beton, tested on val.beton, 32 pixels`."""
    data = run.recipe["data"]
    return f"{data['train']}, tested on {data['val']}, {data['image_size']} pixels"


def _teacher(run: Run) -> str:
    """Describe it as `resnet20, top-1 67.5%`, as far as its own run is there."""
    teacher = run.recipe.get("teacher")
    if teacher is None:
        return "none: trained on the labels"
    source = teacher.get("weights") or teacher.get("checkpoint")
    reached = (
        "accuracy not recorded"
        if run.teacher_top1 is None
        else f"top-1 {run.teacher_top1:.2%} in its own run"
    )
    return f"{teacher['network']} ({source}), {reached}"


def _machine(run: Run) -> str:
    """Describe it as `AMD EPYC, 2 cores, torch 2.14.1, on cuda with dali`."""
    recorded = run.result or {}
    machine, versions = recorded.get("machine", {}), recorded.get("versions", {})
    words = [machine.get("cpu", "unknown"), f"{machine.get('cores', '?')} cores"]
    words += [*machine.get("gpus", []), f"torch {versions.get('torch', '?')}"]
    if "device" in recorded:
        words.append(f"on {recorded['device']} with {recorded.get('backend', 'an unknown engine')}")
    return ", ".join(words)
