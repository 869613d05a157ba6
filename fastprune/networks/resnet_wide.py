"""Wide residual networks (WRN-d-k) for small images."""

import math

from torch import Tensor, nn
from torch.nn import functional


class PreActivationBlock(nn.Module):
    """Normalize and activate first, then two 3x3 convolutions around a shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        # RepDistiller's name, which its checkpoints have.
        self.convShortcut = (
            nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            if in_channels != channels
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, channels, H / stride, W / stride)."""
        activated = functional.relu(self.bn1(x))
        # The projection sees the activated input, the identity the raw one.
        shortcut = x if self.convShortcut is None else self.convShortcut(activated)
        y = functional.relu(self.bn2(self.conv1(activated)))
        result: Tensor = self.conv2(y) + shortcut
        return result


class WideStage(nn.Module):
    """Blocks of one width; the first one changes width and resolution."""

    def __init__(self, in_channels: int, channels: int, blocks: int, stride: int) -> None:
        super().__init__()
        first = PreActivationBlock(in_channels, channels, stride)
        rest = (PreActivationBlock(channels, channels, 1) for _ in range(blocks - 1))
        self.layer = nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, channels, H / stride, W / stride)."""
        result: Tensor = self.layer(x)
        return result


class WideResNet(nn.Module):
    """A WRN of depth 6n + 4 whose parameters are named as RepDistiller names them.

    Any image of at least 4x4 pixels fits.

    Source: Zagoruyko and Komodakis 2016, "Wide Residual Networks".
    """

    def __init__(self, depth: int, widen_factor: int, num_classes: int) -> None:
        super().__init__()
        assert (depth - 4) % 6 == 0
        # Three stages of blocks with two layers each; four layers lie outside the stages.
        blocks = (depth - 4) // 6
        narrow, middle, wide = (width * widen_factor for width in (16, 32, 64))
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block1 = WideStage(16, narrow, blocks, 1)
        self.block2 = WideStage(narrow, middle, blocks, 2)
        self.block3 = WideStage(middle, wide, blocks, 2)
        self.bn1 = nn.BatchNorm2d(wide)
        self.fc = nn.Linear(wide, num_classes)
        # As RepDistiller initializes it: normal over the fan-out, the classifier's bias at zero.
        nn.init.zeros_(self.fc.bias)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, num_classes) logits."""
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        logits: Tensor = self.fc(functional.relu(self.bn1(x)).mean(dim=(2, 3)))
        return logits
