"""From a recipe to a student: opens what the recipe names, trains, writes the run's folder."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from fastprune.artifacts.atomic import atomic_path, exclusive, write_text
from fastprune.distillation.loop import TrainingLoop
from fastprune.distillation.pair import make_pair
from fastprune.distillation.result import Result
from fastprune.distillation.runlog import RunLog
from fastprune.errors import ArtifactMismatch, RecipeError
from fastprune.loading.device import choose_device
from fastprune.loading.loader import Loader
from fastprune.networks import save_weights
from fastprune.recipe import Recipe, load_recipe


def distill(recipe: Recipe | str | Path) -> Result:
    """Train a student as a recipe says, and write the run's folder.

    The folder gets recipe.json (as resolved), metrics.jsonl, TensorBoard events,
    student.safetensors and, last, result.json.

    Args:
        recipe: settings, or the TOML file that holds them.

    Returns:
        What the run cost and what it reached; the same as in result.json.

    Raises:
        RecipeError: a setting does not fit the data, or the folder holds a finished run.
        ArtifactMismatch: subset, train and val beton do not belong together.
        TrainingError: the loss is no longer a finite number.
    """
    started = time.perf_counter()
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError(
            f"train runs in one process, but WORLD_SIZE is {os.environ['WORLD_SIZE']}. "
            "Start it without torchrun."
        )
    device = choose_device(recipe.run.device)
    train_loader, val_loader = _open_loaders(recipe, device)
    with _run_folder(recipe) as folder:
        # The student's weights depend on the seed alone, whatever was built before.
        torch.manual_seed(recipe.run.seed)
        learner, objective = make_pair(
            recipe,
            num_classes=train_loader.num_classes,
            keep_ratio=len(train_loader.rows) / train_loader.beton.num_rows,
            device=device,
        )
        train_loader.warm_up()
        val_loader.warm_up()
        with RunLog(folder) as log:
            loop = TrainingLoop(
                recipe,
                learner,
                objective,
                train_loader=train_loader,
                val_loader=val_loader,
                device=device,
                log=log,
            )
            loop.rehearse()
            torch.manual_seed(recipe.run.seed)
            startup_seconds = time.perf_counter() - started
            loop.run()
        student_path = folder / "student.safetensors"
        _save_student(learner.student, student_path, recipe, train_loader)
        result = Result(
            name=recipe.run.name or folder.resolve().name,
            seed=recipe.run.seed,
            rows=len(train_loader.rows),
            images_per_epoch=len(train_loader) * train_loader.batch_size,
            epochs=recipe.schedule.epochs,
            startup_seconds=startup_seconds,
            train_seconds=loop.train_seconds,
            validation_seconds=loop.validation_seconds,
            total_seconds=time.perf_counter() - started,
            data_wait_share=loop.wait_seconds / loop.train_seconds,
            top1_last=loop.evaluations[-1].top1,
            top1_best=max(evaluation.top1 for evaluation in loop.evaluations),
            top5_last=loop.evaluations[-1].top5,
            curve=loop.curve,
            student=student_path,
        )
        result.save(folder)
    return result


@contextmanager
def _run_folder(recipe: Recipe) -> Iterator[Path]:
    """The run's folder, held against other processes, with the resolved recipe in it."""
    folder = recipe.run.out
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"run.out = {str(folder)!r} cannot be made: {error.strerror}.") from error
    with exclusive(folder / ".lock"):
        if (folder / "result.json").exists():
            raise RecipeError(
                f"{folder} holds a finished run. Name another folder (run.out) or remove this one."
            )
        write_text(folder / "recipe.json", recipe.model_dump_json(indent=2) + "\n")
        yield folder


def _open_loaders(recipe: Recipe, device: torch.device) -> tuple[Loader, Loader]:
    """The loaders of both betons, which must have the same classes."""
    data = recipe.data
    train = Loader(
        data.train,
        data.subset,
        batch_size=data.batch_size,
        train=True,
        device=device,
        image_size=data.image_size,
        augment=data.augment,
        seed=recipe.run.seed,
        num_workers=data.num_workers,
    )
    val = Loader(
        data.val,
        batch_size=data.batch_size,
        train=False,
        device=device,
        image_size=data.image_size,
        num_workers=data.num_workers,
    )
    _require_same_classes(train, val)
    return train, val


def _require_same_classes(train: Loader, val: Loader) -> None:
    """Refuse betons whose labels do not mean the same, as far as they tell."""
    ours, theirs = train.class_names, val.class_names
    if ours is not None and theirs is not None and ours != theirs:
        pairs = zip(ours, theirs, strict=False)
        differing = [i for i, (a, b) in enumerate(pairs) if a != b]
        detail = (
            f"class {differing[0]} is {ours[differing[0]]!r} and {theirs[differing[0]]!r}"
            if differing
            else f"{len(ours)} and {len(theirs)} classes"
        )
    elif train.num_classes != val.num_classes:
        detail = f"{train.num_classes} and {val.num_classes} classes"
    else:
        return
    raise ArtifactMismatch(
        f"{train.beton.path} and {val.beton.path} have different classes: {detail}. "
        "Convert both from folders with the same class names."
    )


def _save_student(student: nn.Module, path: Path, recipe: Recipe, loader: Loader) -> None:
    """Write the weights, with what a reader needs to build the network and to name its classes."""
    metadata = {
        "network": recipe.student.network,
        "num_classes": str(loader.num_classes),
        "image_size": str(recipe.data.image_size),
    }
    if loader.class_names is not None:
        metadata["class_names"] = json.dumps(loader.class_names)
    with atomic_path(path) as temporary:
        save_weights(student, temporary, metadata=metadata)
