"""What a recipe names: opened, and refused where it does not belong together."""

import json
from typing import Any

import torch

from fastprune.distillation.growth import GrowingLoader, image_sizes
from fastprune.distillation.objective import Objective
from fastprune.errors import ArtifactMismatch, RecipeError
from fastprune.loading.augment import Recipe as Views
from fastprune.loading.loader import Loader
from fastprune.networks import published_view, published_weights, weights_digest, weights_metadata
from fastprune.recipe import Recipe

# What may change between two parts of a run. Files may lie elsewhere: what they hold is compared.
_FREE = {
    "data": {"train", "val", "subset", "num_workers", "backend"},
    "teacher": {"checkpoint"},
    "student": {"checkpoint"},
    "run": {
        "out",
        "name",
        "device",
        "compile",
        "log_every",
        "validate_every",
        "checkpoint_every",
        "checkpoint_minutes",
        "keep_checkpoints",
    },
}


def open_loaders(recipe: Recipe, device: torch.device) -> tuple[Loader, Loader]:
    """The loaders of both betons, each with this process's share of the rows.

    Args:
        recipe: its section `data`, and the seed.
        device: where batches go.

    Returns:
        One of (images, labels, rows) to train on, and one of (images, labels), every row once.

    Raises:
        BetonError: a beton cannot be read.
        ArtifactMismatch: subset, train and val beton or the teacher do not belong together.
        InvalidValueError: the subset fills no batch.
    """
    train = open_train_loader(recipe, recipe.data.image_size, device=device)
    val_size = recipe.data.val_image_size or recipe.data.image_size
    val = Loader(recipe.data.val, train=False, image_size=val_size, **_shared(recipe, device))
    _require_same_classes(train, val)
    _require_teacher_of_classes(recipe, train)
    return train, val


def open_train_loader(recipe: Recipe, image_size: int, *, device: torch.device) -> Loader:
    """This process's share of the rows to train on: batches of (images, labels, rows).

    Args:
        recipe: its section `data`, and the seed.
        image_size: side of the images; the kind of views is that of the recipe's size.
        device: where batches go.
    """
    data = recipe.data
    views = Views.make(data.augment, image_size=data.image_size, train=True)
    return Loader(
        data.train,
        data.subset,
        train=True,
        augment=views.kind,
        image_size=image_size,
        seed=recipe.run.seed,
        layout="xyi",
        **_shared(recipe, device),
    )


def training_sizes(recipe: Recipe) -> tuple[int, ...]:
    """The sides of the images that a run goes through, in pixels and in their order."""
    data = recipe.data
    first = data.image_size if data.first_image_size is None else data.first_image_size
    return image_sizes(first, data.image_size, step=data.image_size_step)


def make_batches(
    recipe: Recipe, train: Loader, *, epochs: int, device: torch.device
) -> Loader | GrowingLoader:
    """What the loop iterates over: the train loader, or loaders of one size after the other.

    Args:
        recipe: its section `data`, and the seed.
        train: a loader of the recipe's image size.
        epochs: passes of the run.
        device: where batches go.
    """
    sizes = training_sizes(recipe)
    if len(sizes) == 1:
        return train

    def of_size(size: int) -> Loader:
        if size == sizes[-1]:
            return train
        loader = open_train_loader(recipe, size, device=device)
        loader.warm_up()
        return loader

    return GrowingLoader(of_size, sizes, epochs=epochs)


