"""Refuse arguments outside their domain, and hint at names that were probably meant."""

import difflib
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from fastprune.base.errors import InvalidValueError

#: Loaders keep a name per class, and files numbers for each; a label beyond this is damage.
MAX_CLASSES = 1_000_000


def require_one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raise InvalidValueError unless the value is one of the allowed ones."""
    if value not in allowed:
        choices = ", ".join(repr(choice) for choice in allowed)
        raise InvalidValueError(f"{name} must be one of {choices}, not {value!r}.")


def require_at_least(name: str, value: int, least: int) -> None:
    """Raise InvalidValueError unless the value is an integer in [least, 2**63)."""
    # True and False are ints in Python, but never a count or a seed.
    is_integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not is_integer or value < least:
        raise InvalidValueError(f"{name} must be an integer >= {least}, not {value!r}.")
    # Rows, epochs and seeds are int64 in every array and kernel.
    if value >= 2**63:
        raise InvalidValueError(f"{name} must be below 2**63, not {value!r}.")


def require_channels(
    name: str, values: Sequence[float], *, positive: bool = False
) -> tuple[float, ...]:
    """Return one finite number for each of red, green and blue.

    Raises:
        InvalidValueError: not three finite numbers, or, with `positive`, one that is not.
    """
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        numbers = ()
    # NaN passes every comparison's negation, so finiteness is asked for by itself.
    is_fit = len(numbers) == 3 and all(map(math.isfinite, numbers))
    if not is_fit or (positive and min(numbers) <= 0):
        kind = "finite positive numbers" if positive else "finite numbers"
        raise InvalidValueError(
            f"{name} must be three {kind}, for red, green and blue of values in [0, 1], not "
            f"{values!r}."
        )
    return numbers


def did_you_mean(name: str, known: Iterable[str], *, list_known: bool = True) -> str:
    """Return the end of an error message for an unknown name: the nearest one, then all.

    Empty if no names are known; `list_known=False` leaves a long list out.

    >>> did_you_mean("mediun", ["easy", "medium"])
    " Did you mean 'medium'? There are: easy, medium."
    """
    names = list(known)
    # The cutoff of 0 names the best candidate however poor it is: a list may be long.
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{hint} There are: {', '.join(names)}." if list_known and names else hint
