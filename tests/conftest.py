"""What every test may use: small generated images, and libraries that CI must not miss."""

import importlib.util
import logging
import os
from collections.abc import Iterator

import pytest

_REQUIRED = tuple(filter(None, os.environ.get("FASTPRUNE_REQUIRE", "").split(",")))
_MODULES = {
    "accelerate": "accelerate",
    "datasets": "datasets",
    "dali": "nvidia.dali",
    "ffcv": "ffcv",
    "lightning": "lightning",
    "ray": "ray",
    "timm": "timm",
    "torchdistill": "torchdistill",
}


def require_library(name: str) -> None:
    """Skip the calling test module where a library is missing, or fail where it must be there."""
    if _is_installed(_MODULES[name]):
        return
    if name in _REQUIRED:
        pytest.fail(f"{name} is not installed, but FASTPRUNE_REQUIRE={','.join(_REQUIRED)}.")
    pytest.skip(f"{name} is not installed", allow_module_level=True)


@pytest.fixture(autouse=True)
def _log_level() -> Iterator[None]:
    """Take back the level that a command sets for its whole process."""
    logger = logging.getLogger("fastprune")
    level = logger.level
    yield
    logger.setLevel(level)


def _is_installed(module: str) -> bool:
    """Whether a module can be found, also where its parent package is missing."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
