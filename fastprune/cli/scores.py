"""The subcommand that scores."""

import os
import sys
import time
from pathlib import Path
from typing import Any

import click

from fastprune.cli.options import (
    COUNT,
    PATH,
    NumberList,
    Precision,
    backend_option,
    device_option,
    json_option,
    show,
    workers_option,
)

_CHANNELS = NumberList("red,green,blue, such as 0.485,0.456,0.406", count=3)


@click.command()
@click.argument("beton", type=PATH)
@click.option(
    "-o",
    "--out",
    required=True,
    type=PATH,
    help="Score table to write (.parquet).",
)
@click.option(
    "--teacher",
    help="Network: one of torchvision, timm:NAME, or a small one such as resnet32x4; with its "
    "published weights, or those of --teacher-checkpoint.",
)
@click.option(
    "--teacher-checkpoint",
    type=PATH,
    help="Weights: safetensors or a PyTorch checkpoint; a student of fastprune names its network.",
)
@click.option(
    "--teacher-weights",
    help="Published weights, such as IMAGENET1K_V2.  [default: the best ones]",
)
@click.option(
    "--teacher-factory",
    metavar="PACKAGE.MODULE:FUNCTION",
    help="A function of yours that makes the network; called with num_classes.",
)
@click.option(
    "--teacher-classes", type=COUNT, help="Logits of the teacher.  [default: the beton's classes]"
)
@click.option(
    "--feature-layer",
    help="Layer whose output are the features.  [default: the input of the classifier]",
)
@click.option(
    "--image-size",
    type=COUNT,
    help="Side of the images in pixels.  [default: the teacher's; 224, less for small images]",
)
@click.option(
    "--mean",
    metavar="R,G,B",
    type=_CHANNELS,
    help="Mean of pixel values in [0, 1].  [default: the teacher's, ImageNet's]",
)
@click.option(
    "--std",
    metavar="R,G,B",
    type=_CHANNELS,
    help="Standard deviation of pixel values.  [default: the teacher's, ImageNet's]",
)
@click.option(
    "--views", type=COUNT, help="Average so many augmented views.  [default: one center crop]"
)
@click.option("--seed", default=0, help="Seed of the augmented views.")
@click.option("--batch-size", type=COUNT, default=256, help="Images per step and rank.")
@device_option
@click.option(
    "--precision",
    type=Precision(),
    default="auto",
    help="Arithmetic of the teacher; auto is bf16 on CUDA devices that have it.",
)
@click.option("--compile", "compile_teacher", is_flag=True, help="Use torch.compile.")
@backend_option
@workers_option
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
    from fastprune.beton.reader import open_beton
    from fastprune.networks.names import require_known_network

    if teacher and teacher_factory:
        raise click.UsageError("give --teacher or --teacher-factory, not both.")
    # What is wrong with the arguments is said before torch is imported, which takes seconds.
    if teacher:
        require_known_network(teacher)
    open_beton(beton)
    if teacher_factory:
        # As `python -m` does: a module in the working folder can be named.
        sys.path.insert(0, str(Path.cwd()))
    from fastprune.difficulty.teacher import score

    started = time.perf_counter()
    table = score(
        beton,
        teacher or teacher_factory,
        out,
        checkpoint=teacher_checkpoint,
        weights=teacher_weights,
        num_classes=teacher_classes,
        resume=not restart,
        **options,
    )
    if os.environ.get("RANK", "0") == "0":
        seconds = time.perf_counter() - started
        top1 = float((table.predictions == table.labels).mean())
        show(
            f"scored {table.num_rows:,} rows in {seconds:.1f} s, teacher's top-1 {top1:.2%} "
            f"-> {out}",
            {"rows": table.num_rows, "seconds": seconds, "teacher_top1": top1, "out": out},
            as_json=as_json,
        )


COMMANDS: tuple[click.Command, ...] = (score,)
