import copy

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from fastprune.base.errors import InvalidValueError
from fastprune.distillation.learner import Learner, ProjectorEnsemble
from fastprune.networks import FeatureNetwork, build_network

CLASSES = 10


@pytest.fixture
def learner() -> Learner:
    """A resnet8 (features of 64 numbers) that looks at a resnet8x4 (of 256)."""
    teacher = FeatureNetwork(build_network("resnet8x4", num_classes=CLASSES), num_classes=CLASSES)
    student = build_network("resnet8", num_classes=CLASSES)
    return Learner.with_projectors(
        student, teacher, num_classes=CLASSES, image_size=32, projectors=3
    )


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(4, 3, 32, 32)


def test_learner_without_projectors_gives_the_logits_of_its_student(images):
    student = build_network("resnet8", num_classes=CLASSES).eval()
    network = FeatureNetwork(student, num_classes=CLASSES, takes_features=False)
    outputs = Learner(network)(images)
    assert outputs.features.shape == (4, 0)
    torch.testing.assert_close(outputs.logits, student(images))


def test_projected_features_have_the_width_of_the_teacher(learner, images):
    outputs = learner.eval()(images)
    assert outputs.features.shape == (4, 256)
    torch.testing.assert_close(outputs.logits, learner.student(images))


def test_student_is_saved_without_what_learns_beside_it(learner):
    alone = build_network("resnet8", num_classes=CLASSES)
    assert learner.student.state_dict().keys() == alone.state_dict().keys()


def test_each_trained_tensor_is_listed_once(learner):
    names = [name for name, _ in learner.named_parameters(remove_duplicate=False)]
    projectors = [name for name in names if name.startswith("projectors.")]
    assert len(projectors) == 6
    assert len(names) == 6 + len(list(learner.student.parameters()))


def test_copy_of_a_learner_takes_the_features_of_the_copy(learner, images):
    learner.eval()
    twin = copy.deepcopy(learner)
    with torch.no_grad():
        for parameter in twin.student.parameters():
            parameter.zero_()
    features = learner(images).features
    assert not torch.allclose(twin(images).features, features)
    assert torch.equal(learner(images).features, features)


def test_compiled_learner_equals_the_plain_one(learner, images):
    learner.eval()
    compiled = torch.compile(learner, fullgraph=True, backend="aot_eager")
    for _ in range(2):  # the second call runs what the first compiled
        for ours, theirs in zip(compiled(images), learner(images), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_learner_trains_under_distributed_data_parallel(learner, images, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        outputs = DistributedDataParallel(learner)(images)
        (outputs.logits.sum() + outputs.features.sum()).backward()
    finally:
        dist.destroy_process_group()
    assert all(parameter.grad is not None for parameter in learner.parameters())


def test_ensemble_is_the_mean_of_maps_cut_at_zero():
    ensemble = ProjectorEnsemble(5, 7, projectors=2)
    features = torch.randn(3, 5)
    first, second = ((features @ one.weight.T + one.bias).clamp(min=0) for one in ensemble.maps)
    torch.testing.assert_close(ensemble(features), (first + second) / 2)
    assert not torch.equal(ensemble.maps[0].weight, ensemble.maps[1].weight)


@pytest.mark.parametrize(
    ("widths", "projectors", "message"),
    [
        ((0, 4), 3, r"student_width \(0\) must be at least 1"),
        ((4, 0), 3, r"teacher_width \(0\) must be at least 1"),
        ((4, 4), 0, r"projectors \(0\) must be at least 1"),
    ],
)
def test_ensemble_of_nothing_is_refused(widths, projectors, message):
    with pytest.raises(InvalidValueError, match=message):
        ProjectorEnsemble(*widths, projectors=projectors)
