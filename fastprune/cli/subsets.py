"""Subcommands around subsets."""

import json
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastprune.cli.options import (
    EXPORT_FORMATS,
    PATH,
    QUOTAS,
    STRATEGIES,
    Metric,
    NumberList,
    Share,
    json_option,
    show,
)

if TYPE_CHECKING:
    from fastprune.beton.beton import Beton
    from fastprune.rows.score_table import ScoreTable
    from fastprune.rows.subset import Subset


@click.command()
@click.argument("scores", type=PATH)
@click.option("-o", "--out", required=True, type=PATH, help="Subset to write (.npy).")
@click.option("--keep", type=Share(), help="Share of the rows to keep, in (0, 1].")
@click.option(
    "--sweep",
    metavar="R,R,...",
    type=NumberList("0.3,0.4,0.5,0.7", item=Share()),
    default=(),
    show_default=False,
    help="Keep each of these shares; subset.npy becomes subset-30.npy and so on.",
)
@click.option(
    "--beton",
    type=PATH,
    help="Images of SCORES: needed where these are numbers of another tool (.npy, .csv, "
    ".parquet); a score table is held against them.",
)
@click.option(
    "--metric",
    type=Metric(),
    help="Rank rows by a metric of the table, or a blend by rank such as "
    "centroid:0.5,loss:0.5.  [default: centroid; loss with "
    "--compat mdslr, centroid_median with --strategy moderate]",
)
@click.option(
    "--strategy",
    type=click.Choice(STRATEGIES),
    default="medium",
    help="Which rows of a class are kept.",
)
@click.option(
    "--quota", type=click.Choice(QUOTAS), default="proportional", help="Share of each class."
)
@click.option("--global", "is_global", is_flag=True, help="Take all rows as one class.")
@click.option(
    "--quantile",
    type=click.FloatRange(0, 1),
    default=0.5,
    help="window: where its center is, in [0, 1].",
)
@click.option(
    "--drop-hardest",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.1,
    help="ccs: share of the hardest rows left out, in [0, 1).",
)
@click.option("--seed", default=0, help="random, ccs: seed of the draw.")
@click.option(
    "--compat",
    type=click.Choice(["mdslr"]),
    help="mdslr: the reference code's selection, row for row.",
)
@click.option(
    "--exclude",
    type=PATH,
    help="Rows that are never kept: cleanlab's issues (.csv, .parquet), rows or a mask (.npy), a "
    "list (.txt, .json); --keep is a share of the others.",
)
@click.option(
    "--allow-empty-classes", is_flag=True, help="Let classes that have rows keep none of them."
)
@json_option
def select(
    scores: Path,
    out: Path,
    keep: float | None,
    sweep: tuple[float, ...],
    beton: Path | None,
    is_global: bool,
    exclude: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Choose the rows of SCORES that are kept, and write them as a subset."""
    from fastprune.selection.importers import read_excluded
    from fastprune.selection.subsets import make_subset

    ratios = sweep if keep is None else (keep, *sweep)
    if len(ratios) != max(1, len(sweep)):
        raise click.UsageError("give --keep or --sweep, one of them.")
    started = time.perf_counter()
    opened = None if beton is None else _opened(beton)
    table = _load_scores(scores, opened)
    excluded = None if exclude is None else read_excluded(exclude, table.num_rows, beton=opened)
    written = []
    for ratio in dict.fromkeys(ratios):
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
        seconds = time.perf_counter() - started
        written.append(_fields(subset, path, seconds=seconds))
        if not as_json:
            click.echo(f"{_kept(subset)} in {seconds:.1f} s -> {path}")
        started = time.perf_counter()
    if as_json:
        click.echo(json.dumps(written if sweep else written[0], indent=2))


@click.command("import")
@click.argument("listing", type=PATH)
@click.option("--beton", required=True, type=PATH, help="Images that the rows are of.")
@click.option("-o", "--out", required=True, type=PATH, help="Subset to write (.npy).")
@click.option("--drop", is_flag=True, help="LISTING is of what is dropped, not kept.")
@click.option(
    "--class-std",
    type=PATH,
    help="MDSLR's std.npy, which logit reshaping needs.",
)
@json_option
def import_(
    listing: Path, beton: Path, out: Path, drop: bool, class_std: Path | None, as_json: bool
) -> None:
    """Make a subset of LISTING, a file of another tool.

    LISTING holds rows (.npy, .txt, .json), file names (.txt, .json), or DeepCore's indices and
    scores (.json, .npz). For another tool's scores, see select --beton.
    """
    from fastprune.beton.opening import open_beton
    from fastprune.selection.importers import import_subset

    subset = import_subset(
        listing, open_beton(beton), drop=drop, class_std=class_std, command=_command_line()
    )
    subset.save(out)
    show(f"{_kept(subset)} -> {out}", _fields(subset, out), as_json=as_json)


@click.command()
@click.argument("subset", type=PATH)
@click.option(
    "-o",
    "--out",
    required=True,
    type=PATH,
    help="File to write; for mdslr, symlinks and huggingface a folder.",
)
@click.option(
    "--format",
    "file_format",
    type=click.Choice(EXPORT_FORMATS),
    required=True,
    help="mdslr (ratio_50.npy and std.npy); deepcore (JSON); rows, dropped or names (text); "
    "indices of torch.utils.data.Subset (.npy); symlinks to the image files; webdataset (JSON: "
    "keys of each shard); huggingface (Parquet with images and scores).",
)
@click.option("--beton", type=PATH, help="The images, whose manifest has the files' names.")
@click.option("--scores", type=PATH, help="deepcore, huggingface: table that rows were chosen by.")
@click.option("--images", type=PATH, help="symlinks: the folder that was converted.")
@json_option
def export(
    subset: Path,
    out: Path,
    file_format: str,
    beton: Path | None,
    scores: Path | None,
    images: Path | None,
    as_json: bool,
) -> None:
    """Write SUBSET for another tool."""
    from fastprune.beton.opening import open_beton
    from fastprune.rows.score_table import ScoreTable
    from fastprune.rows.subset import Subset
    from fastprune.selection.exporters import export_subset

    loaded = Subset.load(subset)
    written = export_subset(
        loaded,
        out,
        file_format,
        beton=None if beton is None else open_beton(beton),
        scores=None if scores is None else ScoreTable.load(scores),
        images=images,
    )
    show(
        f"exported {len(loaded.rows):,} rows -> {', '.join(map(str, written))}",
        {"rows": len(loaded.rows), "written": written},
        as_json=as_json,
    )


def _opened(path: Path) -> "Beton":
    from fastprune.beton.opening import open_beton

    return open_beton(path)


def _load_scores(path: Path, beton: "Beton | None") -> "ScoreTable":
    """Load a score table, or another tool's scores of a beton."""
    from fastprune.rows.score_table import ScoreTable

    if beton is None:
        return ScoreTable.load(path)
    from fastprune.selection.importers import import_scores

    return import_scores(path, beton)


def _command_line() -> str:
    """Quote the command as it was typed, for the sidecar."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _kept(subset: "Subset") -> str:
    """`kept 640,000 of 1,281,167 rows (49.95%)`."""
    assert subset.fingerprint is not None
    kept, num_rows = len(subset.rows), subset.fingerprint.num_rows
    return f"kept {kept:,} of {num_rows:,} rows ({kept / num_rows:.2%})"


def _fields(subset: "Subset", path: Path, **more: float) -> dict[str, Any]:
    """Describe a written subset in JSON values."""
    assert subset.fingerprint is not None
    kept, num_rows = len(subset.rows), subset.fingerprint.num_rows
    return {"rows": kept, "of_rows": num_rows, "share": kept / num_rows, **more, "out": str(path)}


COMMANDS: tuple[click.Command, ...] = (select, import_, export)
