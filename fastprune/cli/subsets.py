"""Subcommands around subsets."""

import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from fastprune.artifacts.scores import ScoreTable
    from fastprune.artifacts.subset import Subset


def _ratios(
    context: click.Context, parameter: click.Parameter, text: str | None
) -> tuple[float, ...]:
    """Parse numbers with commas between."""
    del context, parameter
    try:
        return tuple(map(float, text.split(","))) if text else ()
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not a list such as 0.3,0.4,0.5,0.7.") from error


@click.command()
@click.argument("scores", type=click.Path(path_type=Path))
@click.option(
    "-o", "--out", required=True, type=click.Path(path_type=Path), help="Subset to write (.npy)."
)
@click.option("--keep", type=float, help="Share of the rows to keep, in (0, 1].")
@click.option(
    "--sweep",
    metavar="R,R,...",
    callback=_ratios,
    help="Keep each of these shares; subset.npy becomes subset-30.npy and so on.",
)
@click.option(
    "--beton",
    type=click.Path(path_type=Path),
    help="Images of SCORES: needed where these are numbers of another tool (.npy, .csv, "
    ".parquet); a score table is held against them.",
)
@click.option(
    "--metric",
    help="Rank rows by a metric of the table, or a blend by rank such as "
    "centroid:0.5,loss:0.5.  [default: centroid; loss with --compat mdslr]",
)
@click.option(
    "--strategy",
    default="medium",
    help="medium, window, easy, hard, random, moderate or ccs.",
)
@click.option("--quota", default="proportional", help="Rows per class: proportional or equal.")
@click.option("--global", "is_global", is_flag=True, help="Take all rows as one class.")
@click.option("--quantile", default=0.5, help="window: where its center is, in [0, 1].")
@click.option(
    "--drop-hardest", default=0.1, help="ccs: share of the hardest rows left out, in [0, 1)."
)
@click.option("--seed", default=0, help="random, ccs: seed of the draw.")
@click.option("--compat", help="mdslr: the reference code's selection, row for row.")
@click.option(
    "--exclude",
    type=click.Path(path_type=Path),
    help="Rows that are never kept (.npy); --keep is a share of the others.",
)
@click.option(
    "--allow-empty-classes", is_flag=True, help="Let classes that have rows keep none of them."
)
def select(
    scores: Path,
    out: Path,
    keep: float | None,
    sweep: tuple[float, ...],
    beton: Path | None,
    is_global: bool,
    exclude: Path | None,
    **options: Any,
) -> None:
    """Choose the rows of SCORES that are kept, and write them as a subset."""
    from fastprune.selection.importers import read_array
    from fastprune.selection.subsets import make_subset

    ratios = sweep if keep is None else (keep, *sweep)
    if len(ratios) != max(1, len(sweep)):
        raise click.UsageError("give --keep or --sweep, one of them.")
    started = time.perf_counter()
    table = _load_scores(scores, beton)
    excluded = None if exclude is None else read_array(exclude)
    for ratio in ratios:
        subset = make_subset(
            table,
            keep_ratio=ratio,
            per_class=not is_global,
            exclude=excluded,
            command=_command_line(),
            **options,
        )
        path = out.with_name(f"{out.stem}-{100 * ratio:.6g}{out.suffix}") if sweep else out
        subset.save(path)
        click.echo(f"{_kept(subset)} in {time.perf_counter() - started:.1f} s -> {path}")
        started = time.perf_counter()


@click.command("import")
@click.argument("listing", type=click.Path(path_type=Path))
@click.option(
    "--beton", required=True, type=click.Path(path_type=Path), help="Images that the rows are of."
)
@click.option(
    "-o", "--out", required=True, type=click.Path(path_type=Path), help="Subset to write (.npy)."
)
@click.option("--drop", is_flag=True, help="LISTING is of what is dropped, not kept.")
@click.option(
    "--class-std",
    type=click.Path(path_type=Path),
    help="MDSLR's std.npy, which logit reshaping needs.",
)
def import_(listing: Path, beton: Path, out: Path, drop: bool, class_std: Path | None) -> None:
    """Make a subset of LISTING, a file of another tool.

    LISTING holds rows (.npy, .txt, .json), file names (.txt, .json), or DeepCore's indices and
    scores (.json, .npz). For another tool's scores, see select --beton.
    """
    from fastprune.beton.reader import open_beton
    from fastprune.selection.importers import import_subset

    subset = import_subset(
        listing, open_beton(beton), drop=drop, class_std=class_std, command=_command_line()
    )
    subset.save(out)
    click.echo(f"{_kept(subset)} -> {out}")


@click.command()
@click.argument("subset", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="File to write; for mdslr a folder.",
)
@click.option(
    "--format",
    "file_format",
    required=True,
    help="mdslr (ratio_50.npy and std.npy), deepcore (JSON), rows, dropped or names (text).",
)
@click.option(
    "--beton", type=click.Path(path_type=Path), help="names: images whose manifest has the names."
)
@click.option(
    "--scores", type=click.Path(path_type=Path), help="deepcore: table that rows were chosen by."
)
def export(
    subset: Path, out: Path, file_format: str, beton: Path | None, scores: Path | None
) -> None:
    """Write SUBSET for another tool."""
    from fastprune.artifacts.scores import ScoreTable
    from fastprune.artifacts.subset import Subset
    from fastprune.beton.reader import open_beton
    from fastprune.selection.exporters import export_subset

    loaded = Subset.load(subset)
    written = export_subset(
        loaded,
        out,
        file_format,
        beton=None if beton is None else open_beton(beton),
        scores=None if scores is None else ScoreTable.load(scores),
    )
    click.echo(f"exported {len(loaded.rows):,} rows -> {', '.join(map(str, written))}")


def _load_scores(path: Path, beton: Path | None) -> "ScoreTable":
    """Load a score table, or another tool's scores of a beton."""
    from fastprune.artifacts.scores import ScoreTable

    if beton is None:
        return ScoreTable.load(path)
    from fastprune.beton.reader import open_beton
    from fastprune.selection.importers import import_scores

    return import_scores(path, open_beton(beton))


def _command_line() -> str:
    """Quote the command as it was typed, for the sidecar."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _kept(subset: "Subset") -> str:
    """`kept 640,000 of 1,281,167 rows (49.95%)`."""
    assert subset.fingerprint is not None
    kept, num_rows = len(subset.rows), subset.fingerprint.num_rows
    return f"kept {kept:,} of {num_rows:,} rows ({kept / num_rows:.2%})"


COMMANDS: tuple[click.Command, ...] = (select, import_, export)
