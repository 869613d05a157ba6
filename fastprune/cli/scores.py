"""`fastprune score`: one pass of a teacher."""

import os
import time
from pathlib import Path
from typing import Any

import click

from fastprune.cli.options import (
    PATH,
    checked_teacher,
    json_option,
    setting_options,
    show,
    teacher_options,
)
from fastprune.settings import ScoreSettings


class _Views(click.ParamType[int]):
    """center, train, or a number of training views."""

    name = "views"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        """Count the training views; a center crop has none."""
        if isinstance(value, int):
            return value
        words = {"center": 0, "train": 1}
        if value in words:
            return words[value]
        if value.isdecimal() and int(value) > 0:
            return int(value)
        return self.fail(f"{value!r} is not center, train or a number of views.", param, ctx)

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """Show the two words."""
        del param, ctx
        return "[center|train|INTEGER]"


@click.command()
@click.argument("beton", type=PATH)
@click.option("-o", "--out", required=True, type=PATH, help="Score table to write (.parquet).")
@teacher_options
@setting_options(ScoreSettings, without=("resume",), types={"views": _Views()})
@click.option("--restart", is_flag=True, help="Start over, even if a pass could be resumed.")
@json_option
def score(
    beton: Path,
    out: Path,
    teacher: str | None,
    teacher_factory: str | None,
    restart: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Score every row of BETON by one pass of a teacher.

    A pass that was killed is resumed by the same command. For several devices or machines:
    torchrun ... -m fastprune score ...
    """
    network = checked_teacher(beton, teacher, teacher_factory)
    from fastprune.difficulty.score import score

    started = time.perf_counter()
    table = score(beton, network, out, resume=not restart, **settings)
    if os.environ.get("RANK", "0") != "0":
        return
    seconds = time.perf_counter() - started
    found: dict[str, Any]
    if table.clusters is None:
        top1 = float((table.predictions == table.labels).mean())
        line, found = f"teacher's top-1 {top1:.2%}", {"teacher_top1": top1}
    else:
        found = table.clustering
        line = f"{found['num_clusters']:,} clusters, mean distance {found['mean_distance']:.4f}"
    show(
        f"scored {table.num_rows:,} rows in {seconds:.1f} s, {line} -> {out}",
        {"rows": table.num_rows, "seconds": seconds, **found, "out": out},
        as_json=as_json,
    )


COMMANDS: tuple[click.Command, ...] = (score,)
