"""Every network that fastprune builds by name."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from fastprune.base.checks import did_you_mean
from fastprune.base.errors import ArtifactError, InvalidValueError, importing
from fastprune.networks import resnet_large, resnet_small, vgg_small
from fastprune.networks.features import without_classifier
from fastprune.networks.mobilenet import MobileNetV1, SmallMobileNetV2
from fastprune.networks.names import SMALL_NAMES, WIDE_EXAMPLES, WIDE_RESNET
from fastprune.networks.resnet_large import LargeResNet
from fastprune.networks.resnet_small import SmallResNet
from fastprune.networks.resnet_wide import WideResNet
from fastprune.networks.shufflenet import SmallShuffleNetV1, SmallShuffleNetV2
from fastprune.networks.vgg_small import SmallVGG
from fastprune.networks.weights import weights_metadata

# Outputs of a classifier that is cut off again. Not 1: some networks have 1x1 gates, which
# would be mistaken for it.
_CUT_CLASSES = 10

# Spelled as in RepDistiller, so that its scripts' names, and its checkpoints, work here.
# Its "MobileNetV2" has half the width.
SMALL_NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    **{
        f"resnet{depth}": partial(SmallResNet, depth, resnet_small.NARROW)
        for depth in (8, 14, 20, 32, 44, 56, 110)
    },
    **{f"resnet{depth}x4": partial(SmallResNet, depth, resnet_small.WIDE) for depth in (8, 32)},
    "ResNet18": partial(LargeResNet, resnet_large.BasicBlock, (2, 2, 2, 2)),
    "ResNet34": partial(LargeResNet, resnet_large.BasicBlock, (3, 4, 6, 3)),
    "ResNet50": partial(LargeResNet, resnet_large.Bottleneck, (3, 4, 6, 3)),
    **{f"vgg{depth}": partial(SmallVGG, depth) for depth in vgg_small.CONVOLUTIONS},
    "MobileNetV1": MobileNetV1,
    "MobileNetV2": partial(SmallMobileNetV2, 0.5),
    "mobile_half": partial(SmallMobileNetV2, 0.5),
    "mobile_full": partial(SmallMobileNetV2, 1.0),
    "ShuffleV1": SmallShuffleNetV1,
    "ShuffleV2": SmallShuffleNetV2,
}


def build_network(name: str, *, num_classes: int, weights: str | None = None) -> nn.Module:
    """Build a network by name, with random or published weights.

    Args:
        name: a small network of the distillation literature (`resnet8x4`, `wrn_40_2`, `vgg13`,
            `MobileNetV2`, `ShuffleV1`, ...), a torchvision classifier (`resnet50`, or
            `torchvision:vgg13` where a small network has the same name), `timm:NAME`, or a
            factory of yours, `package.module:function`, called with `num_classes=`.
        num_classes: C, the logits per image; 0 for a network without its classifier, which gives
            its penultimate features (B, D).
        weights: published weights: a member of the weights enum of a torchvision network, such
            as `IMAGENET1K_V2` or `DEFAULT`; `pretrained` for timm. None starts at random.

    Returns:
        A module from (B, 3, H, W) images to (B, C) logits, in training mode, on the CPU.

    Raises:
        InvalidValueError: no such network, fewer than one class, no such weights, or weights of
            other classes.
        ArtifactError: the weights cannot be fetched.
        MissingDependencyError: torchvision or timm is not installed.
    """
    if num_classes < 0:
        raise InvalidValueError(
            f"num_classes ({num_classes}) must be at least 1, or 0 for a network without its "
            "classifier."
        )
    source, _, rest = name.partition(":")
    # A prefix always wins, so a name keeps its meaning when other sources gain networks.
    if source == "timm":
        return _timm_network(rest, num_classes, weights)
    if source == "torchvision":
        return _torchvision_network(rest, num_classes, weights)
    # Any other colon belongs to an import path.
    if rest:
        return _factory_network(name, num_classes, weights)
    small = _small_network(name)
    if small is None:
        return _torchvision_network(name, num_classes, weights)
    _refuse_weights(name, weights)
    if num_classes:
        return small(num_classes)
    return without_classifier(small(_CUT_CLASSES), num_classes=_CUT_CLASSES)


@dataclass(frozen=True)
class PublishedView:
    """The images that published weights were evaluated on.

    `image_size` is the side of the center crop in pixels; `mean` and `std` are of values in [0, 1].
    """

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def published_weights(name: str) -> str | None:
    """Return the best published weights of a network, for `build_network`.

    Returns:
        `DEFAULT` for torchvision, `pretrained` for timm, None for a factory, which is trusted to
        load its own.

    Raises:
        InvalidValueError: the network is a small one, of which no weights are published.
    """
    source, _, rest = name.partition(":")
    if source == "timm":
        return "pretrained"
    if rest and source != "torchvision":
        return None
    if not rest and _small_network(name) is not None:
        raise InvalidValueError(
            f"{name} has no published weights, and random ones know nothing. Give a checkpoint "
            "(teacher.checkpoint in a recipe, --teacher-checkpoint of `fastprune score`)."
        )
    return "DEFAULT"


def published_view(name: str, weights: str) -> PublishedView:
    """Return the size and normalization of the images that published weights were evaluated on.

    Raises:
        InvalidValueError: no such torchvision or timm network, or no such weights.
        MissingDependencyError: torchvision or timm is not installed.
    """
    source, _, rest = name.rpartition(":")
    if source == "timm":
        config = _timm_config(rest, weights)
        return PublishedView(config.input_size[-1], tuple(config.mean), tuple(config.std))
    transforms = _published_member(rest, weights).transforms()
    return PublishedView(
        int(transforms.crop_size[0]), tuple(transforms.mean), tuple(transforms.std)
    )


def published_classes(name: str, weights: str) -> int:
    """Return the number of classes of published weights; 0 without a classifier.

    Raises as `published_view` does.
    """
    source, _, rest = name.rpartition(":")
    if source == "timm":
        return int(_timm_config(rest, weights).num_classes)
    return len(_published_member(rest, weights).meta["categories"])


def own_classes(name: str, *, checkpoint: str | Path | None, weights: str | None) -> int:
    """Return a network's own number of classes, which may differ from the images'.

    The checkpoint's header may hold it; published weights always do.

    Returns:
        C, or 0 if unknown: the network is then built without its classifier.

    Raises:
        InvalidValueError: no such network, or no such weights.
        ArtifactError: the checkpoint is missing or unreadable.
    """
    if checkpoint is not None:
        return int(weights_metadata(checkpoint).get("num_classes", 0))
    return 0 if weights is None else published_classes(name, weights)


def _small_network(name: str) -> Callable[[int], nn.Module] | None:
    """The builder of a small network, or None if no small network has this name."""
    wide = WIDE_RESNET.fullmatch(name)
    if wide is None:
        return SMALL_NETWORKS.get(name)
    # Four layers lie outside the stages; each of the three stages has n blocks of two.
    depth, widen_factor = int(wide[1]), int(wide[2])
    if depth < 10 or (depth - 4) % 6 or widen_factor < 1:
        raise InvalidValueError(
            f"network {name!r}: the depth must be 10, 16, 22, ... (6n + 4) and the width at "
            "least 1, as in wrn_16_2 or wrn_40_2."
        )
    return partial(WideResNet, depth, widen_factor)


def _torchvision_network(name: str, num_classes: int, weights: str | None) -> nn.Module:
    models = _import_models(name)
    _require_torchvision(name)
    if num_classes == 0:
        # Published weights load only with all of their classes; the classifier is cut off after.
        count = _CUT_CLASSES if weights is None else published_classes(name, weights)
        return without_classifier(_torchvision_network(name, count, weights), num_classes=count)
    options: dict[str, Any] = {"num_classes": num_classes}
    if name in ("googlenet", "inception_v3"):
        # Their auxiliary classifiers would make forward() return more than the logits.
        options |= {"aux_logits": weights is not None, "init_weights": weights is None}
    if weights is None:
        network: nn.Module = models.get_model(name, weights=None, **options)
        return network
    published = _published_member(name, weights)
    _require_classes(name, weights, len(published.meta["categories"]), num_classes)
    # Without num_classes: torchvision takes the number from the weights.
    with _named_download(name):
        return models.get_model(name, weights=published)  # type: ignore[no-any-return]


def _require_torchvision(name: str) -> None:
    models = _import_models(name)
    known = models.list_models(module=models)
    # Unprefixed names are looked for among the small ones first, so both are offered.
    if name not in known:
        known += [*SMALL_NAMES, *WIDE_EXAMPLES]
        hint = did_you_mean(name, known, list_known=False)
        raise InvalidValueError(f"network {name!r} is not known.{hint}")


def _published_member(name: str, weights: str) -> Any:
    models = _import_models(name)
    _require_torchvision(name)
    members = models.get_model_weights(name)
    if weights not in members.__members__:
        raise InvalidValueError(
            f"{name} has no weights {weights!r}, only {', '.join(members.__members__)}."
        )
    return members[weights]


def _timm_network(name: str, num_classes: int, weights: str | None) -> nn.Module:
    timm = _import_timm(name)
    if weights is None:
        _require_timm(name)
    else:
        # If the classes differ, timm itself would silently start a random classifier.
        config = _timm_config(name, weights)
        if num_classes:  # timm itself leaves the classifier out for 0
            _require_classes(f"timm:{name}", weights, config.num_classes, num_classes)
    with _named_download(f"timm:{name}"):
        network: nn.Module = timm.create_model(
            name, pretrained=weights is not None, num_classes=num_classes
        )
    return network


def _import_timm(name: str) -> Any:
    with importing("timm", extra="timm", purpose=f"network timm:{name}"):
        import timm
    return timm


def _import_models(name: str) -> Any:
    # Not at the top: small networks and `--help` need no torchvision.
    with importing("torchvision", extra="train", purpose=f"network {name}"):
        from torchvision import models
    return models


def _require_timm(name: str) -> None:
    """Raise unless timm has a network of this name; a weights tag may follow a dot."""
    timm = _import_timm(name)
    # timm names weights behind a dot: vit_base_patch16_224.augreg_in1k.
    network, _, tag = name.partition(".")
    known = timm.list_models()
    if network in known and tag:
        known = timm.list_pretrained(f"{network}.*")
    if name not in known:
        hint = did_you_mean(f"timm:{name}", [f"timm:{other}" for other in known], list_known=False)
        raise InvalidValueError(f"network 'timm:{name}' is not known.{hint}")


def _timm_config(name: str, weights: str) -> Any:
    """Timm's description of the published weights of a network."""
    if weights != "pretrained":
        raise InvalidValueError(f"weights {weights!r}: for timm networks use 'pretrained'.")
    _require_timm(name)
    return _import_timm(name).get_pretrained_cfg(name)


