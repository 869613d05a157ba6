"""ShuffleNet V1 and V2 for small images."""

import torch
from torch import Tensor, nn
from torch.nn import functional

_STEM_CHANNELS = 24
_V1_GROUPS = 3


class GroupedBottleneck(nn.Module):
    """V1's unit: grouped 1x1, shuffle, depthwise 3x3, grouped 1x1."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        hidden = channels // 4
        self.stride = stride
        # The stem's 24 channels are too few to be cut into groups.
        self.first_groups = 1 if in_channels == _STEM_CHANNELS else _V1_GROUPS
        self.conv1 = nn.Conv2d(in_channels, hidden, 1, groups=self.first_groups, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = _depthwise(hidden, stride)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = nn.Conv2d(hidden, channels, 1, groups=_V1_GROUPS, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape at stride 1; at stride 2 half the size and in_channels + channels."""
        y = functional.relu(self.bn1(self.conv1(x)))
        y = functional.relu(self.bn2(self.conv2(_shuffle(y, self.first_groups))))
        y = self.bn3(self.conv3(y))
        if self.stride == 1:
            return functional.relu(y + x)
        # Joined and not added: the pooled input brings its channels along.
        return functional.relu(torch.cat([y, functional.avg_pool2d(x, 3, 2, 1)], dim=1))


class SmallShuffleNetV1(nn.Module):
    """ShuffleNet with three groups whose parameters are named as RepDistiller names them.

    Any image of at least 8x8 pixels fits.

    Source: Zhang et al. 2018, "ShuffleNet: An Extremely Efficient Convolutional Neural Network".
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, _STEM_CHANNELS, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(_STEM_CHANNELS)
        self.layer1 = _grouped_stage(_STEM_CHANNELS, 240, blocks=4)
        self.layer2 = _grouped_stage(240, 480, blocks=8)
        self.layer3 = _grouped_stage(480, 960, blocks=4)
        self.linear = nn.Linear(960, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, num_classes) logits."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


class SplitBlock(nn.Module):
    """V2's unit: half of the channels pass, the other half is convolved."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = _depthwise(half, 1)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> the same shape."""
        passed, y = x.chunk(2, dim=1)
        y = functional.relu(self.bn1(self.conv1(y)))
        y = functional.relu(self.bn3(self.conv3(self.bn2(self.conv2(y)))))
        return _shuffle(torch.cat([passed, y], dim=1), 2)


class DownBlock(nn.Module):
    """V2's unit between stages: both branches convolve and halve the size."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = _depthwise(in_channels, 2)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = _depthwise(half, 2)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, channels, H / 2, W / 2)."""
        left = functional.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = functional.relu(self.bn3(self.conv3(x)))
        right = functional.relu(self.bn5(self.conv5(self.bn4(self.conv4(right)))))
        return _shuffle(torch.cat([left, right], dim=1), 2)


class SmallShuffleNetV2(nn.Module):
    """ShuffleNetV2 of width 1 whose parameters are named as RepDistiller names them.

    Any image of at least 8x8 pixels fits.

    Source: Ma et al. 2018, "ShuffleNet V2: Practical Guidelines".
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, _STEM_CHANNELS, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(_STEM_CHANNELS)
        self.layer1 = _split_stage(_STEM_CHANNELS, 116, blocks=4)
        self.layer2 = _split_stage(116, 232, blocks=8)
        self.layer3 = _split_stage(232, 464, blocks=4)
        self.conv2 = nn.Conv2d(464, 1024, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1024)
        self.linear = nn.Linear(1024, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, num_classes) logits."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = functional.relu(self.bn2(self.conv2(x)))
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


def _grouped_stage(in_channels: int, channels: int, *, blocks: int) -> nn.Sequential:
    """V1's units of one width; the first one halves the size."""
    # The unit joins its pooled input, so it makes only the channels that are missing.
    first = GroupedBottleneck(in_channels, channels - in_channels, 2)
    return nn.Sequential(
        first, *(GroupedBottleneck(channels, channels, 1) for _ in range(blocks - 1))
    )


def _split_stage(in_channels: int, channels: int, *, blocks: int) -> nn.Sequential:
    """V2's units of one width; the first one halves the size."""
    first = DownBlock(in_channels, channels)
    return nn.Sequential(first, *(SplitBlock(channels) for _ in range(blocks - 1)))


def _depthwise(channels: int, stride: int) -> nn.Conv2d:
    """A 3x3 convolution of every channel by itself."""
    return nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)


def _shuffle(x: Tensor, groups: int) -> Tensor:
    """Deal the channels out: the first of each group, then the second of each, and so on."""
    batch, channels, height, width = x.shape
    x = x.reshape(batch, groups, channels // groups, height, width)
    return x.transpose(1, 2).reshape(batch, channels, height, width)
