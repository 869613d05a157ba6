"""The loaders of a run, and the refusals of betons and teachers that do not belong together."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from fastprune.base.errors import ArtifactMismatch, RecipeError
from fastprune.base.provenance import differences
from fastprune.beton.beton import Beton
from fastprune.beton.opening import open_beton
from fastprune.distillation.context import Context
from fastprune.loading.crops import CropPolicy
from fastprune.loading.loader import Loader
from fastprune.networks import own_classes, published_view, published_weights, weights_metadata
from fastprune.settings import Recipe


def open_loaders(context: Context) -> tuple[Loader, Loader | None]:
    """Open both betons: one to train on, one to validate on (None without labels).

    Raises:
        ArtifactMismatch: the betons, the subset and the teacher do not belong together.
    """
    recipe = context.recipe
    train = open_train_loader(context, recipe.data.image_size)
    if recipe.data.val is None:
        _require_teacher_fits(recipe, train)
        return train, None
    val_size = recipe.data.val_image_size or recipe.data.image_size
    # The default fields: validation needs images and labels, every row once, in any order.
    val = Loader(
        _open(context, recipe.data.val),
        train=False,
        image_size=val_size,
        **_loader_settings(context),
    )
    _require_labels(recipe, train, val)
    _require_same_classes(train, val)
    _require_teacher_fits(recipe, train)
    return train, val


def open_train_loader(context: Context, image_size: int) -> Loader:
    """Open this process's share of the rows to train on, at a size of (S, S) pixels."""
    data = context.recipe.data
    # With growing images, the last size decides the kind of views.
    views = CropPolicy.make(data.augment, image_size=data.image_size, train=True)
    return Loader(
        _open(context, data.train),
        data.subset,
        train=True,
        augment=views.kind,
        image_size=image_size,
        seed=data_seed(context.recipe),
        num_views=data.num_views,
        fields=("images", "labels", "rows", "host_rows"),
        **_loader_settings(context),
    )


def data_seed(recipe: Recipe) -> int:
    """Return the seed of the order, the views and the rows that pruning skips."""
    return recipe.run.seed if recipe.data.seed is None else recipe.data.seed


def _open(context: Context, path: Path) -> Beton:
    """Open a beton, whose views the recipe's service decodes if it names one."""
    data, token = context.recipe.data, None
    if data.service_token_file is not None:
        # By name: a run without a service imports none of it.
        credentials = import_module("fastprune.service.credentials")
        token = credentials.read_tokens(data.service_token_file)[0]
    return open_beton(path, service=data.service, token=token)


def _loader_settings(context: Context) -> dict[str, Any]:
    """Return the settings that all loaders of a run share."""
    names = ("batch_size", "backend", "mean", "std", "num_workers")
    settings = {name: getattr(context.recipe.data, name) for name in names}
    return settings | {"device": context.device}


def _require_labels(recipe: Recipe, *loaders: Loader) -> None:
    """Refuse images without labels if the recipe uses labels.

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
    """Return the numbers of classes of student and teacher.

    With labels both are the beton's. Without, the teacher has its own, and the student as many, or
    0 (no classifier) if features alone are compared.

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
            f"the teacher {teacher.network} has no classifier, as far as its file tells. Set the "
            "weight to 0 and loss.feature_weight above 0, or give the number of its logits "
            "(teacher.num_classes)."
        )
    return known, known


def _require_same_classes(train: Loader, val: Loader) -> None:
    """Refuse betons whose labels have different meanings, as far as their class names tell.

    Raises:
        ArtifactMismatch: names, order or number of the classes differ.
    """
    fault = _class_difference(
        train.class_names, val.class_names, counts=(train.num_classes, val.num_classes)
    )
    if fault is not None:
        raise ArtifactMismatch(
            f"{train.beton.path} and {val.beton.path} have different classes: {fault}. "
            f"Convert the images of {val.beton.path} again with --classes-from {train.beton.path}."
        )


def _require_teacher_fits(recipe: Recipe, train: Loader) -> None:
    """Refuse a teacher of other classes or normalization, as far as its file tells.

    Raises:
        ArtifactMismatch: classes, mean or standard deviation differ.
    """
    if recipe.teacher is None:
        return
    # Students of `distill` carry these texts. Other checkpoints have none: nothing is compared.
    metadata: dict[str, str] = {}
    if recipe.teacher.checkpoint is not None:
        metadata = weights_metadata(recipe.teacher.checkpoint)
    # A factory of the user's loads its own weights; nothing is known of its images.
    elif published_weights(recipe.teacher.network) is not None:
        assert recipe.teacher.weights is not None, "the recipe is validated"
        view = published_view(recipe.teacher.network, recipe.teacher.weights)
        metadata = {"mean": json.dumps(view.mean), "std": json.dumps(view.std)}
    if recipe.data.labels:
        names = tuple(json.loads(metadata.get("class_names", "null")) or ()) or None
        count = int(metadata.get("num_classes", train.num_classes))
        fault = _class_difference(names, train.class_names, counts=(count, train.num_classes))
        if fault is not None:
            raise ArtifactMismatch(
                f"{recipe.teacher.checkpoint} and {train.beton.path} have different classes: "
                f"{fault}. Take a teacher that was trained on these classes."
            )
    ours: dict[str, Any] = {"mean": recipe.data.mean, "std": recipe.data.std}
    ours = {name: value for name, value in ours.items() if name in metadata}
    theirs = {name: json.loads(metadata[name]) for name in ours}
    for found in differences(ours, theirs):
        raise ArtifactMismatch(
            f"{recipe.teacher.checkpoint or recipe.teacher.weights} was trained with "
            f"data.{found.name} = {found.theirs}, but this recipe has {found.ours}, and teacher "
            f"and student see the same images. Set data.{found.name} to the teacher's."
        )


def _class_difference(
    ours: tuple[str, ...] | None, theirs: tuple[str, ...] | None, *, counts: tuple[int, int]
) -> str | None:
    """Name the first class that differs, or both numbers of classes; None where all agree."""
    # Betons of other tools have no names; then only the numbers of classes can be compared.
    if ours is not None and theirs is not None:
        counts = len(ours), len(theirs)
        numbered = ({str(i): name for i, name in enumerate(names)} for names in (ours, theirs))
        for found in differences(*numbered):
            if found.ours is not None and found.theirs is not None:
                return f"class {found.name} is {found.ours!r} and {found.theirs!r}"
    return None if counts[0] == counts[1] else f"{counts[0]} and {counts[1]} classes"
