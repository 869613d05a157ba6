"""The state of a loader: where it is, what decides which batches follow, and what is refused."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastprune.base.errors import InvalidValueError

# 2: a subset has the order of the whole beton, with the other rows left out.
VERSION = 2

_POSITION = ("epoch", "batches")


def make_state(
    position: tuple[int, int], rows: NDArray[np.int64] | None, terms: dict[str, Any]
) -> dict[str, Any]:
    """Return a state that `torch.save` and JSON can hold, but for the rows a plain dict.

    Args:
        position: epoch and batches consumed of it.
        rows: (K,) int64, the kept rows if they were changed on the way; else None.
        terms: what besides the position decides which batches come.
    """
    tensor = None if rows is None else torch.from_numpy(rows)
    return {
        "version": VERSION,
        **dict(zip(_POSITION, position, strict=True)),
        "rows": tensor,
    } | terms


def read_state(
    state: dict[str, Any], terms: dict[str, Any]
) -> tuple[tuple[int, int], NDArray[np.int64] | None]:
    """Return position and changed rows of a state that other code kept.

    Raises:
        InvalidValueError: it is not a loader's state, or of an earlier version.
    """
    missing = [name for name in (*_POSITION, "rows", *terms) if name not in (state or {})]
    if isinstance(state, dict) and "epoch" in state and state.get("version") != VERSION:
        raise InvalidValueError(
            f"the state is of version {state.get('version', 1)} and this is version {VERSION}, in "
            "which the rows of a subset come in another order. Start a new run, or give up what "
            f"was done of epoch {state['epoch']}: set_epoch({state['epoch']}) begins it again."
        )
    if not isinstance(state, dict) or missing:
        found = f"lacks {', '.join(missing)}" if isinstance(state, dict) else f"is {state!r:.80}"
        raise InvalidValueError(
            f"this is not a loader's state: it {found}. Pass what state_dict() returned, whole."
        )
    for name in _POSITION:
        value = state[name]
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
            raise InvalidValueError(
                f"the state's {name} must be an integer in [0, 2**63), not {value!r}. Pass what "
                "state_dict() returned."
            )
    rows = state["rows"]
    try:
        # A checkpoint that was read with map_location="cuda" has its tensors there.
        kept = None if rows is None else np.asarray(torch.as_tensor(rows).cpu().numpy(), np.int64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidValueError(
            f"the state's rows must be integers, not {rows!r:.80}. Pass what state_dict() returned."
        ) from error
    return (state["epoch"], state["batches"]), kept


def require_same_batches(theirs: dict[str, Any], ours: dict[str, Any], *, num_batches: int) -> None:
    """Refuse the state of a loader that gives other batches.

    Args:
        theirs: the state.
        ours: the terms of this loader, with the rows of the state.
        num_batches: of an epoch of these rows.

    Raises:
        InvalidValueError: terms differ, and each is named, or the position lies behind the epoch.
    """
    differing = ", ".join(
        f"{name} ({theirs[name]!r} there, {value!r} here)"
        for name, value in ours.items()
        if theirs[name] != value
    )
    if differing:
        raise InvalidValueError(
            f"the state is of a loader with other batches: {differing}. Make this loader with "
            "the same arguments, or start a new run."
        )
    if theirs["batches"] > num_batches:
        raise InvalidValueError(
            f"the state is of batch {theirs['batches']:,}, but an epoch has {num_batches:,} "
            "batches. Pass what state_dict() returned."
        )