def _factory_network(name: str, num_classes: int, weights: str | None) -> nn.Module:
    """Call the user's own function and check what it returns."""
    _refuse_weights(name, weights)
    module_name, _, function_name = name.partition(":")
    try:
        factory = getattr(import_module(module_name), function_name)
    except Exception as error:  # a module may raise anything while it is imported
        raise InvalidValueError(
            f"network factory {name!r} cannot be imported ({error}). Name it as "
            "package.module:function, importable from the current Python path."
        ) from error
    if not callable(factory):
        raise InvalidValueError(
            f"network factory {name!r} is a {type(factory).__name__}, not a function. Name one "
            "that returns a torch.nn.Module for num_classes=."
        )
    try:
        network = factory(num_classes=num_classes)
    except Exception as error:  # of the user's code, whose traceback --debug shows
        raise InvalidValueError(
            f"network factory {name!r} failed: {type(error).__name__}: {error}. It is called with "
            f"num_classes={num_classes} and must return a torch.nn.Module."
        ) from error
    if not isinstance(network, nn.Module):
        raise InvalidValueError(
            f"network factory {name!r} returned a {type(network).__name__}; it must return a "
            "torch.nn.Module."
        )
    return network


def _require_classes(name: str, weights: str, published: int, wanted: int) -> None:
    if published != wanted:
        raise InvalidValueError(
            f"{name} with weights {weights} has {published:,} classes, but {wanted:,} "
            "are wanted. Take a checkpoint that was trained on these classes."
        )


@contextmanager
def _named_download(name: str) -> Iterator[None]:
    # The original errors name a host at best.
    try:
        yield
    except (OSError, RuntimeError) as error:  # timm raises the latter where there are none
        raise ArtifactError(
            f"the published weights of {name} cannot be fetched ({error}). Fetch them where there "
            "is a connection, or give a checkpoint (`checkpoint` in a recipe, --teacher-checkpoint "
            "of `fastprune score`)."
        ) from error


def _refuse_weights(name: str, weights: str | None) -> None:
    # Only torchvision and timm publish weights by name.
    if weights is not None:
        raise InvalidValueError(
            f"weights {weights!r}: {name} has no published weights. Give a checkpoint file."
        )
