"""VGG networks for small images: batch normalization, one linear layer."""

import math

from torch import Tensor, nn
from torch.nn import functional

# Of each of the five stages, by depth; RepDistiller has one linear layer where VGG has three.
CONVOLUTIONS = {
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
_SIDE_WITH_FOURTH_POOL = 64


class SmallVGG(nn.Module):
    """A VGG with batch normalization whose parameters are named as RepDistiller names them.

    The feature map is halved three times below 64 pixels and four times from there on, then
    averaged, so any image of at least 8x8 pixels fits.

    Source: Simonyan and Zisserman 2015, "Very Deep Convolutional Networks".
    """

    def __init__(self, depth: int, num_classes: int) -> None:
        super().__init__()
        convolutions = CONVOLUTIONS[depth]
        self.block0 = _stage(3, 64, convolutions[0])
        self.block1 = _stage(64, 128, convolutions[1])
        self.block2 = _stage(128, 256, convolutions[2])
        self.block3 = _stage(256, 512, convolutions[3])
        self.block4 = _stage(512, 512, convolutions[4])
        self.classifier = nn.Linear(512, num_classes)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, num_classes) logits."""
        # As in RepDistiller: at 32 pixels a fourth pooling would leave the last stage 2x2.
        has_fourth_pool = x.shape[2] >= _SIDE_WITH_FOURTH_POOL
        for stage in (self.block0, self.block1, self.block2):
            x = functional.max_pool2d(functional.relu(stage(x)), 2)
        x = functional.relu(self.block3(x))
        if has_fourth_pool:
            x = functional.max_pool2d(x, 2)
        x = functional.relu(self.block4(x))
        logits: Tensor = self.classifier(x.mean(dim=(2, 3)))
        return logits


def _stage(in_channels: int, channels: int, convolutions: int) -> nn.Sequential:
    """Convolutions of one width; the network activates the last one itself."""
    layers: list[nn.Module] = []
    for _ in range(convolutions):
        convolution = nn.Conv2d(in_channels, channels, 3, padding=1)
        nn.init.normal_(convolution.weight, std=math.sqrt(2 / (9 * channels)))
        nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
        layers += [convolution, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
        in_channels = channels
    return nn.Sequential(*layers[:-1])
