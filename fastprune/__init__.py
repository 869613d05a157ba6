"""fastprune: knowledge distillation on pruned image datasets.

The public names are imported on first use, so that `import fastprune` and `fastprune --help` load
neither torch nor ffcv nor DALI.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastprune.base.compiled import ensure_compile_cache

__version__ = "0.1.0"

ensure_compile_cache()

if TYPE_CHECKING:
    from fastprune.beton.check import check_beton
    from fastprune.beton.compact import compact
    from fastprune.beton.convert.writer import convert
    from fastprune.beton.opening import open_beton
    from fastprune.beton.remote.stage import stage
    from fastprune.difficulty.kernels import centroid_distances
    from fastprune.difficulty.score import score
    from fastprune.distillation.learner import ProjectorEnsemble
    from fastprune.distillation.losses import (
        LogitReshaper,
        decoupled_distillation_loss,
        distillation_loss,
        feature_loss,
        standardize_logits,
    )
    from fastprune.distillation.trainer import distill
    from fastprune.jpeg.decode import decode_view
    from fastprune.loading.loader import Loader
    from fastprune.rows.score_table import ScoreTable
    from fastprune.rows.subset import Subset
    from fastprune.rows.teacher_cache import TeacherCache
    from fastprune.selection.strategies import select_rows

__all__ = [
    "Loader",
    "LogitReshaper",
    "ProjectorEnsemble",
    "ScoreTable",
    "Subset",
    "TeacherCache",
    "__version__",
    "centroid_distances",
    "check_beton",
    "compact",
    "convert",
    "decode_view",
    "decoupled_distillation_loss",
    "distill",
    "distillation_loss",
    "feature_loss",
    "open_beton",
    "score",
    "select_rows",
    "stage",
    "standardize_logits",
]

_HOMES = {
    "LogitReshaper": "fastprune.distillation.losses",
    "Loader": "fastprune.loading.loader",
    "ProjectorEnsemble": "fastprune.distillation.learner",
    "ScoreTable": "fastprune.rows.score_table",
    "Subset": "fastprune.rows.subset",
    "TeacherCache": "fastprune.rows.teacher_cache",
    "centroid_distances": "fastprune.difficulty.kernels",
    "check_beton": "fastprune.beton.check",
    "compact": "fastprune.beton.compact",
    "convert": "fastprune.beton.convert.writer",
    "decode_view": "fastprune.jpeg.decode",
    "decoupled_distillation_loss": "fastprune.distillation.losses",
    "distill": "fastprune.distillation.trainer",
    "distillation_loss": "fastprune.distillation.losses",
    "feature_loss": "fastprune.distillation.losses",
    "open_beton": "fastprune.beton.opening",
    "score": "fastprune.difficulty.score",
    "select_rows": "fastprune.selection.strategies",
    "stage": "fastprune.beton.remote.stage",
    "standardize_logits": "fastprune.distillation.losses",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its home on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fastprune' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
