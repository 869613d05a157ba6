"""fastprune: knowledge distillation on pruned image datasets.

The public names are imported on first use, so that `import fastprune` and `fastprune --help` load
neither torch nor ffcv nor DALI.
"""

from importlib import import_module
from typing import Any

from fastprune.scratch import keep_compiled_code_somewhere

__version__ = "0.1.0"

keep_compiled_code_somewhere()

_HOMES = {
    "LogitReshaper": "fastprune.distillation.losses",
    "Loader": "fastprune.loading.loader",
    "ScoreTable": "fastprune.artifacts.scores",
    "Subset": "fastprune.artifacts.subset",
    "centroid_distances": "fastprune.difficulty.kernels",
    "check_beton": "fastprune.beton.check",
    "compact": "fastprune.beton.compact",
    "convert": "fastprune.beton.writer",
    "distill": "fastprune.distillation.trainer",
    "open_beton": "fastprune.beton.reader",
    "score": "fastprune.difficulty.teacher",
    "select_rows": "fastprune.selection.strategies",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    """Import a public name from its home on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fastprune' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
