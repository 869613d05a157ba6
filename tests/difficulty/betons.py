"""Small betons and teachers for the tests of the pass."""

import torch

from fastprune import convert
from fastprune.networks import build_network
from tests.images import write_image_folder


def small_beton(folder, *, classes=3, per_class=8, **options):
    """A beton of generated images, in the folder."""
    write_image_folder(folder / "images", classes=classes, per_class=per_class, **options)
    convert(folder / "images", folder / "train.beton")
    return folder / "train.beton"


def small_teacher(*, num_classes=3, seed=0, name="resnet8"):
    """A network with random weights, always the same, whose logits differ between images."""
    torch.manual_seed(seed)
    network = build_network(name, num_classes=num_classes)
    with torch.no_grad():
        network.get_parameter("fc.weight").mul_(20)
    return network


def teacher_factory(*, num_classes):
    """The same, as a user's factory."""
    return small_teacher(num_classes=num_classes)
