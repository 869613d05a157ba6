import pytest
import torch
from torch import nn

from fastprune.base.errors import ArtifactMismatch, InvalidValueError, RecipeError
from fastprune.base.ranks import Ranks
from fastprune.distillation.context import Context
from fastprune.distillation.meters import PhaseTimer
from fastprune.distillation.step import make_pair
from fastprune.distillation.trainer import distill
from fastprune.networks import build_network, load_weights

CPU = torch.device("cpu")


def context(settings) -> Context:
    return Context(settings, Ranks(), CPU, PhaseTimer(CPU, began=0.0))


def without_classifier(num_classes: int) -> nn.Module:
    """A factory whose network ends in a lookup that no hook can find."""
    return nn.Sequential(nn.Conv2d(3, num_classes, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def test_weights_of_the_student_depend_on_the_seed_alone(recipe, teacher):
    section = {"network": "resnet8", "checkpoint": teacher}
    pairs = []
    for settings in (recipe(), recipe(teacher=section, loss={"feature_weight": 25})):
        torch.manual_seed(3)
        pairs.append(make_pair(context(settings), num_classes=10, keep_ratio=1))
    first, second = (learner.student.state_dict() for learner, _ in pairs)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_keep_ratio_reaches_the_weight_of_the_distillation(recipe, teacher):
    settings = recipe(
        teacher={"network": "resnet8", "checkpoint": teacher},
        loss={"distillation_weight": [[0.5, 2.0], [1.0, 1.0]]},
    )
    _, objective = make_pair(context(settings), num_classes=10, keep_ratio=0.75)
    assert objective.distillation_weight == pytest.approx(1.5)


def test_network_without_features_is_named(recipe, teacher):
    settings = recipe(
        student={"network": f"{__name__}:without_classifier"},
        teacher={"network": "resnet8", "checkpoint": teacher},
        loss={"feature_weight": 25},
    )
    with pytest.raises(
        RecipeError, match=r"but Sequential has no linear layer with 10 outputs.*Take other netw"
    ):
        make_pair(context(settings), num_classes=10, keep_ratio=1)


def test_published_teacher_of_images_with_other_values_is_refused(recipe):
    settings = recipe(
        data={"mean": [0.5, 0.5, 0.5]},
        teacher={"network": "resnet18", "weights": "IMAGENET1K_V1"},
    )
    with pytest.raises(
        ArtifactMismatch, match=r"IMAGENET1K_V1 was trained with data\.mean = \[0\.485"
    ):
        distill(settings)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ("resnet20", r"resnet20 has no published weights.*teacher\.checkpoint in a recipe"),
        ("resnet18", "resnet18 has no weights 'V3', only IMAGENET1K_V1"),
        ("resnet1", "network 'resnet1' is not known"),
        (f"{__name__}:without_classifier", "without_classifier has no published weights"),
    ],
)
def test_published_weights_that_are_not_there_are_refused(recipe, network, message):
    settings = recipe(teacher={"network": network, "weights": "V3"})
    with pytest.raises(InvalidValueError, match=message):
        distill(settings)


def test_published_teacher_that_timm_does_not_know_is_refused(recipe):
    pytest.importorskip("timm")
    settings = recipe(teacher={"network": "timm:nope", "weights": "pretrained"})
    with pytest.raises(InvalidValueError, match="network 'timm:nope' is not known"):
        distill(settings)


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_run_with_a_feature_loss_keeps_the_student_alone(recipe, teacher, ema_decay):
    result = distill(
        recipe(
            teacher={"network": "resnet8", "checkpoint": teacher},
            loss={"feature_weight": 25, "distillation_weight": 0},
            schedule={"ema_decay": ema_decay},
        )
    )
    load_weights(build_network("resnet8", num_classes=10), result.student)
