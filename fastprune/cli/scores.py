"""Subcommands around scores and subsets."""

import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from fastprune.artifacts.subset import Subset


@click.command()
@click.argument("scores", type=click.Path(path_type=Path))
@click.option(
    "-o", "--out", required=True, type=click.Path(path_type=Path), help="Subset to write (.npy)."
)
@click.option("--keep", type=float, required=True, help="Share of the rows to keep, in (0, 1].")
@click.option(
    "--metric",
    help="What rows are ranked by: a metric of the table, or a blend by rank such as "
    "centroid:0.5,loss:0.5.  [default: centroid; loss with --compat mdslr]",
)
@click.option(
    "--strategy",
    default="medium",
    help="medium, window, easy, hard, random, moderate or ccs.",
)
@click.option("--quota", default="proportional", help="Rows per class: proportional or equal.")
@click.option("--global", "is_global", is_flag=True, help="Take all rows as one class.")
@click.option("--quantile", default=0.5, help="window: where its centre is, in [0, 1].")
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
    keep: float,
    metric: str | None,
    strategy: str,
    quota: str,
    is_global: bool,
    quantile: float,
    drop_hardest: float,
    seed: int,
    compat: str | None,
    exclude: Path | None,
    allow_empty_classes: bool,
) -> None:
    """Choose the rows of SCORES that are kept, and write them as a subset."""
    from fastprune.artifacts.scores import ScoreTable
    from fastprune.artifacts.subset import Subset
    from fastprune.selection.subsets import make_subset

    started = time.perf_counter()
    subset = make_subset(
        ScoreTable.load(scores),
        keep_ratio=keep,
        metric=metric,
        strategy=strategy,
        quota=quota,
        per_class=not is_global,
        quantile=quantile,
        drop_hardest=drop_hardest,
        seed=seed,
        compat=compat,
        exclude=None if exclude is None else Subset.load(exclude).rows,
        allow_empty_classes=allow_empty_classes,
        command=_command_line(),
    )
    subset.save(out)
    click.echo(_summary(subset, time.perf_counter() - started, out))


def _command_line() -> str:
    """The command as it was typed, for the record."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _summary(subset: "Subset", seconds: float, out: Path) -> str:
    """`kept 640,000 of 1,281,167 rows (49.95%) in 0.4 s -> subset.npy`."""
    assert subset.fingerprint is not None
    kept, num_rows = len(subset.rows), subset.fingerprint.num_rows
    return f"kept {kept:,} of {num_rows:,} rows ({kept / num_rows:.2%}) in {seconds:.1f} s -> {out}"


COMMANDS: tuple[click.Command, ...] = (select,)
