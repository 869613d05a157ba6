"""What belongs together: the identity of a run, and every refusal of what does not fit."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastprune.base.errors import ArtifactMismatch, InvalidValueError, RecipeError
from fastprune.distillation.objective import Objective
from fastprune.loading.loader import Loader
from fastprune.networks import (
    own_classes,
    published_view,
    published_weights,
    weights_digest,
    weights_metadata,
)
from fastprune.rows.subset import Subset
from fastprune.settings import Recipe

# What may change between two parts of a run. Files may lie elsewhere: what they hold is compared.
_FREE = {
    "data": {
        "train",
        "val",
        "subset",
        "num_workers",
        "backend",
        "service",
        "service_token_file",
    },
    "teacher": {"checkpoint", "cache", "cache_dtype"},
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


def student_metadata(
    recipe: Recipe, loader: Loader, precision: str, *, num_classes: int
) -> dict[str, str]:
    """Return what a reader of the student's weights needs to build, feed and understand it."""
    metadata = {
        "network": recipe.student.network,
        "num_classes": str(num_classes),
        "image_size": str(recipe.data.val_image_size or recipe.data.image_size),
        "mean": json.dumps(recipe.data.mean),
        "std": json.dumps(recipe.data.std),
        "precision": precision,
    }
    if recipe.data.labels and loader.class_names is not None:
        metadata["class_names"] = json.dumps(loader.class_names)
    return metadata


def identity(
    recipe: Recipe, train: Loader, val: Loader | None, objective: Objective, *, processes: int
) -> dict[str, Any]:
    """Return everything that decides which weights a run ends with, by dotted name.

    Args:
        recipe: its settings, but those of no consequence and names of files.
        train: its images and rows.
        val: its images; None without labels.
        objective: the teacher's weights and the class std.
        processes: that train together.
    """
    # Through JSON, so that paths and tuples compare as they are stored in a checkpoint.
    settings = json.loads(recipe.model_dump_json(exclude=_FREE))
    flat = {
        f"{section}.{key}": value
        for section, keys in settings.items()
        for key, value in (keys or {}).items()
    }
    # The engine that "auto" chose, and contents in place of file names: what decides the pixels.
    return flat | {
        "data.backend": train.backend,
        "the images of data.train": str(train.beton.fingerprint),
        "the images of data.val": None if val is None else str(val.beton.fingerprint),
        "the rows of data.subset": train.state_dict()["rows_digest"],
        "the weights of the teacher and the class std": weights_digest(objective),
        "teacher.cache": recipe.teacher is not None and recipe.teacher.cache is not None,
        "processes": processes,
    }


def require_same_run(theirs: dict[str, Any], ours: dict[str, Any], *, folder: str) -> None:
    """Refuse to continue a run of other settings.

    Args:
        theirs: `identity` of the run in the folder.
        ours: `identity` of this one.
        folder: the run's, for the message.

    Raises:
        RecipeError: they differ; each difference is named.
    """
    differing = [
        f"{name} ({theirs.get(name)!r} there, {ours.get(name)!r} here)"
        # Both ways: a setting may be new in this version, or gone.
        for name in sorted(theirs.keys() | ours.keys())
        if theirs.get(name) != ours.get(name)
    ]
    if differing:
        raise RecipeError(
            f"{folder} holds an unfinished run with other settings: {'; '.join(differing)}. Go on "
            "with its own, or name another folder (run.out)."
        )


def require_labels(recipe: Recipe, *loaders: Loader) -> None:
    """Refuse images without labels, where the recipe looks at labels.

    Raises:
        RecipeError: a beton was converted without labels.
    """
    for name, loader in zip(("train", "val"), loaders, strict=False):
        if recipe.data.labels and not loader.beton.has_labels:
            raise RecipeError(
                f"data.{name} = {loader.beton.path} was converted without labels. Learn from the "
                "teacher alone (data.labels = false, without data.val and with "
                "loss.cross_entropy_weight = 0), or convert it with them."
            )


def classes_of_run(recipe: Recipe, train: Loader) -> tuple[int, int]:
    """Find how many logits student and teacher have.

    Returns:
        C of the student and of the teacher. They are the beton's; without labels the teacher has
        its own, and the student as many, or 0 (no classifier) where features alone are compared.

    Raises:
        RecipeError: logits are to be compared, but the teacher has no classifier.
    """
    if recipe.data.labels or recipe.teacher is None:
        return train.num_classes, train.num_classes
    teacher = recipe.teacher
    known = teacher.num_classes
    if known is None:
        known = own_classes(teacher.network, checkpoint=teacher.checkpoint, weights=teacher.weights)
    if recipe.loss.distillation_weight == 0:
        return 0, known
    if known < 2:
        raise RecipeError(
            f"loss.distillation_weight = {recipe.loss.distillation_weight} compares logits, but "
            f"the teacher {teacher.network} has no classifier that makes some, as far as its file "
            "says. Set the weight to 0 and loss.feature_weight above, or say how many logits it "
            "has (teacher.num_classes)."
        )
    return known, known


