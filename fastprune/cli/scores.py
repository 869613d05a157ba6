"""The subcommand that scores; those around subsets are in subsets.py."""

import os
import sys
import time
from pathlib import Path
from typing import Any

import click

from fastprune.cli import subsets


def _channels(
    context: click.Context, parameter: click.Parameter, text: str | None
) -> tuple[float, ...] | None:
    """Parse three numbers with commas between."""
    del context, parameter
    if text is None:
        return None
    try:
        values = tuple(map(float, text.split(",")))
    except ValueError:
        values = ()
    if len(values) != 3:
        raise click.BadParameter(f"{text!r} is not red,green,blue, such as 0.485,0.456,0.406.")
    return values


@click.command()
@click.argument("beton", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="Score table to write (.parquet).",
)
@click.option(
    "--teacher",
    help="Network: one of torchvision, timm:NAME, or a small one such as resnet32x4; with its "
    "published weights, or those of --teacher-checkpoint.",
)
@click.option(
    "--teacher-checkpoint",
    type=click.Path(path_type=Path),
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
    "--teacher-classes", type=int, help="Logits of the teacher.  [default: the beton's classes]"
)
@click.option(
    "--feature-layer",
    help="Layer whose output are the features.  [default: the input of the classifier]",
)
@click.option(
    "--image-size",
    type=int,
    help="Side of the images in pixels.  [default: the teacher's; 224, less for small images]",
)
@click.option(
    "--mean",
    metavar="R,G,B",
    callback=_channels,
    help="Mean of pixel values in [0, 1].  [default: the teacher's, ImageNet's]",
)
@click.option(
    "--std",
    metavar="R,G,B",
    callback=_channels,
    help="Standard deviation of pixel values.  [default: the teacher's, ImageNet's]",
)
@click.option(
    "--views", type=int, help="Average so many augmented views.  [default: one center crop]"
)
@click.option("--seed", default=0, help="Seed of the augmented views.")
@click.option("--batch-size", default=256, help="Images per step and rank.")
@click.option("--device", default="auto", help="Device of torch; auto takes CUDA if it is there.")
@click.option("--precision", default="auto", help="auto, float32 or bfloat16.")
@click.option("--compile", "compile_teacher", is_flag=True, help="Use torch.compile.")
@click.option("--backend", default="auto", help="Engine of the loader: auto, ffcv or dali.")
@click.option("--workers", type=int, help="Decoding threads.  [default: one per usable CPU]")
@click.option(
    "--restart", is_flag=True, help="Start anew even where an unfinished pass could be resumed."
)
@click.option("--keep-features", is_flag=True, help="Leave the features beside the table (.npy).")
def score(
    beton: Path,
    out: Path,
    teacher: str | None,
    teacher_factory: str | None,
    teacher_classes: int | None,
    teacher_checkpoint: Path | None,
    teacher_weights: str | None,
    workers: int | None,
    restart: bool,
    **options: Any,
) -> None:
    """Score every row of BETON by one pass of a teacher.

    A pass that was killed is resumed by the same command. For several devices or
    machines: torchrun ... -m fastprune score ...
    """
    from fastprune.difficulty.teacher import score

    if teacher and teacher_factory:
        raise click.UsageError("give --teacher or --teacher-factory, not both.")
    if teacher_factory:
        # As `python -m` does: a module in the working folder can be named.
        sys.path.insert(0, str(Path.cwd()))
    started = time.perf_counter()
    table = score(
        beton,
        teacher or teacher_factory,
        out,
        checkpoint=teacher_checkpoint,
        weights=teacher_weights,
        num_classes=teacher_classes,
        num_workers=workers,
        resume=not restart,
        **options,
    )
    if os.environ.get("RANK", "0") == "0":
        seconds = time.perf_counter() - started
        top1 = (table.predictions == table.labels).mean()
        click.echo(
            f"scored {table.num_rows:,} rows in {seconds:.1f} s, teacher's top-1 {top1:.2%} "
            f"-> {out}"
        )


COMMANDS: tuple[click.Command, ...] = (score, *subsets.COMMANDS)
