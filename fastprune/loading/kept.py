"""The kept rows: any form of a subset, held against the beton it is to be used with."""

import warnings
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastprune.artifacts.fingerprint import ContentNotComparedWarning, require_same_images
from fastprune.artifacts.subset import Subset, checked_rows
from fastprune.beton.reader import Beton

SubsetLike: TypeAlias = "str | Path | Subset | ArrayLike | None"


def kept_rows(subset: SubsetLike, beton: Beton) -> NDArray[np.int64]:
    """The rows that a subset keeps of a beton.

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
    if subset is None:
        return np.arange(beton.num_rows, dtype=np.int64)
    name = "subset"
    if isinstance(subset, str | Path):
        name = str(subset)
        subset = Subset.load(subset)
    if not isinstance(subset, Subset):
        return checked_rows(subset, name=name, num_rows=beton.num_rows)
    if subset.fingerprint is None:
        warnings.warn(
            f"{name} does not say which images it was made from, so nothing was compared with "
            f"{beton.path}. Keep the .json that `fastprune select` writes beside the .npy.",
            ContentNotComparedWarning,
            stacklevel=3,
        )
    else:
        require_same_images(
            subset.fingerprint,
            name,
            beton.fingerprint,
            str(beton.path),
            cure=f"Make a subset for this beton: fastprune score {beton.path} ... "
            "&& fastprune select ...",
        )
    return checked_rows(subset.rows, name=name, num_rows=beton.num_rows)
