"""The page about training runs: accuracy, cost, and where the time went."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from fastprune.artifacts.atomic import atomic_path, write_text
from fastprune.errors import InvalidValueError
from fastprune.report.page import facts, heading, note, page, picture, table
from fastprune.report.run_charts import accuracy_png, seconds_png
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

_REACHED = ("run", "seeds", "trained on", "epochs", "top-1 last, %", "top-1 best, %")
_COST = (
    "run",
    "images per epoch",
    "training, s",
    "scoring, s",
    "total, s",
    "ratio",
    "with scoring",
    "waiting, %",
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
    `<out>-accuracy.png` and `<out>-seconds.png`.

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
    chosen = choose_reference(groups, reference)
    groups.sort(key=lambda group: group is not chosen)
    out_path = Path(out_path)
    parts = [
        *_accuracy(groups, out_path),
        *_costs(groups, chosen, convert_seconds, out_path),
        *_origin(runs),
    ]
    write_text(out_path, page("Training runs", parts))
    return runs


def _write_png(out_path: Path, what: str, png: bytes) -> None:
    with atomic_path(out_path.with_name(f"{out_path.stem}-{what}.png")) as temporary:
        temporary.write_bytes(png)


def _accuracy(groups: Sequence[Group], out_path: Path) -> list[str]:
    lines = [
        [
            group.name,
            ", ".join(str(run.seed) for run in group.runs),
            group.runs[0].selection,
            ", ".join(dict.fromkeys(_epochs(run) for run in group.runs)),
            mean_and_sd([_percent(run.top1_last) for run in group.runs], 2),
            mean_and_sd([_percent(run.top1_best) for run in group.runs], 2),
        ]
        for group in groups
    ]
    parts = [
        heading("Accuracy"),
        table(_REACHED, lines),
        note(
            "Mean ± standard deviation over seeds. The best of all validations is chosen on the "
            "validation set, so it flatters: compare the last."
        ),
    ]
    if any(run.curve for group in groups for run in group.runs):
        png = accuracy_png(groups)
        _write_png(out_path, "accuracy", png)
        parts += [picture(png, "Top-1 over seconds and over epochs"), note(_curves_note(groups))]
    return parts


def _costs(
    groups: Sequence[Group],
    reference: Group | None,
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
        table(_COST, [_cost_line(group, reference, convert_seconds) for group in finished]),
        note(_cost_note(finished, reference, convert_seconds)),
        heading("Where the time went"),
        picture(png, "Seconds of each run by use"),
        note("The mean of each name's runs."),
    ]


def _cost_line(group: Group, reference: Group | None, convert_seconds: float | None) -> list[str]:
    """Write one line of the table; a dash stands for a number that is not recorded."""
    runs = group.runs
    ratios = (
        [] if reference is None else cost_ratios(group, reference, with_scoring=with_scoring)
        for with_scoring in (False, True)
    )
    return [
        group.name,
        mean_and_sd([mean([run.number("images_per_epoch") for run in runs])], 0),
        mean_and_sd([run.number("train_seconds") for run in runs], 1),
        mean_and_sd([mean([run.score_seconds for run in runs])], 1),
        mean_and_sd([_total(run, convert_seconds) for run in runs], 1),
        *(mean_and_sd(values, 3) for values in ratios),
        mean_and_sd([_percent(run.number("data_wait_share")) for run in runs], 1),
    ]


def _cost_note(
    groups: Sequence[Group], reference: Group | None, convert_seconds: float | None
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
        if reference is None
        else f"Ratios, of training and of scoring and training, are to {reference.name}, seed by "
        "seed. Waiting is the share of training in which no batch was there.",
    ]
    if any(run.score_seconds is None for group in groups for run in group.runs):
        remarks.append(
            "A dash stands for what is not recorded: where a subset does not record its scores' "
            "seconds, give them by --score-seconds."
        )
    return " ".join(remarks)


def _epochs(run: Run) -> str:
    """Count the planned epochs, and for an unfinished run the validated ones."""
    if run.is_finished:
        return str(run.epochs)
    done = run.curve[-1].epoch if run.curve else 0
    return f"{done:g} of {run.epochs}"


def _total(run: Run, convert_seconds: float | None) -> float | None:
    paid = run.paid_seconds(total=True)
    return None if paid is None else paid + (convert_seconds or 0.0)


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _curves_note(groups: Sequence[Group]) -> str:
    unfinished = (
        ""
        if all(group.is_finished for group in groups)
        else (" An unfinished run is dashed; its seconds have start-up and validation in them.")
    )
    return (
        "A thin line is a run, a thick one the mean of its seeds. Seconds count scoring and the "
        f"epochs, without start-up and validation.{unfinished}"
    )


def _origin(runs: Sequence[Run]) -> list[str]:
    """Name folders, machine and versions."""
    machines = {_machine(run) for run in runs if run.is_finished}
    return [
        heading("Where it comes from"),
        facts(
            {
                "runs": ", ".join(str(run.folder) for run in runs),
                "machine": "; ".join(sorted(machines)) or "not recorded",
            }
        ),
    ]


def _machine(run: Run) -> str:
    """Describe it as `AMD EPYC, 2 cores, torch 2.14.1, on cuda with dali`."""
    recorded = run.result or {}
    machine, versions = recorded.get("machine", {}), recorded.get("versions", {})
    words = [machine.get("cpu", "unknown"), f"{machine.get('cores', '?')} cores"]
    words += [*machine.get("gpus", []), f"torch {versions.get('torch', '?')}"]
    if "device" in recorded:
        words.append(f"on {recorded['device']} with {recorded.get('backend', 'an unknown engine')}")
    return ", ".join(words)
