"""The loaders of a run, as its recipe names them."""

from pathlib import Path
from typing import Any

from fastprune.beton.beton import Beton
from fastprune.beton.opening import open_beton
from fastprune.distillation.compatibility import (
    require_labels,
    require_same_classes,
    require_teacher_fits,
)
from fastprune.distillation.step import Context
from fastprune.loading.crops import CropPolicy
from fastprune.loading.loader import Loader
from fastprune.service.credentials import read_tokens
from fastprune.settings import Recipe


def open_loaders(context: Context) -> tuple[Loader, Loader | None]:
    """Open both betons: (images, labels, rows) to train on, and (images, labels) of all.

    Without labels there is nothing to validate by, and no second loader.

    Raises:
        ArtifactMismatch: the betons, the subset and the teacher do not belong together.
    """
    recipe = context.recipe
    train = open_train_loader(context, recipe.data.image_size)
    if recipe.data.val is None:
        require_teacher_fits(recipe, train)
        return train, None
    val_size = recipe.data.val_image_size or recipe.data.image_size
    # The default fields: validation needs images and labels, every row once, in any order.
    val = Loader(
        _open(context, recipe.data.val),
        train=False,
        image_size=val_size,
        **_loader_settings(context),
    )
    require_labels(recipe, train, val)
    require_same_classes(train, val)
    require_teacher_fits(recipe, train)
    return train, val


def open_train_loader(context: Context, image_size: int) -> Loader:
    """Open this process's share of the rows to train on, at a size of (S, S) pixels."""
    data = context.recipe.data
    # With growing images, the kind of views is that of the last size.
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
    """Return the seed of the order, the views and what is skipped."""
    return recipe.run.seed if recipe.data.seed is None else recipe.data.seed


def _open(context: Context, path: Path) -> Beton:
    """Open a beton, whose views the recipe's service decodes if it names one."""
    data = context.recipe.data
    token = None if data.service_token_file is None else read_tokens(data.service_token_file)[0]
    return open_beton(path, service=data.service, token=token)


def _loader_settings(context: Context) -> dict[str, Any]:
    """Return the settings that all loaders of a run have in common."""
    names = ("batch_size", "backend", "mean", "std", "num_workers")
    settings = {name: getattr(context.recipe.data, name) for name in names}
    return settings | {"device": context.device}
