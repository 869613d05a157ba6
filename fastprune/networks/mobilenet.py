"""MobileNets: V1 for ImageNet, V2 in the half and full width of the KD literature."""

import math

from torch import Tensor, nn

_V2_LAST_CHANNELS = 1280
_V2_EXPANSION = 6
# (channels, blocks, stride of the first block) of each stage
_V2_STAGES = ((16, 1, 1), (24, 2, 1), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1))
# (channels, stride) of each depthwise-separable block
_V1_BLOCKS = (
    (64, 1),
    *((128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *((512, 1),) * 5,
    *((1024, 2), (1024, 1)),
)


class InvertedResidual(nn.Module):
    """Widen by 1x1, filter by depth, narrow by 1x1; a shortcut where the shape stays."""

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.has_shortcut = stride == 1 and in_channels == channels
        self.conv = nn.Sequential(
            *_convolution(in_channels, hidden, kernel_size=1),
            *_convolution(hidden, hidden, kernel_size=3, stride=stride, groups=hidden),
            nn.Conv2d(hidden, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, channels, H / stride, W / stride)."""
        y: Tensor = self.conv(x)
        return x + y if self.has_shortcut else y


class SmallMobileNetV2(nn.Module):
    """MobileNetV2 for small images whose parameters are named as RepDistiller names them.

    Any image of at least 16x16 pixels fits.

    Source: Sandler et al. 2018, "MobileNetV2: Inverted Residuals and Linear Bottlenecks".
    """

    def __init__(self, width: float, num_classes: int) -> None:
        super().__init__()
        in_channels = int(32 * width)
        self.conv1 = nn.Sequential(*_convolution(3, in_channels, kernel_size=3, stride=2))
        self.blocks = nn.ModuleList()
        for number, (base_channels, count, first_stride) in enumerate(_V2_STAGES):
            channels, expansion = int(base_channels * width), 1 if number == 0 else _V2_EXPANSION
            stage = []
            for position in range(count):
                stride = first_stride if position == 0 else 1
                stage.append(InvertedResidual(in_channels, channels, stride, expansion))
                in_channels = channels
            self.blocks.append(nn.Sequential(*stage))
        self.conv2 = nn.Sequential(*_convolution(in_channels, _V2_LAST_CHANNELS, kernel_size=1))
        self.classifier = nn.Sequential(nn.Linear(_V2_LAST_CHANNELS, num_classes))
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, num_classes) logits."""
        x = self.conv1(x)
        for stage in self.blocks:
            x = stage(x)
        logits: Tensor = self.classifier(self.conv2(x).mean(dim=(2, 3)))
        return logits


class MobileNetV1(nn.Module):
    """MobileNet of width 1 for ImageNet, the student of ResNet-50 in the KD literature.

    Any image of at least 32x32 pixels fits.

    Source: Howard et al. 2017, "MobileNets"; parameter names as in the CRD and mdistiller code.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        blocks = [nn.Sequential(*_convolution(3, 32, kernel_size=3, stride=2))]
        in_channels = 32
        for channels, stride in _V1_BLOCKS:
            depthwise = _convolution(
                in_channels, in_channels, kernel_size=3, stride=stride, groups=in_channels
            )
            pointwise = _convolution(in_channels, channels, kernel_size=1)
            blocks.append(nn.Sequential(*depthwise, *pointwise))
            in_channels = channels
        self.model = nn.Sequential(*blocks)
        self.fc = nn.Linear(in_channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, num_classes) logits."""
        logits: Tensor = self.fc(self.model(x).mean(dim=(2, 3)))
        return logits


def _convolution(
    in_channels: int, channels: int, *, kernel_size: int, stride: int = 1, groups: int = 1
) -> tuple[nn.Module, ...]:
    """A convolution that keeps the size but for the stride, normalized and activated."""
    padding = kernel_size // 2
    return (
        nn.Conv2d(in_channels, channels, kernel_size, stride, padding, groups=groups, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
    )


def _initialize(network: nn.Module) -> None:
    """As RepDistiller initializes MobileNetV2; torch's defaults differ."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
