"""The kept rows: any form of a subset, held against the beton it is to be used with."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastprune.artifacts.fingerprint import ContentNotComparedWarning
from fastprune.artifacts.subset import Subset
from fastprune.beton.reader import Beton
from fastprune.beton.rows import RowsLike, rows_of
from fastprune.errors import warn_user


def kept_rows(subset: RowsLike, beton: Beton) -> NDArray[np.int64]:
    """The rows that a subset keeps of a beton; as `rows_of`, but an unbound file is warned of.

    Args:
        subset: a subset file, a `Subset`, an array of rows, or None for all rows.
        beton: the beton that the rows index.

    Returns:
        (K,) int64, sorted and unique.

    Raises:
        ArtifactMismatch: the subset was made from other images.
        ArtifactError: the file cannot be read.
        InvalidValueError: the rows are no sorted, unique integers in [0, N).

    Warns:
        ContentNotComparedWarning: nothing, or the structure alone, ties the subset to the beton.
    """
    rows = rows_of(beton, subset)
    if _is_unbound(subset):
        name = subset if isinstance(subset, str | Path) else "subset"
        warn_user(
            f"{name} does not say which images it was made from, so nothing was compared with "
            f"{beton.path}. Keep the .json that `fastprune select` writes beside the .npy.",
            ContentNotComparedWarning,
        )
    return rows


def _is_unbound(subset: RowsLike) -> bool:
    """Whether this is a file or a `Subset` that carries no fingerprint; an array never does."""
    if isinstance(subset, str | Path):
        return not Path(subset).with_suffix(".json").exists()
    return isinstance(subset, Subset) and subset.fingerprint is None