def _shared(recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """What both loaders have in common."""
    data = recipe.data
    return {
        "batch_size": data.batch_size,
        "backend": data.backend,
        "device": device,
        "mean": data.mean,
        "std": data.std,
        "num_workers": data.num_workers,
    }


def student_metadata(recipe: Recipe, loader: Loader) -> dict[str, str]:
    """What a reader of the student's weights needs to build, feed and understand it."""
    metadata = {
        "network": recipe.student.network,
        "num_classes": str(loader.num_classes),
        "image_size": str(recipe.data.val_image_size or recipe.data.image_size),
        "mean": json.dumps(recipe.data.mean),
        "std": json.dumps(recipe.data.std),
    }
    if loader.class_names is not None:
        metadata["class_names"] = json.dumps(loader.class_names)
    return metadata


def identity(
    recipe: Recipe, train: Loader, val: Loader, objective: Objective, *, processes: int
) -> dict[str, Any]:
    """Everything that decides which weights a run ends with, by dotted name.

    Args:
        recipe: its settings, but those of no consequence and names of files.
        train: its images and rows.
        val: its images.
        objective: the teacher's weights and the class std.
        processes: that train together.
    """
    settings = json.loads(recipe.model_dump_json(exclude=_FREE))
    flat = {
        f"{section}.{key}": value
        for section, keys in settings.items()
        for key, value in (keys or {}).items()
    }
    return flat | {
        "data.backend": train.backend,
        "the images of data.train": str(train.beton.fingerprint),
        "the images of data.val": str(val.beton.fingerprint),
        "the rows of data.subset": train.state_dict()["rows_digest"],
        "the weights of the teacher and the class std": weights_digest(objective),
        "processes": processes,
    }


def require_same_run(theirs: dict[str, Any], ours: dict[str, Any], *, folder: str) -> None:
    """Refuse to go on with a run of other settings.

    Raises:
        RecipeError: they differ; each difference is named.
    """
    differing = [
        f"{name} ({theirs.get(name)!r} there, {ours.get(name)!r} here)"
        for name in sorted(theirs.keys() | ours.keys())
        if theirs.get(name) != ours.get(name)
    ]
    if differing:
        raise RecipeError(
            f"{folder} holds an unfinished run with other settings: {'; '.join(differing)}. Go on "
            "with its own, or name another folder (run.out)."
        )


def _require_same_classes(train: Loader, val: Loader) -> None:
    """Refuse betons whose labels do not mean the same, as far as they tell."""
    ours, theirs = train.class_names, val.class_names
    if ours is not None and theirs is not None and ours != theirs:
        detail = _difference(ours, theirs)
    elif train.num_classes != val.num_classes:
        detail = f"{train.num_classes} and {val.num_classes} classes"
    else:
        return
    raise ArtifactMismatch(
        f"{train.beton.path} and {val.beton.path} have different classes: {detail}. "
        f"Convert the images of {val.beton.path} again with --classes-from {train.beton.path}."
    )


def _require_teacher_of_classes(recipe: Recipe, train: Loader) -> None:
    """Refuse a teacher of other classes or of images with other values, as far as it tells."""
    if recipe.teacher is None:
        return
    checkpoint = recipe.teacher.checkpoint
    if checkpoint is None:
        assert recipe.teacher.weights is not None, "the recipe is validated"
        if published_weights(recipe.teacher.network) is not None:
            view = published_view(recipe.teacher.network, recipe.teacher.weights)
            values = {"mean": json.dumps(view.mean), "std": json.dumps(view.std)}
            _require_same_values(recipe, values)
        return
    told = weights_metadata(checkpoint)
    names = tuple(json.loads(told.get("class_names", "null")) or ())
    count = int(told.get("num_classes", train.num_classes))
    if count != train.num_classes:
        detail = f"{count} and {train.num_classes} classes"
    elif names and train.class_names is not None and names != train.class_names:
        detail = _difference(names, train.class_names)
    else:
        _require_same_values(recipe, told)
        return
    raise ArtifactMismatch(
        f"{checkpoint} and {train.beton.path} have different classes: {detail}. Take a teacher "
        "that was trained on these classes."
    )


def _require_same_values(recipe: Recipe, told: dict[str, str]) -> None:
    """Refuse a teacher whose images were normalised in another way."""
    assert recipe.teacher is not None
    for name, ours in (("mean", recipe.data.mean), ("std", recipe.data.std)):
        theirs = json.loads(told.get(name, json.dumps(ours)))
        if list(theirs) != list(ours):
            raise ArtifactMismatch(
                f"{recipe.teacher.checkpoint or recipe.teacher.weights} was trained with "
                f"data.{name} = {theirs}, but this "
                f"recipe has {list(ours)}, and teacher and student see the same images. Set "
                f"data.{name} to the teacher's."
            )


def _difference(ours: tuple[str, ...], theirs: tuple[str, ...]) -> str:
    """The first class that has two names, or two numbers of classes."""
    for number, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        if one != other:
            return f"class {number} is {one!r} and {other!r}"
    return f"{len(ours)} and {len(theirs)} classes"
