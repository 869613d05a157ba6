"""The known network names, without importing torch, so that a typo is found at once."""

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from fastprune.base.checks import did_you_mean
from fastprune.base.errors import InvalidValueError

# The keys of `catalog.SMALL_NETWORKS`, in their order; a test compares them.
SMALL_NAMES = (
    *(f"resnet{depth}" for depth in (8, 14, 20, 32, 44, 56, 110)),
    *(f"resnet{depth}x4" for depth in (8, 32)),
    *(f"ResNet{depth}" for depth in (18, 34, 50)),
    *(f"vgg{depth}" for depth in (8, 11, 13, 16, 19)),
    *("MobileNetV1", "MobileNetV2", "mobile_half", "mobile_full", "ShuffleV1", "ShuffleV2"),
)
WIDE_RESNET = re.compile(r"wrn_(\d+)_(\d+)")
WIDE_EXAMPLES = ("wrn_40_2", "wrn_16_2", "wrn_40_1")
# torchvision registers its builders by this decorator; importing it to ask takes seconds.
_REGISTERED = re.compile(
    r"^@register_model\((?:name=\"(\w+)\")?\)\n(?:@.*\n)*def (\w+)\(", re.MULTILINE
)


def require_known_network(name: str) -> None:
    """Raise InvalidValueError, with the nearest known name, if no network can have this name.

    timm's networks and factories (`package.module:function`) pass: a look would import them.
    """
    source, _, rest = name.partition(":")
    if rest and source != "torchvision":
        return
    if not rest and (name in SMALL_NAMES or WIDE_RESNET.fullmatch(name)):
        return
    known = torchvision_names()
    # Without its sources, as in a zipped installation, torchvision itself decides later.
    if known and (rest or name) not in known:
        hint = did_you_mean(rest or name, [*known, *SMALL_NAMES, *WIDE_EXAMPLES], list_known=False)
        raise InvalidValueError(f"network {name!r} is not known.{hint}")


@cache
def torchvision_names() -> tuple[str, ...]:
    """List torchvision's classifiers from its source files; empty where these cannot be read."""
    package = find_spec("torchvision")
    if package is None or package.origin is None:
        return ()
    # Detection, segmentation and video have folders of their own.
    files = sorted((Path(package.origin).parent / "models").glob("*.py"))
    found = [match for file in files for match in _REGISTERED.findall(file.read_text("utf-8"))]
    return tuple(sorted(given or function for given, function in found))
