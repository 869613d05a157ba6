import pytest
import torch
from torch.nn import functional

from fastprune.distillation.learner import Learner, Outputs
from fastprune.distillation.losses import LogitReshaper, distillation_loss, standardize_logits
from fastprune.distillation.objective import Objective
from fastprune.networks import FeatureNetwork, build_network
from fastprune.settings import LossSettings

CLASSES = 10


def says(logits: torch.Tensor) -> Outputs:
    """What a learner or a teacher says where nobody looks at features."""
    return Outputs(logits.new_empty((len(logits), 0)), logits)


@pytest.fixture
def teacher() -> FeatureNetwork:
    return FeatureNetwork(build_network("resnet8", num_classes=CLASSES), num_classes=CLASSES)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(4, 3, 32, 32)


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.tensor([0, 3, 9, 3])


def test_without_a_teacher_the_loss_is_the_cross_entropy_whatever_its_weight(images, labels):
    objective = Objective(LossSettings(cross_entropy_weight=0.1, label_smoothing=0.2))
    assert objective.reshape(None, labels) is None
    logits = torch.randn(4, CLASSES)
    loss = objective(says(logits), None, labels)
    expected = functional.cross_entropy(logits, labels, label_smoothing=0.2, reduction="none")
    torch.testing.assert_close(loss, expected)


def test_terms_are_weighted(labels, teacher):
    student, answer = torch.randn(2, 4, CLASSES)
    settings = LossSettings(cross_entropy_weight=0.5, distillation_weight=2.0, temperature=3.0)
    loss = Objective(settings, teacher)(says(student), says(answer), labels)
    cross_entropy = functional.cross_entropy(student, labels, reduction="none")
    distance = distillation_loss(student, answer, temperature=3.0)
    torch.testing.assert_close(loss, 0.5 * cross_entropy + 2.0 * distance)


def test_weight_of_the_distillation_follows_the_keep_ratio(labels, teacher):
    settings = LossSettings(cross_entropy_weight=0, distillation_weight=((0.2, 4.0), (1.0, 2.0)))
    student, answer = torch.randn(2, 4, CLASSES)
    losses = {
        keep_ratio: Objective(settings, teacher, keep_ratio=keep_ratio)(
            says(student), says(answer), labels
        )
        for keep_ratio in (0.1, 0.6, 1.0)
    }
    torch.testing.assert_close(losses[0.1], 2 * losses[1.0])
    torch.testing.assert_close(losses[0.6], 1.5 * losses[1.0])


def test_distillation_counts_more_from_epoch_to_epoch_until_it_counts_whole(labels, teacher):
    settings = LossSettings(
        cross_entropy_weight=0, distillation_weight=1, distillation_warmup_epochs=4
    )
    objective = Objective(settings, teacher)
    student, answer = torch.randn(2, 4, CLASSES)
    whole = objective(says(student), says(answer), labels)
    for epoch, share in enumerate((0.25, 0.5, 0.75, 1.0, 1.0)):
        objective.begin_epoch(epoch)
        torch.testing.assert_close(objective(says(student), says(answer), labels), share * whole)


def test_zscore_standardises_both(labels, teacher):
    student, answer = torch.randn(2, 4, CLASSES)
    settings = LossSettings(cross_entropy_weight=0, distillation_weight=1, reshaping="zscore")
    loss = Objective(settings, teacher)(says(student), says(answer), labels)
    expected = distillation_loss(
        standardize_logits(student), standardize_logits(answer), temperature=4.0
    )
    torch.testing.assert_close(loss, expected)


def test_decoupled_distance_sees_the_labels(labels, teacher):
    settings = LossSettings(cross_entropy_weight=0, distillation="dkd", others_weight=0.0)
    student, answer = torch.randn(2, 4, CLASSES)
    objective = Objective(settings, teacher)
    here, there = (
        objective(says(student), says(answer), which) for which in (labels, labels.flip(0))
    )
    assert not torch.allclose(here, there)


def test_teacher_is_frozen_in_eval_mode_and_its_logits_are_reshaped(teacher, images, labels):
    objective = Objective(LossSettings(), teacher, LogitReshaper(torch.full((CLASSES,), 1.5)))
    objective.train()
    running = teacher.network.bn1.running_mean.clone()
    targets = objective.reshape(Outputs(*teacher(images)), labels)
    assert not targets.logits.requires_grad
    assert torch.equal(teacher.network.bn1.running_mean, running)
    assert not list(filter(lambda p: p.requires_grad, objective.parameters()))
    torch.testing.assert_close(targets.logits.std(dim=1), torch.full((4,), 1.5))


def test_features_are_compared_with_the_teachers(teacher, images, labels):
    student = build_network("resnet8x4", num_classes=CLASSES)
    learner = Learner.with_projectors(
        student, teacher, num_classes=CLASSES, image_size=32, projectors=2
    )
    settings = LossSettings(cross_entropy_weight=0, distillation_weight=0, feature_weight=25)
    objective = Objective(settings, teacher)
    outputs, targets = learner(images), Outputs(*teacher(images))
    loss = objective(outputs, targets, labels)
    cosine = functional.cosine_similarity(outputs.features, targets.features)
    torch.testing.assert_close(loss, 25 * (1 - cosine))
    loss.mean().backward()
    assert all(one.weight.grad.abs().sum() > 0 for one in learner.projectors.maps)
    assert student.conv1.weight.grad.abs().sum() > 0
