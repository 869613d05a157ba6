"""The rows that a user names, checked against a beton."""

from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastprune.artifacts.fingerprint import require_same_images
from fastprune.artifacts.subset import Subset, checked_rows
from fastprune.beton.reader import Beton

RowsLike = str | Path | Subset | ArrayLike | None


def rows_of(beton: Beton, subset: RowsLike) -> NDArray[np.int64]:
    """Return the rows that a subset names in this beton.

    Args:
        beton: the open beton.
        subset: a subset file, a `Subset`, an array of rows, or None for all of them.

    Returns:
        (K,) int64, sorted and unique, in [0, N).

    Raises:
        InvalidValueError: the rows do not index the beton.
        ArtifactError: the file is missing or no subset.
        ArtifactMismatch: the subset was made from other images.
    """
    if subset is None:
        return np.arange(beton.num_rows)
    name = str(subset) if isinstance(subset, str | Path) else "subset"
    if isinstance(subset, str | Path):
        subset = Subset.load(subset)
    if not isinstance(subset, Subset):
        return checked_rows(subset, name=name, num_rows=beton.num_rows)
    if subset.fingerprint is not None:
        require_same_images(
            subset.fingerprint,
            name,
            beton.fingerprint,
            str(beton.path),
            cure=f"Make a subset for this beton: fastprune score {beton.path} ... && "
            "fastprune select ...",
        )
    return checked_rows(subset.rows, name=name, num_rows=beton.num_rows)
