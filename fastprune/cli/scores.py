"""The subcommand that scores."""

import os
import time
from pathlib import Path
from typing import Any

import click

from fastprune.cli.options import (
    CACHE_DTYPES,
    COUNT,
    PATH,
    Views,
    augment_option,
    checked_teacher,
    json_option,
    pass_options,
    show,
    teacher_options,
)


@click.command()
@click.argument("beton", type=PATH)
@click.option(
    "-o",
    "--out",
    required=True,
    type=PATH,
    help="Score table to write (.parquet).",
)
@teacher_options
@click.option(
    "--unsupervised",
    "num_clusters",
    type=COUNT,
    metavar="K",
    help="Score without labels: K clusters of the teacher's features in place of classes.",
)
@click.option(
    "--feature-layer",
    help="Layer whose output are the features.  [default: the input of the classifier]",
)
@click.option(
    "--views",
    type=Views(),
    default="center",
    help="What is looked at: center; train (one training view: slot 0 of the training to come); or "
    "a number of training views, which are averaged.",
)
@augment_option
@click.option("--cache", type=PATH, help="Teacher cache that keeps the logits of these views.")
@click.option("--num-views", type=COUNT, help="How many views recur in the training; for --cache.")
@click.option(
    "--cache-dtype",
    type=click.Choice(CACHE_DTYPES),
    help="Of a new cache.  [default: float16]",
)
@pass_options
@click.option(
    "--restart", is_flag=True, help="Start anew even where an unfinished pass could be resumed."
)
@click.option("--keep-features", is_flag=True, help="Leave the features beside the table (.npy).")
@json_option
def score(
    beton: Path,
    out: Path,
    teacher: str | None,
    teacher_factory: str | None,
    teacher_classes: int | None,
    teacher_checkpoint: Path | None,
    teacher_weights: str | None,
    restart: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Score every row of BETON by one pass of a teacher.

    A pass that was killed is resumed by the same command. For several devices or
    machines: torchrun ... -m fastprune score ...
    """
    network = checked_teacher(beton, teacher, teacher_factory)
    from fastprune.difficulty.teacher import score

    started = time.perf_counter()
    table = score(
        beton,
        network,
        out,
        checkpoint=teacher_checkpoint,
        weights=teacher_weights,
        num_classes=teacher_classes,
        resume=not restart,
        **options,
    )
    if os.environ.get("RANK", "0") == "0":
        seconds = time.perf_counter() - started
        found: dict[str, Any]
        if table.clusters is None:
            top1 = float((table.predictions == table.labels).mean())
            said, found = f"teacher's top-1 {top1:.2%}", {"teacher_top1": top1}
        else:
            mean = table.clustering["mean_distance"]
            count = table.clustering["num_clusters"]
            said, found = f"{count:,} clusters, mean distance {mean:.4f}", table.clustering
        show(
            f"scored {table.num_rows:,} rows in {seconds:.1f} s, {said} -> {out}",
            {"rows": table.num_rows, "seconds": seconds, **found, "out": out},
            as_json=as_json,
        )


COMMANDS: tuple[click.Command, ...] = (score,)
