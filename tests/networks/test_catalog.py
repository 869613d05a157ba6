import sys

import pytest
import torch

from fastprune.base.errors import ArtifactError, InvalidValueError, MissingDependencyError
from fastprune.networks import build_network, published_view, published_weights

# Millions of parameters with 100 classes, as the distillation literature prints them.
PARAMETERS_IN_MILLIONS = {
    "resnet8": 0.08,
    "resnet14": 0.18,
    "resnet20": 0.28,
    "resnet32": 0.47,
    "resnet44": 0.67,
    "resnet56": 0.86,
    "resnet110": 1.74,
    "resnet8x4": 1.23,
    "resnet32x4": 7.43,
    "wrn_16_1": 0.18,
    "wrn_16_2": 0.70,
    "wrn_40_1": 0.57,
    "wrn_40_2": 2.26,
    "vgg8": 3.97,
    "vgg11": 9.28,
    "vgg13": 9.46,
    "vgg16": 14.77,
    "vgg19": 20.09,
    "ResNet18": 11.22,
    "ResNet34": 21.33,
    "ResNet50": 23.71,
    "MobileNetV1": 3.31,
    "MobileNetV2": 0.81,
    "mobile_half": 0.81,
    "mobile_full": 2.35,
    "ShuffleV1": 0.95,
    "ShuffleV2": 1.36,
}

# Some parameters of each of RepDistiller's networks with their shapes, 100 classes.
REPDISTILLER_PARAMETERS = {
    "resnet8": {
        "conv1.weight": (16, 3, 3, 3),
        "bn1.running_mean": (16,),
        "layer1.0.conv1.weight": (16, 16, 3, 3),
        "layer2.0.downsample.0.weight": (32, 16, 1, 1),
        "layer3.0.downsample.1.num_batches_tracked": (),
        "layer3.0.bn2.bias": (64,),
        "fc.weight": (100, 64),
    },
    "resnet32x4": {
        "conv1.weight": (32, 3, 3, 3),
        "layer1.0.downsample.0.weight": (64, 32, 1, 1),
        "layer3.4.conv2.weight": (256, 256, 3, 3),
        "fc.bias": (100,),
    },
    "wrn_40_2": {
        "conv1.weight": (16, 3, 3, 3),
        "block1.layer.0.bn1.weight": (16,),
        "block1.layer.0.convShortcut.weight": (32, 16, 1, 1),
        "block3.layer.5.conv2.weight": (128, 128, 3, 3),
        "bn1.weight": (128,),
        "fc.weight": (100, 128),
    },
    "vgg13": {
        "block0.0.weight": (64, 3, 3, 3),
        "block0.0.bias": (64,),
        "block0.1.running_var": (64,),
        "block0.3.weight": (64, 64, 3, 3),
        "block4.4.weight": (512,),
        "classifier.weight": (100, 512),
    },
    "MobileNetV2": {
        "conv1.0.weight": (16, 3, 3, 3),
        "blocks.0.0.conv.3.weight": (16, 1, 3, 3),
        "blocks.6.0.conv.7.weight": (160,),
        "conv2.0.weight": (1280, 160, 1, 1),
        "classifier.0.weight": (100, 1280),
    },
    "ShuffleV1": {
        "conv1.weight": (24, 3, 1, 1),
        "layer1.0.conv1.weight": (54, 24, 1, 1),
        "layer1.0.conv3.weight": (216, 18, 1, 1),
        "layer3.3.bn3.weight": (960,),
        "linear.weight": (100, 960),
    },
    "ShuffleV2": {
        "layer1.0.conv5.weight": (58, 58, 1, 1),
        "layer2.7.conv3.weight": (116, 116, 1, 1),
        "conv2.weight": (1024, 464, 1, 1),
        "bn2.running_mean": (1024,),
        "linear.bias": (100,),
    },
    "ResNet50": {
        "conv1.weight": (64, 3, 3, 3),
        "layer1.0.shortcut.0.weight": (256, 64, 1, 1),
        "layer4.2.bn3.weight": (2048,),
        "linear.weight": (100, 2048),
    },
}

