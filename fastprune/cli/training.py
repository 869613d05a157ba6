"""Training and evaluation of students, and the recipes that come with fastprune."""

import logging
import os
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from fastprune.cli.options import PATH, json_option, setting_options, show
from fastprune.settings import EvaluateSettings, find_recipe, load_recipe, packaged_recipes


def _complete_recipe(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[str]:
    del context, parameter
    return [name for name in packaged_recipes() if name.startswith(incomplete)]


@click.command()
@click.argument("recipe", shell_complete=_complete_recipe)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="Replace a setting of the recipe, or remove it (KEY=); may be given several times.",
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
@json_option
def train(
    recipe: str, overrides: tuple[str, ...], resume: bool, fixed_iterations: bool, as_json: bool
) -> None:
    """Train a student by RECIPE, a TOML file or the name of one that comes with fastprune.

    Several GPUs: torchrun --nproc-per-node 8 -m fastprune train RECIPE
    """
    from fastprune.base.errors import PeerError, TrainingStopped
    from fastprune.networks.names import require_known_network

    if fixed_iterations:
        overrides = (*overrides, "schedule.fixed_iterations=true")
    settings = load_recipe(recipe, overrides)
    for network in (settings.student, settings.teacher):
        if network is not None:
            require_known_network(network.network)
    # A wrong recipe is refused before the import of torch, which takes seconds.
    from fastprune.distillation.trainer import distill

    is_first = os.environ.get("RANK", "0") == "0"
    if not is_first:  # the first process prints for all
        logging.getLogger("fastprune").setLevel(logging.ERROR)
        warnings.simplefilter("ignore")
    try:
        result = distill(settings, resume=resume)
    except TrainingStopped as stop:
        if is_first:
            click.echo(str(stop), err=True)
        sys.exit(stop.exit_code)
    except PeerError:
        sys.exit(1)
    if not is_first:
        return
    reached = (
        "no labels to validate by"
        if result.top1_last is None or result.top1_best is None
        else f"top-1 {result.top1_last:.2%} after the last epoch, {result.top1_best:.2%} at best"
    )
    show(
        f"trained on {result.rows:,} rows for {result.epochs} epochs in "
        f"{result.train_seconds:.1f} s ({result.total_seconds:.1f} s in all): "
        f"{reached} -> {result.student}",
        asdict(result),
        as_json=as_json,
    )


@click.command()
@click.argument("checkpoint", type=PATH)
@click.argument("beton", type=PATH)
@setting_options(EvaluateSettings)
@json_option
def evaluate(checkpoint: Path, beton: Path, as_json: bool, **settings: Any) -> None:
    """Measure the accuracy of CHECKPOINT on BETON."""
    from fastprune.beton.opening import open_beton

    if checkpoint.is_dir():
        student = checkpoint / "student.safetensors"
        cure = f"Its student: {student}" if student.is_file() else "Name a file of weights in it."
        raise click.BadParameter(f"{checkpoint} is a folder. {cure}", param_hint="CHECKPOINT")
    # Both are checked before the import of torch, which takes seconds.
    if not checkpoint.exists():
        raise click.BadParameter(f"{checkpoint} does not exist.", param_hint="CHECKPOINT")
    open_beton(beton)
    from fastprune.distillation.evaluation import evaluate_checkpoint

    started = time.perf_counter()
    evaluation = evaluate_checkpoint(checkpoint, beton, **settings)
    seconds = time.perf_counter() - started
    show(
        f"top-1 {evaluation.top1:.2%}, top-5 {evaluation.top5:.2%}, loss {evaluation.loss:.4f} "
        f"on {evaluation.rows:,} rows in {seconds:.1f} s",
        {**asdict(evaluation), "seconds": seconds},
        as_json=as_json,
    )


@click.group(invoke_without_command=True)
@json_option
@click.pass_context
def recipes(context: click.Context, as_json: bool) -> None:
    """List the recipes that come with fastprune: train takes their names."""
    if context.invoked_subcommand is not None:
        return
    titles = {name: _title(path) for name, path in packaged_recipes().items()}
    lines = "\n".join(f"{name:40}  {title}" for name, title in titles.items())
    show(lines, titles, as_json=as_json)


@recipes.command("show")
@click.argument("name", shell_complete=_complete_recipe)
def show_recipe(name: str) -> None:
    """Print a recipe, to be saved and changed: recipes show NAME > recipe.toml."""
    click.echo(find_recipe(name).read_text(encoding="utf-8"), nl=False)


def _title(path: Path) -> str:
    """Take the first sentence of the comment that a recipe begins with."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = " ".join(line.removeprefix("#").strip() for line in lines[:2])
    return comment.partition(". ")[0].strip().removesuffix(".") + "."


COMMANDS: tuple[click.Command, ...] = (train, evaluate, recipes)
