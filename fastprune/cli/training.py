"""Subcommands around the student."""

import logging
import os
import sys
import time
import warnings
from pathlib import Path

import click


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="Replace a setting of the recipe, or take it away (KEY=); may be given several times.",
)
@click.option(
    "--resume", is_flag=True, help="Resume from the newest checkpoint in the run's folder, if any."
)
@click.option(
    "--fixed-iterations",
    is_flag=True,
    help="Take as many steps as all rows would need, so more passes over a subset "
    "(schedule.fixed_iterations).",
)
def train(recipe: Path, overrides: tuple[str, ...], resume: bool, fixed_iterations: bool) -> None:
    """Train a student by the settings in RECIPE, a TOML file.

    Several GPUs: torchrun --nproc-per-node 8 -m fastprune train RECIPE
    """
    from fastprune.distillation.trainer import distill
    from fastprune.errors import PeerError, TrainingStopped
    from fastprune.recipe import load_recipe

    is_first = os.environ.get("RANK", "0") == "0"
    if not is_first:  # the first process speaks for all
        logging.getLogger("fastprune").setLevel(logging.ERROR)
        warnings.simplefilter("ignore")
    if fixed_iterations:
        overrides = (*overrides, "schedule.fixed_iterations=true")
    try:
        result = distill(load_recipe(recipe, overrides), resume=resume)
    except TrainingStopped as stop:
        if is_first:
            click.echo(str(stop), err=True)
        sys.exit(stop.exit_code)
    except PeerError:
        sys.exit(1)
    if not is_first:
        return
    click.echo(
        f"trained on {result.rows:,} rows for {result.epochs} epochs in "
        f"{result.train_seconds:.1f} s ({result.total_seconds:.1f} s in all): "
        f"top-1 {result.top1_last:.2%} after the last epoch, {result.top1_best:.2%} at best "
        f"-> {result.student}"
    )


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("beton", type=click.Path(path_type=Path))
@click.option("--network", help="Name of the network, where the checkpoint does not name it.")
@click.option(
    "--image-size", type=int, help="Side of the center crop, where the checkpoint does not name it."
)
@click.option("--batch-size", default=256, help="Images per step.")
@click.option("--device", default="auto", help="Device of torch; auto takes CUDA if it is there.")
def evaluate(
    checkpoint: Path,
    beton: Path,
    network: str | None,
    image_size: int | None,
    batch_size: int,
    device: str,
) -> None:
    """Measure the accuracy of CHECKPOINT on BETON."""
    from fastprune.distillation.evaluation import evaluate_checkpoint

    started = time.perf_counter()
    evaluation = evaluate_checkpoint(
        checkpoint,
        beton,
        network=network,
        image_size=image_size,
        batch_size=batch_size,
        device=device,
    )
    click.echo(
        f"top-1 {evaluation.top1:.2%}, top-5 {evaluation.top5:.2%}, loss {evaluation.loss:.4f} "
        f"on {evaluation.rows:,} rows in {time.perf_counter() - started:.1f} s"
    )


COMMANDS = (train, evaluate)
