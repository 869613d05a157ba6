"""Subsets: selected, imported, exported."""

import json
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastprune.cli.options import PATH, SHARE, SHARES, json_option, setting_options, show
from fastprune.settings import SelectSettings
from fastprune.settings.score import (
    CLUSTER_METRIC,
    FEATURE_METRICS,
    LOGIT_METRICS,
    NOT_DIFFICULTIES,
)
from fastprune.settings.select import EXPORT_FORMATS

if TYPE_CHECKING:
    from fastprune.rows.subset import Subset


class _Metric(click.ParamType[str]):
    """A metric or a blend of them: any text, since other tools' tables have their own metrics."""

    name = "metric"

    def shell_complete(self, ctx: Any, param: Any, incomplete: str) -> list[Any]:
        """Complete the metrics of our own tables."""
        from click.shell_completion import CompletionItem

        del ctx, param
        names = (*FEATURE_METRICS, *LOGIT_METRICS, CLUSTER_METRIC)
        known = [name for name in names if name not in NOT_DIFFICULTIES]
        return [CompletionItem(name) for name in known if name.startswith(incomplete)]


@click.command()
@click.argument("scores", type=PATH)
@click.option("-o", "--out", required=True, type=PATH, help="Subset to write (.npy).")
@click.option(
    "--keep",
    "keep_ratio",
    type=SHARE,
    help="Share of the rows to keep.",
)
@click.option(
    "--sweep",
    metavar="R,R,...",
    type=SHARES,
    help="Keep each of these shares; subset.npy becomes subset-30.npy and so on.",
)
@click.option(
    "--beton",
    type=PATH,
    help="Images of SCORES: needed for another tool's numbers (.npy, .csv, .parquet); a score "
    "table is compared with them.",
)
@setting_options(SelectSettings, without=("keep_ratio", "per_class"), types={"metric": _Metric()})
@click.option("--global", "is_global", is_flag=True, help="Take all rows as one class.")
@click.option(
    "--exclude",
    type=PATH,
    help="Rows that are never kept: cleanlab's issues (.csv, .parquet), rows or a mask (.npy), a "
    "list (.txt, .json); --keep is a share of the others.",
)
@json_option
def select(
    scores: Path,
    out: Path,
    keep_ratio: float | None,
    sweep: tuple[float, ...] | None,
    beton: Path | None,
    is_global: bool,
    exclude: Path | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Choose the rows of SCORES that are kept, and write them as a subset."""
    from fastprune.beton.opening import open_beton
    from fastprune.rows.score_table import ScoreTable
    from fastprune.selection.importers import import_scores, read_excluded
    from fastprune.selection.subsets import make_subset

    if (keep_ratio is None) == (sweep is None):
        raise click.UsageError("give either --keep or --sweep.")
    started = time.perf_counter()
    opened = None if beton is None else open_beton(beton)
    table = ScoreTable.load(scores) if opened is None else import_scores(scores, opened)
    excluded = None if exclude is None else read_excluded(exclude, table.num_rows, beton=opened)
    written = []
    ratios = (keep_ratio,) if keep_ratio is not None else sweep or ()
    for ratio in dict.fromkeys(ratios):
        subset = make_subset(
            table,
            keep_ratio=ratio,
            per_class=not is_global,
            exclude=excluded,
            command=_command_line(),
            **settings,
        )
        path = out.with_name(f"{out.stem}-{100 * ratio:.6g}{out.suffix}") if sweep else out
        subset.save(path)
        seconds = time.perf_counter() - started
        line, fields = _summary(subset, path, seconds=seconds)
        written.append(fields)
        if not as_json:
            click.echo(line)
        started = time.perf_counter()
    if as_json:
        click.echo(json.dumps(written if sweep else written[0], indent=2))


@click.command("import")
@click.argument("listing", type=PATH)
@click.option("--beton", required=True, type=PATH, help="The images that the rows belong to.")
@click.option("-o", "--out", required=True, type=PATH, help="Subset to write (.npy).")
@click.option("--drop", is_flag=True, help="LISTING holds the rows to drop, not those to keep.")
@click.option("--class-std", type=PATH, help="MDSLR's std.npy, which logit reshaping needs.")
@json_option
def import_(
    listing: Path, beton: Path, out: Path, drop: bool, class_std: Path | None, as_json: bool
) -> None:
    """Make a subset from LISTING, a file of another tool.

    LISTING holds rows (.npy, .txt, .json), file names (.txt, .json), or DeepCore's indices and
    scores (.json, .npz). For another tool's scores, see select --beton.
    """
    from fastprune.beton.opening import open_beton
    from fastprune.selection.importers import import_subset

    subset = import_subset(
        listing, open_beton(beton), drop=drop, class_std=class_std, command=_command_line()
    )
    subset.save(out)
    line, fields = _summary(subset, out)
    show(line, fields, as_json=as_json)


@click.command()
@click.argument("subset", type=PATH)
@click.option(
    "-o",
    "--out",
    required=True,
    type=PATH,
    help="File to write; for mdslr and huggingface a folder.",
)
@click.option(
    "--format",
    "file_format",
    type=click.Choice(EXPORT_FORMATS),
    required=True,
    help="mdslr (ratio_50.npy and std.npy); rows, dropped or names (text); indices of "
    "torch.utils.data.Subset (.npy); huggingface (Parquet with images and scores).",
)
@click.option("--beton", type=PATH, help="The images; their manifest has the files' names.")
@click.option("--scores", type=PATH, help="huggingface: score table to include.")
@json_option
def export(
    subset: Path,
    out: Path,
    file_format: str,
    beton: Path | None,
    scores: Path | None,
    as_json: bool,
) -> None:
    """Write SUBSET for another tool."""
    from fastprune.beton.opening import open_beton
    from fastprune.rows.score_table import ScoreTable
    from fastprune.rows.subset import Subset
    from fastprune.selection.exporters import export_subset

    loaded = Subset.load(subset)
    opened = None if beton is None else open_beton(beton)
    if file_format == "huggingface":
        from fastprune.adapters.huggingface import export_parquet

        table = None if scores is None else ScoreTable.load(scores)
        written = export_parquet(loaded, out, beton=opened, scores=table)
    else:
        written = export_subset(loaded, out, file_format, beton=opened)
    show(
        f"exported {len(loaded.rows):,} rows -> {', '.join(map(str, written))}",
        {"rows": len(loaded.rows), "written": written},
        as_json=as_json,
    )


def _command_line() -> str:
    """Quote the command as it was typed, for the sidecar."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _summary(subset: "Subset", path: Path, **more: float) -> tuple[str, dict[str, Any]]:
    """Describe a written subset in a line and in JSON values."""
    assert subset.fingerprint is not None
    kept, num_rows = len(subset.rows), subset.fingerprint.num_rows
    took = f" in {more['seconds']:.1f} s" if more else ""
    line = f"kept {kept:,} of {num_rows:,} rows ({kept / num_rows:.2%}){took} -> {path}"
    fields = {"rows": kept, "of_rows": num_rows, "share": kept / num_rows, **more}
    return line, {**fields, "out": str(path)}


COMMANDS: tuple[click.Command, ...] = (select, import_, export)