def require_same_classes(train: Loader, val: Loader) -> None:
    """Refuse betons whose labels do not mean the same, as far as their class names say.

    Raises:
        ArtifactMismatch: names, order or number of the classes differ.
    """
    ours, theirs = train.class_names, val.class_names
    # Betons of other tools carry no names; then their number must do.
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


def require_teacher_fits(recipe: Recipe, train: Loader) -> None:
    """Refuse a teacher of other classes or of images with other values, as far as its file says.

    Raises:
        ArtifactMismatch: classes, mean or standard deviation differ.
    """
    if recipe.teacher is None:
        return
    checkpoint = recipe.teacher.checkpoint
    # Published weights have as many classes as `build_network` accepts.
    if checkpoint is None:
        assert recipe.teacher.weights is not None, "the recipe is validated"
        # A factory of the user's loads what it likes; nothing is known of its images.
        if published_weights(recipe.teacher.network) is not None:
            view = published_view(recipe.teacher.network, recipe.teacher.weights)
            values = {"mean": json.dumps(view.mean), "std": json.dumps(view.std)}
            _require_same_values(recipe, values)
        return
    metadata = weights_metadata(checkpoint)
    if not recipe.data.labels:
        _require_same_values(recipe, metadata)
        return
    # Students of `distill` carry these texts. Other checkpoints have none, and nothing is compared.
    names = tuple(json.loads(metadata.get("class_names", "null")) or ())
    count = int(metadata.get("num_classes", train.num_classes))
    if count != train.num_classes:
        detail = f"{count} and {train.num_classes} classes"
    elif names and train.class_names is not None and names != train.class_names:
        detail = _difference(names, train.class_names)
    else:
        _require_same_values(recipe, metadata)
        return
    raise ArtifactMismatch(
        f"{checkpoint} and {train.beton.path} have different classes: {detail}. Take a teacher "
        "that was trained on these classes."
    )


def _require_same_values(recipe: Recipe, metadata: dict[str, str]) -> None:
    """Refuse a teacher whose images were normalized in another way."""
    assert recipe.teacher is not None
    for name, ours in (("mean", recipe.data.mean), ("std", recipe.data.std)):
        # What the file does not say counts as equal.
        theirs = json.loads(metadata.get(name, json.dumps(ours)))
        if list(theirs) != list(ours):
            raise ArtifactMismatch(
                f"{recipe.teacher.checkpoint or recipe.teacher.weights} was trained with "
                f"data.{name} = {theirs}, but this "
                f"recipe has {list(ours)}, and teacher and student see the same images. Set "
                f"data.{name} to the teacher's."
            )


def _difference(ours: tuple[str, ...], theirs: tuple[str, ...]) -> str:
    """The first class that has two names, or two numbers of classes."""
    # Not strict: the lists may differ in length, which the last line says.
    for number, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        if one != other:
            return f"class {number} is {one!r} and {other!r}"
    return f"{len(ours)} and {len(theirs)} classes"


def require_logits(name: str, logits: Any, *, rows: int, num_classes: int) -> None:
    """Refuse a network whose output for a batch is not (rows, num_classes).

    Raises:
        InvalidValueError: it is something else; `name` says which network it is.
    """
    # A factory may return anything: tuples, dicts, feature maps.
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if shape != (rows, num_classes):
        raise InvalidValueError(
            f"the {name} returned {shape} for {rows} images, not logits of shape "
            f"({rows}, {num_classes}). Take a network with an output for each class."
        )


@contextmanager
def explain_missing_features(recipe: Recipe) -> Iterator[None]:
    """Turn a network without features into an error that names the setting that needs them.

    Raises:
        RecipeError: a network has no layer that makes its logits.
    """
    try:
        yield
    except InvalidValueError as error:
        # Then the error is about something else, and says so itself.
        if recipe.loss.feature_weight == 0:
            raise
        raise RecipeError(
            f"loss.feature_weight = {recipe.loss.feature_weight} compares penultimate features, "
            f"the inputs of the classifiers, but {str(error).partition('. ')[0]}. Take other "
            "networks, or set loss.feature_weight to 0."
        ) from error


def read_class_std(recipe: Recipe, num_classes: int) -> NDArray[np.float64] | None:
    """Return the (C,) class std that the subset carries; None where the recipe wants none.

    Raises:
        RecipeError: the subset carries none.
        ArtifactMismatch: they are of another number of classes.
    """
    if recipe.loss.reshaping != "class_std":
        return None
    assert recipe.data.subset is not None, "the recipe is validated"
    class_std = Subset.load(recipe.data.subset).class_std
    if class_std is None:
        raise RecipeError(
            f"loss.reshaping = 'class_std', but {recipe.data.subset} carries no class std. "
            "Make the subset with `fastprune select`, or set loss.reshaping to 'none'."
        )
    if len(class_std) != num_classes:
        raise ArtifactMismatch(
            f"{recipe.data.subset} has the class std of {len(class_std)} classes, but "
            f"{recipe.data.train} has {num_classes}. Select again from scores of this beton."
        )
    return class_std
