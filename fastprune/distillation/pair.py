"""Teacher and student of a recipe, and what compares them."""

import torch
from torch import nn

from fastprune.artifacts.subset import Subset
from fastprune.distillation.learner import Learner
from fastprune.distillation.losses import LogitReshaper
from fastprune.distillation.objective import Objective
from fastprune.errors import ArtifactMismatch, InvalidValueError, RecipeError
from fastprune.networks import FeatureNetwork, build_network, load_weights
from fastprune.recipe import NetworkSettings, Recipe


def make_pair(
    recipe: Recipe, *, num_classes: int, keep_ratio: float, device: torch.device
) -> tuple[Learner, Objective]:
    """Build what a recipe trains and what it minimises.

    The student's weights depend on torch's generator alone: nothing is drawn before them.

    Args:
        recipe: networks, losses and memory format.
        num_classes: C, of the beton.
        keep_ratio: share of the beton's rows that is trained on.
        device: where the networks go.

    Returns:
        The learner, with projectors where features are compared, and the objective with its
        teacher.

    Raises:
        RecipeError: the subset carries no class std, or a network has no features, and the loss
            asks for them.
        ArtifactMismatch: the class std are of other classes.
        ArtifactError: a checkpoint cannot be read or does not fit its network.
    """
    layout = torch.channels_last if recipe.run.channels_last else torch.contiguous_format
    student = _build(recipe.student, num_classes)
    learner, teacher = Learner(student), None
    if recipe.teacher is not None:
        teacher = _build(recipe.teacher, num_classes)
        if recipe.loss.feature_weight > 0:
            learner, teacher = _with_features(student, teacher, recipe, num_classes)
    reshaper = _make_reshaper(recipe, num_classes)
    objective = Objective(recipe.loss, teacher, reshaper, keep_ratio=keep_ratio)
    return (
        learner.to(device).to(memory_format=layout),
        objective.to(device).to(memory_format=layout),
    )


def _build(settings: NetworkSettings, num_classes: int) -> nn.Module:
    """A network, with published weights or its checkpoint where it has any."""
    network = build_network(settings.network, num_classes=num_classes, weights=settings.weights)
    if settings.checkpoint is not None:
        load_weights(network, settings.checkpoint)
    return network


def _with_features(
    student: nn.Module, teacher: nn.Module, recipe: Recipe, num_classes: int
) -> tuple[Learner, FeatureNetwork]:
    """Both networks with their features, and the projectors between them."""
    try:
        hooked = FeatureNetwork(teacher, num_classes=num_classes)
        learner = Learner.with_projectors(
            student, hooked, num_classes=num_classes, projectors=recipe.loss.projectors
        )
    except InvalidValueError as error:
        raise RecipeError(
            f"loss.feature_weight = {recipe.loss.feature_weight} compares penultimate features, "
            f"the inputs of the classifiers, but {str(error).partition('. ')[0]}. Take other "
            "networks, or set loss.feature_weight to 0."
        ) from error
    return learner, hooked


def _make_reshaper(recipe: Recipe, num_classes: int) -> LogitReshaper | None:
    """The reshaper with the class std that the subset carries, where the recipe asks for it."""
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
    return LogitReshaper(class_std)