STATE_ENTRIES = {
    "resnet8": 6 + 3 * 12 + 2 * 6 + 2,
    "resnet32x4": 6 + 15 * 12 + 3 * 6 + 2,
    "wrn_40_2": 1 + 18 * 12 + 3 + 5 + 2,
    "vgg13": 10 * 7 + 2,
    "MobileNetV2": 6 + 17 * 18 + 6 + 2,
    "ShuffleV1": 6 + 16 * 18 + 2,
    "ShuffleV2": 6 + 3 * 30 + 13 * 18 + 6 + 2,
    "ResNet50": 6 + 16 * 18 + 4 * 6 + 2,
}


@pytest.mark.parametrize("name", PARAMETERS_IN_MILLIONS)
def test_small_network_has_the_published_number_of_parameters(name):
    network = build_network(name, num_classes=100)
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    assert round(millions, 2) == PARAMETERS_IN_MILLIONS[name]


@pytest.mark.parametrize("name", REPDISTILLER_PARAMETERS)
def test_small_network_names_its_parameters_as_repdistiller_does(name):
    state = build_network(name, num_classes=100).state_dict()
    shapes = {key: tuple(state[key].shape) for key in REPDISTILLER_PARAMETERS[name]}
    assert shapes == REPDISTILLER_PARAMETERS[name]
    assert len(state) == STATE_ENTRIES[name]


@pytest.mark.parametrize("side", [32, 48, 64])
@pytest.mark.parametrize(
    "name", ["resnet8", "wrn_16_1", "vgg8", "MobileNetV2", "ShuffleV1", "ShuffleV2", "MobileNetV1"]
)
def test_small_network_takes_any_sensible_image_size(name, side):
    network = build_network(name, num_classes=7).eval()
    with torch.no_grad():
        logits = network(torch.zeros(2, 3, side, side))
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()


def test_torchvision_network_is_built_with_the_wanted_classes():
    assert build_network("resnet18", num_classes=5).fc.out_features == 5


def test_prefix_torchvision_reaches_a_network_that_a_small_one_hides():
    small = build_network("vgg13", num_classes=10)
    assert type(small).__name__ == "SmallVGG"
    assert hasattr(build_network("torchvision:mobilenet_v2", num_classes=10), "features")


def test_googlenet_returns_logits_alone():
    network = build_network("googlenet", num_classes=4)
    assert network(torch.zeros(2, 3, 64, 64)).shape == (2, 4)


def test_factory_of_the_user_is_called_with_the_number_of_classes():
    assert build_network("tests.networks.factories:linear", num_classes=6).out_features == 6


@pytest.mark.parametrize(
    ("name", "hint"),
    [("resnet8x", "'resnet8x4'"), ("resnt50", "'resnet50'"), ("Vgg13", "'vgg13'")],
)
def test_unknown_network_is_answered_with_the_nearest_name(name, hint):
    with pytest.raises(InvalidValueError, match=f"{name}.*not known.*Did you mean {hint}"):
        build_network(name, num_classes=10)


def test_unknown_timm_network_is_answered_with_the_nearest_name():
    pytest.importorskip("timm")
    with pytest.raises(InvalidValueError, match=r"timm:resnet51.*Did you mean 'timm:resnet5"):
        build_network("timm:resnet51", num_classes=10)


def test_timm_network_is_built_with_the_wanted_classes():
    pytest.importorskip("timm")
    network = build_network("timm:resnet10t", num_classes=3)
    assert network.get_classifier().out_features == 3


def test_timm_that_is_not_installed_names_the_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        MissingDependencyError,
        match=r"timm:resnet18.*pip install 'fastprune\[timm\]'",
    ):
        build_network("timm:resnet18", num_classes=10)


@pytest.mark.parametrize("name", ["wrn_41_2", "wrn_4_2", "wrn_40_0"])
def test_wide_resnet_of_impossible_shape_is_refused(name):
    with pytest.raises(InvalidValueError, match=f"{name}.*6n \\+ 4.*wrn_40_2"):
        build_network(name, num_classes=10)


def test_fewer_than_no_classes_are_refused():
    with pytest.raises(InvalidValueError, match=r"num_classes \(-1\) must be at least 1"):
        build_network("resnet8", num_classes=-1)


def test_unknown_weights_are_answered_with_the_known_ones():
    with pytest.raises(InvalidValueError, match=r"resnet50 has no weights 'V9', only IMAGENET1K"):
        build_network("resnet50", num_classes=1000, weights="V9")


def test_published_weights_of_another_class_count_are_refused():
    with pytest.raises(InvalidValueError, match="1,000 classes, but 10 are wanted"):
        build_network("resnet50", num_classes=10, weights="IMAGENET1K_V2")


