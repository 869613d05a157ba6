"""Is a cache of this teacher on these views: entries drawn at random, and asked again."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastprune.base.errors import ArtifactMismatch

if TYPE_CHECKING:
    from fastprune.rows.teacher_cache import TeacherCache

# Rounding, other batch sizes and other devices stay well below; another teacher or view is near 1.
VERIFY_TOLERANCE = 0.05


def verify_cache(
    cache: "TeacherCache",
    teacher: Callable[[NDArray[np.int64], int], ArrayLike],
    n: int,
    *,
    tolerance: float,
) -> float:
    """See `TeacherCache.verify`."""
    filled = [np.flatnonzero(cache.has(cache.rows, slot)) for slot in range(cache.num_views)]
    worst = 0.0
    for slot, positions in _draw_entries(filled, n):
        rows = cache.rows[positions]
        kept = cache.logits(rows, slot)
        now = cache.round_trip(teacher(rows, slot), rows)
        spread = np.maximum(kept.std(axis=1), np.finfo(np.float16).eps)
        differences = np.sqrt(((now - kept) ** 2).mean(axis=1)) / spread
        worst = max(worst, float(differences.max()))
        if worst > tolerance:
            row = rows[np.argmax(differences)]
            raise ArtifactMismatch(
                f"{cache.path} is not of this teacher on these views: row {row:,} in slot {slot} "
                f"differs by {worst:.2f} of its logits' standard deviation (allowed: {tolerance}). "
                "Name another folder, or the teacher and the settings that filled it."
            )
    return worst


def _draw_entries(filled: list[NDArray[np.intp]], n: int) -> Iterator[tuple[int, NDArray[np.intp]]]:
    """Draw up to n filled entries at random: (slot, sorted positions) for each slot that has any.

    Args:
        filled: of each slot, the positions that are filled.
        n: entries to draw.
    """
    ends = np.cumsum([len(positions) for positions in filled])
    drawn = np.random.default_rng().choice(ends[-1], min(n, int(ends[-1])), replace=False)
    slots = np.searchsorted(ends, drawn, side="right")
    for slot in np.unique(slots).tolist():
        within = drawn[slots == slot] - (ends[slot - 1] if slot else 0)
        yield slot, np.sort(filled[slot][within])
