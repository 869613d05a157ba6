"""The rows that a user names, checked against a beton."""

from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastprune.base.errors import warn_user
from fastprune.base.provenance import ContentNotComparedWarning, require_same_images
from fastprune.beton.reader import Beton
from fastprune.beton.remote.presence import require_present
from fastprune.rows.subset import Subset, checked_rows

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
        ArtifactError: the file is missing or no subset, or a mirror does not hold its rows.
        ArtifactMismatch: the subset was made from other images.
    """
    rows = _named_rows(beton, subset)
    require_present(beton.path, beton.present, rows)
    return rows


def _named_rows(beton: Beton, subset: RowsLike) -> NDArray[np.int64]:
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


def kept_rows(beton: Beton, subset: RowsLike) -> NDArray[np.int64]:
    """Return what `rows_of` does, and warn of a file or `Subset` that names no images.

    An array of rows never warns: whoever passes one has just made it.

    Warns:
        ContentNotComparedWarning: nothing, or the structure alone, ties the subset to the beton.
    """
    rows = rows_of(beton, subset)
    if isinstance(subset, str | Path):
        is_unbound = not Path(subset).with_suffix(".json").exists()
    else:
        is_unbound = isinstance(subset, Subset) and subset.fingerprint is None
    if is_unbound:
        name = subset if isinstance(subset, str | Path) else "subset"
        warn_user(
            f"{name} does not say which images it was made from, so nothing was compared with "
            f"{beton.path}. Keep the .json that `fastprune select` writes beside the .npy.",
            ContentNotComparedWarning,
        )
    return rows
