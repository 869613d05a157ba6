"""Networks as teachers and students run them: from a batch to (features, logits)."""

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastprune.base.errors import InvalidValueError


def classifier_name(network: nn.Module, *, num_classes: int) -> str:
    """Find the layer that makes the logits: the last linear one with C outputs.

    That is the classifier of every network that `build_network` makes; a 1x1 convolution counts
    as linear (SqueezeNet). Its input is what is called the penultimate features.

    Returns:
        The dotted name of the layer, as in `network.named_modules()`.

    Raises:
        InvalidValueError: the network has no such layer.
    """
    # The last one in order of definition, which is the order of use in every known network.
    outputs = {
        name: module.out_features if isinstance(module, nn.Linear) else module.out_channels
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear)
        or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1))
    }
    names: list[str] = [name for name, count in outputs.items() if count == num_classes]
    if not names:
        last = next(reversed(outputs.items()), None)
        found = f"its last linear layer, {last[0]!r}, has {last[1]:,}" if last else "it has none"
        raise InvalidValueError(
            f"{type(network).__name__} has no linear layer with {num_classes:,} outputs ({found}). "
            "Take a teacher of these classes, or name the layer whose output are the features "
            "(--feature-layer of `fastprune score`)."
        )
    return names[-1]


def without_classifier(network: nn.Module, *, num_classes: int) -> nn.Module:
    """Replace the layer that makes the logits by the identity, in place.

    The network then maps (B, 3, H, W) images to its penultimate features (B, D).

    Raises:
        InvalidValueError: the network has no layer with `num_classes` outputs.
    """
    network.set_submodule(classifier_name(network, num_classes=num_classes), nn.Identity())
    return network


class FeatureNetwork(nn.Module):
    """A classifier that returns its features beside its logits.

    Calling it with (B, 3, H, W) images returns (features (B, D), logits (B, C)). Feature maps
    (B, D, H, W) are averaged over their positions. A network without a classifier (C is 0) gives
    its features, and logits (B, 0). Use it as a context manager, or call `close`: the hook stays on
    the wrapped network until then.

    Attributes:
        network: the wrapped classifier, which is not copied.
        layer: the dotted name of the layer that was hooked; None without features, or where the
            network itself gives them.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        num_classes: int,
        feature_layer: str | None = None,
        takes_features: bool = True,
    ) -> None:
        """Hook the network.

        Args:
            network: any classifier; it is not copied.
            num_classes: C; 0 where the network gives features and no logits.
            feature_layer: the layer whose output is taken as the features; by default the input of
                the classifier, found by `classifier_name`.
            takes_features: False if features are not needed: they are (B, 0) then, and the
                network needs no layer that makes its logits.

        Raises:
            InvalidValueError: the classifier or the named layer is not found.
        """
        super().__init__()
        self.network = network
        self.layer: str | None = None
        self._features: Tensor | None = None
        self._hook: RemovableHandle | None = None
        self._has_classifier = num_classes > 0
        if not takes_features:
            return
        modules = dict(network.named_modules())
        if feature_layer is None and not self._has_classifier:
            return
        if feature_layer is None:
            self.layer = classifier_name(network, num_classes=num_classes)
            self._hook = modules[self.layer].register_forward_pre_hook(self._take_input)
        elif feature_layer in modules:
            self.layer = feature_layer
            self._hook = modules[feature_layer].register_forward_hook(self._take_output)
        else:
            raise InvalidValueError(
                f"feature layer {feature_layer!r} is not in {type(network).__name__}; its outer "
                f"layers are {', '.join(name for name, _ in network.named_children())}."
            )

    def feature_width(self, image_size: int) -> int:
        """Return D, the numbers in a feature, where no layer was named.

        It is the input of the classifier, or what an empty image of this side shows.
        """
        if not self._has_classifier:
            device = next(self.network.parameters()).device
            # In eval mode: one image must not move batch normalization's statistics.
            was_training = self.network.training
            with torch.no_grad():
                images = torch.zeros(1, 3, image_size, image_size, device=device)
                features, _ = self.eval()(images)
            self.train(was_training)
            return int(features.shape[1])
        assert self.layer is not None, "its features were asked for"
        layer = self.network.get_submodule(self.layer)
        width = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
        assert isinstance(width, int)
        return width

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) -> features (B, D), logits (B, C)."""
        output = self.network(images)
        if self.layer is None and not self._has_classifier:
            own = _as_rows(output, "the network itself")
            return own, own.new_empty((len(images), 0))
        logits = output if self._has_classifier else images.new_empty((len(images), 0))
        if self.layer is None:
            return logits.new_empty((len(images), 0)), logits
        # Taken out: a stale feature of the last batch must not pass for this one's.
        features, self._features = self._features, None
        if features is None:
            raise InvalidValueError(
                f"layer {self.layer!r} was not used in the forward pass, so features are missing. "
                "Name a layer that is (--feature-layer of `fastprune score`), or in a recipe set "
                "loss.feature_weight to 0."
            )
        return _as_rows(features, self.layer), logits

    def close(self) -> None:
        """Remove the hook from the network."""
        if self._hook is not None:
            self._hook.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _take_input(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        del module
        # A reference, no copy; autograd's graph goes through it.
        self._features = inputs[0]

    def _take_output(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        del module, inputs
        self._features = output


def _as_rows(features: Any, layer: str) -> Tensor:
    """One vector per image, averaged over the positions of a feature map."""
    if isinstance(features, Tensor) and features.ndim == 4:
        # Averaged as the networks do before their classifier, so that widths are channels.
        return features.mean(dim=(2, 3))
    if isinstance(features, Tensor) and features.ndim == 2:
        return features
    shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
    raise InvalidValueError(
        f"the features of layer {layer!r} are {shape}; they must be (B, D) or (B, D, H, W). "
        "Name another layer (--feature-layer of `fastprune score`), or in a recipe set "
        "loss.feature_weight to 0."
    )
