"""The teacher's logits beside a batch, from a cache."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fastprune.base.errors import InvalidValueError
from fastprune.rows.teacher_cache import TeacherCache


class Holes(NamedTuple):
    """Which rows of a batch have no logits yet; on the host, so that nobody waits for a device.

    Attributes:
        slot: whose views the batch shows.
        positions: (m,) int64, in the batch.
        rows: (m,) int64, of the beton.
    """

    slot: int
    positions: NDArray[np.int64]
    rows: NDArray[np.int64]


@dataclass(frozen=True)
class CachedLogits:
    """Looks up the logits of batches.

    Attributes:
        cache: of the teacher on the loader's views.
        device: where logits are delivered.
        marks_holes: deliver zeros and `Holes` for what is missing, instead of an error.
    """

    cache: TeacherCache
    device: torch.device
    marks_holes: bool = False

    def look_up(self, rows: NDArray[np.int64], slot: int) -> tuple[torch.Tensor, Holes]:
        """Return the logits (B, C) float32 of rows (B,) on the device, and what is missing.

        Raises:
            ArtifactError: a row has no logits, or its block is damaged.
        """
        if not self.marks_holes:
            logits, found = self.cache.logits(rows, slot), np.ones(len(rows), bool)
        else:
            logits, found = self.cache.lookup(rows, slot)
        positions = np.flatnonzero(~found)
        tensor = torch.from_numpy(logits)
        if self.device.type == "cuda":
            # From pinned memory the copy runs while the device still works on the last step.
            tensor = tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor, Holes(slot, positions, rows[positions])


def open_for_loader(
    cache: str | Path | TeacherCache | None, identity: Mapping[str, Any], *, layout: str
) -> TeacherCache:
    """Open the cache of a loader, and refuse what is of other images or views.

    Raises:
        InvalidValueError: the layout has no place for logits.
        ArtifactMismatch: it is of other images or views; the difference is named.
        ArtifactError: there is no cache, or it is damaged.
    """
    if cache is None:
        raise InvalidValueError(
            'layout="xyit" needs teacher_cache, the folder of the teacher\'s logits. Fill one: '
            "fastprune cache fill."
        )
    if layout not in ("xyit", "xy_supp"):
        raise InvalidValueError(
            f'teacher_cache needs layout="xyit" (images, labels, rows, teacher logits) or '
            f'"xy_supp", not {layout!r}.'
        )
    if not isinstance(cache, TeacherCache):
        return TeacherCache.open(cache, identity=identity)
    cache.require(identity)
    return cache