def test_timm_weights_of_another_class_count_are_refused():
    pytest.importorskip("timm")
    with pytest.raises(InvalidValueError, match=r"timm:resnet18 .* 1,000 classes, but 10 are"):
        build_network("timm:resnet18", num_classes=10, weights="pretrained")


@pytest.mark.parametrize(
    ("name", "weights"), [("resnet18", "DEFAULT"), ("timm:resnet18", "pretrained")]
)
def test_weights_that_cannot_be_fetched_are_named(monkeypatch, name, weights):
    if name.startswith("timm"):
        pytest.importorskip("timm")

    def refuse(*_, **__):
        raise OSError("no connection")

    monkeypatch.setattr("torchvision.models.get_model", refuse)
    monkeypatch.setattr("timm.create_model", refuse, raising=False)
    with pytest.raises(
        ArtifactError, match=f"{name} cannot be fetched .no connection.*--teacher-checkpoint"
    ):
        build_network(name, num_classes=1000, weights=weights)


def test_weights_of_a_small_network_are_refused():
    with pytest.raises(InvalidValueError, match="resnet8 has no published weights"):
        build_network("resnet8", num_classes=10, weights="DEFAULT")


def test_other_weights_than_pretrained_are_refused_for_timm():
    pytest.importorskip("timm")
    with pytest.raises(InvalidValueError, match=r"'DEFAULT'.*use 'pretrained'"):
        build_network("timm:resnet10t", num_classes=10, weights="DEFAULT")


@pytest.mark.parametrize("name", ["no_such_module:make", "tests.networks.factories:no_such_name"])
def test_factory_that_cannot_be_imported_is_named(name):
    with pytest.raises(InvalidValueError, match=f"{name}.*cannot be imported.*module:function"):
        build_network(name, num_classes=10)


def test_factory_that_returns_no_module_is_refused():
    with pytest.raises(InvalidValueError, match=r"returned a int; it must return a torch\.nn"):
        build_network("tests.networks.factories:number", num_classes=10)


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("resnet50", "DEFAULT"),
        ("torchvision:vgg13", "DEFAULT"),
        ("timm:resnet50", "pretrained"),
        ("tests.networks.factories:linear", None),
    ],
)
def test_published_weights_are_the_best_ones_of_their_source(name, weights):
    assert published_weights(name) == weights


def test_small_network_has_no_published_weights():
    with pytest.raises(InvalidValueError, match=r"wrn_40_2 has no published.*Give a checkpoint"):
        published_weights("wrn_40_2")


@pytest.mark.parametrize("name", ["efficientnet_b3", "torchvision:efficientnet_b3"])
def test_view_of_torchvision_weights_is_that_of_their_transforms(name):
    view = published_view(name, "DEFAULT")
    assert (view.image_size, view.mean) == (300, (0.485, 0.456, 0.406))


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("timm:nope", "pretrained", r"network 'timm:nope' is not known\. Did you mean 'timm:"),
        ("timm:resnet18.a1", "pretrained", r"is not known\. Did you mean 'timm:resnet18\.a"),
        ("timm:resnet18", "DEFAULT", "for timm networks use 'pretrained'"),
    ],
)
def test_view_of_timm_weights_that_are_not_there_is_refused(name, weights, message):
    pytest.importorskip("timm")
    with pytest.raises(InvalidValueError, match=message):
        published_view(name, weights)


def test_view_without_timm_names_the_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        MissingDependencyError,
        match=r"timm:resnet18.*pip install 'fastprune\[timm\]'",
    ):
        published_view("timm:resnet18", "pretrained")


def test_view_of_timm_weights_is_that_of_their_configuration():
    pytest.importorskip("timm")
    view = published_view("timm:vit_base_patch16_224", "pretrained")
    assert (view.image_size, view.mean) == (224, (0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("os:system", r"'os:system' failed: TypeError: system\(\) .*num_classes"),
        ("os:curdir", "'os:curdir' is a str, not a function"),
        (f"{__name__}:broken_factory", "broken_factory' failed: ZeroDivisionError"),
        (".:x", "cannot be imported"),
        ("os:\0", "cannot be imported"),
    ],
)
def test_factory_that_makes_no_network_is_refused(name, message):
    with pytest.raises(InvalidValueError, match=message):
        build_network(name, num_classes=3)


def broken_factory(*, num_classes):
    return num_classes / 0
