"""What a step asks of the networks, in the run and in the warm-up before it."""

import pytest
import torch

from fastprune.base.ranks import Ranks
from fastprune.distillation.context import Batch, Context
from fastprune.distillation.meters import PhaseTimer
from fastprune.distillation.step import Stepper, make_pair
from fastprune.distillation.teacher import Teacher

CPU = torch.device("cpu")


@pytest.fixture
def stepper(recipe, teacher):
    """Make a stepper, with a list of what its teacher was asked; keyword arguments are of run."""

    def make(**run):
        settings = recipe(teacher={"network": "resnet8", "checkpoint": teacher}, run=run)
        context = Context(settings, Ranks(), CPU, PhaseTimer(CPU, began=0.0))
        learner, objective = make_pair(context, num_classes=10, keep_ratio=1.0)
        seen = []
        objective.teacher.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        return Stepper(context, learner, objective, Teacher(context, objective.teacher)), seen

    return make


def test_teacher_is_warmed_up_with_whole_batches_of_every_size(stepper):
    made, seen = stepper()
    made.warm_up(num_classes=10, image_sizes=(16, 32))
    assert {tuple(images.shape) for images in seen} == {(20, 3, 16, 16), (20, 3, 32, 32)}


def test_warm_up_leaves_the_weights_and_statistics_as_they_were(stepper):
    made, _ = stepper()
    before = {name: value.clone() for name, value in made.student.state_dict().items()}
    made.warm_up(num_classes=10, image_sizes=(16, 32))
    assert all(
        torch.equal(value, before[name]) for name, value in made.student.state_dict().items()
    )
    assert all(parameter.grad is None for parameter in made.student.parameters())


@pytest.mark.parametrize("channels_last", [True, False])
def test_images_have_the_memory_format_of_the_recipe(stepper, channels_last):
    made, seen = stepper(channels_last=channels_last)
    images = torch.rand(20, 3, 32, 32).to(memory_format=torch.channels_last)
    labels = torch.arange(20) % 10
    made.begin_epoch(0)
    made.update(Batch(images, labels, labels), step=1, learning_rate=0.1)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert seen[-1].is_contiguous(memory_format=layout)
