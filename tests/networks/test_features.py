import pytest
import torch
from torch import nn

from fastprune.base.errors import InvalidValueError
from fastprune.networks import FeatureNetwork, build_network, classifier_name


def features_and_logits(network, **options):
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad(), FeatureNetwork(network.eval(), num_classes=10, **options) as tapped:
        return *tapped(images), tapped.layer


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("resnet8", "fc"),
        ("vgg8", "classifier"),
        ("MobileNetV2", "classifier.0"),
        ("ShuffleV2", "linear"),
        ("resnet18", "fc"),
        ("mobilenet_v3_small", "classifier.3"),
        ("densenet121", "classifier"),
        ("efficientnet_b0", "classifier.1"),
        ("convnext_tiny", "classifier.2"),
    ],
)
def test_features_are_what_the_classifier_sees(name, layer):
    network = build_network(name, num_classes=10)
    features, logits, found = features_and_logits(network)
    assert found == layer
    torch.testing.assert_close(network.get_submodule(layer)(features), logits)


@pytest.mark.parametrize("name", ["resnet10t", "efficientvit_b0", "deit_tiny_patch16_224"])
def test_features_of_timm_networks_are_what_the_classifier_sees(name):
    timm = pytest.importorskip("timm")
    options = {"img_size": 64} if name.startswith("deit") else {}
    network = timm.create_model(name, num_classes=10, **options)
    features, logits, layer = features_and_logits(network)
    assert network.get_submodule(layer) is network.get_classifier() or "classifier" in layer
    torch.testing.assert_close(network.get_submodule(layer)(features), logits)


def test_features_of_squeezenet_are_averaged_over_positions():
    features, logits, layer = features_and_logits(build_network("squeezenet1_1", num_classes=10))
    assert (layer, tuple(features.shape), tuple(logits.shape)) == (
        "classifier.1",
        (2, 512),
        (2, 10),
    )


def test_named_feature_layer_gives_its_output_averaged_over_positions():
    network = build_network("resnet8", num_classes=10)
    features, _, _ = features_and_logits(network, feature_layer="layer2")
    assert features.shape == (2, 32)


def test_hook_is_gone_after_the_block():
    network = build_network("resnet8", num_classes=10)
    features_and_logits(network)
    assert not network.fc._forward_pre_hooks


def test_unknown_feature_layer_is_answered_with_the_layers_there_are():
    with pytest.raises(InvalidValueError, match=r"'layer9' is not in SmallResNet.*layer3, fc"):
        FeatureNetwork(
            build_network("resnet8", num_classes=10), num_classes=10, feature_layer="layer9"
        )


def test_network_without_a_classifier_of_the_classes_is_refused():
    with pytest.raises(InvalidValueError, match=r"no linear layer with 11 outputs.*'fc', has 10"):
        classifier_name(build_network("resnet8", num_classes=10), num_classes=11)


def test_network_without_linear_layers_is_refused():
    with pytest.raises(InvalidValueError, match=r"it has none.*--feature-layer"):
        classifier_name(nn.Flatten(), num_classes=2)


def test_features_of_another_rank_are_refused():
    network = nn.Sequential(nn.Flatten(2), nn.Linear(64 * 64, 10))
    with pytest.raises(
        InvalidValueError, match=r"layer '1' are \(2, 3, 4096\).*Name another layer"
    ):
        features_and_logits(network)


class _Skips(nn.Module):
    """Has a classifier that it does not use."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 10)

    def forward(self, images):
        return images.mean(dim=(1, 2, 3))[:, None].expand(-1, 10)


def test_layer_that_is_not_used_is_refused():
    with pytest.raises(InvalidValueError, match=r"layer 'fc' was not used.*--feature-layer"):
        features_and_logits(_Skips())


@pytest.mark.parametrize(("name", "width"), [("resnet8x4", 256), ("squeezenet1_1", 512)])
def test_width_of_the_features_is_that_of_the_classifiers_input(name, width):
    network = build_network(name, num_classes=10).eval()
    with FeatureNetwork(network, num_classes=10) as hooked, torch.no_grad():
        features, _ = hooked(torch.randn(2, 3, 64, 64))
        assert features.shape == (2, hooked.feature_width(32)) == (2, width)


@pytest.mark.parametrize(
    "name", ["resnet8", "wrn_16_1", "vgg8", "MobileNetV2", "ShuffleV1", "resnet18"]
)
def test_a_network_without_its_classifier_gives_its_features(name):
    network = build_network(name, num_classes=0)
    torch.manual_seed(0)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features, logits = FeatureNetwork(network.eval(), num_classes=0)(images)
    assert logits.shape == (2, 0)
    torch.testing.assert_close(features, network(images))
    with FeatureNetwork(build_network(name, num_classes=10), num_classes=10) as whole:
        assert features.shape == (2, whole.feature_width(32))
    assert FeatureNetwork(network, num_classes=0).feature_width(32) == features.shape[1]


def test_a_timm_network_without_a_head_gives_its_features():
    pytest.importorskip("timm")
    network = FeatureNetwork(build_network("timm:resnet10t", num_classes=0), num_classes=0)
    assert network.feature_width(64) == 512
    assert network.training


def test_features_of_a_named_layer_need_no_classifier():
    network = build_network("resnet8", num_classes=0).eval()
    with FeatureNetwork(network, num_classes=0, feature_layer="layer2") as tapped:
        features, logits = tapped(torch.zeros(2, 3, 32, 32))
    assert (features.shape, logits.shape) == ((2, 32), (2, 0))
