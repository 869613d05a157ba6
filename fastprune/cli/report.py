"""Pages about training runs, or about a score table."""

from pathlib import Path
from typing import Any

import click

from fastprune.cli.options import COUNT, PATH, flags_of

_SECONDS = click.FloatRange(min=0)
_SUFFIXES = (".parquet", ".npy")
_OF_RUNS = ("reference", "convert_seconds", "score_seconds")


@click.command()
@click.argument("paths", nargs=-1, required=True, metavar="RUN... | SCORES [SUBSET]", type=PATH)
@click.option(
    "-o",
    "--out",
    show_default=False,
    type=PATH,
    help="Page to write.  [default: named after what is reported on, such as runs-report.html]",
)
@click.option("--reference", help="Runs: name that ratios refer to.  [default: runs on all rows]")
@click.option("--convert-seconds", type=_SECONDS, help="Runs: count this many of conversion.")
@click.option(
    "--score-seconds", type=_SECONDS, help="Runs: count this many, if a subset records none."
)
@click.option("--beton", type=PATH, help="Scores: images, for contact sheets of the classes.")
@click.option(
    "--metric",
    help="Scores: difficulty to show.  [default: the one SUBSET was made by, or centroid]",
)
@click.option(
    "--classes", "num_classes", type=COUNT, help="Scores: classes with a sheet.  [default: 10]"
)
@click.option(
    "--class",
    "classes",
    multiple=True,
    help="Scores: class with a sheet, by name or number; may be given several times.",
)
@click.option("--images", "per_strip", type=COUNT, help="Scores: images in a strip.  [default: 8]")
@click.pass_context
def report(
    context: click.Context, /, paths: tuple[Path, ...], out: Path | None, **options: Any
) -> None:
    """Draw training runs, or a score table, as an HTML page.

    RUN is a folder that `train` wrote, or one with such folders in it: accuracy over time and over
    epochs, costs and where the time went, seeds of one name taken together; the charts are written
    beside the page too. SCORES is a score table: what is easy, what SUBSET keeps, what is hard.
    """
    given = {name: value for name, value in options.items() if value not in (None, ())}
    # Named after its subject, so that the page of another report is not overwritten.
    out = out or Path(f"{'-'.join(path.resolve().stem for path in paths[:2])}-report.html")
    of_scores = any(path.is_file() or path.suffix in _SUFFIXES for path in paths)
    for name in given:
        if (name in _OF_RUNS) == of_scores:
            kind = "runs" if of_scores else "score tables"
            flag = flags_of(context.command)[name]
            raise click.UsageError(f"{flag} is for {kind}. Leave it out.")
    if of_scores:
        _report_scores(paths, out, given)
    else:
        _report_runs(paths, out, given)


def _report_runs(paths: tuple[Path, ...], out: Path, options: dict[str, Any]) -> None:
    """Report on runs."""
    from fastprune.report.training import report_runs

    runs = report_runs(paths, out, **options).runs
    finished = sum(run.is_finished for run in runs)
    click.echo(f"reported on {len(runs)} runs ({finished} finished) -> {out}")


def _report_scores(paths: tuple[Path, ...], out: Path, options: dict[str, Any]) -> None:
    """Report on a score table."""
    from fastprune.report.scores import report_scores

    if len(paths) > 2 or any(path.is_dir() for path in paths):
        raise click.UsageError("give folders of runs, or one score table and at most one subset.")
    beton = options.pop("beton", None)
    subset = paths[1] if len(paths) == 2 else None
    report_scores(paths[0], out, subset_path=subset, beton_path=beton, **options)
    click.echo(f"reported on {paths[0]} -> {out}")


COMMANDS: tuple[click.Command, ...] = (report,)
