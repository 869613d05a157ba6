"""Refusals of arguments outside their domain."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastprune.errors import InvalidValueError


def require_one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Refuse a value that is none of those allowed.

    Raises:
        InvalidValueError: the value is another.
    """
    if value not in allowed:
        choices = ", ".join(repr(choice) for choice in allowed)
        raise InvalidValueError(f"{name} must be one of {choices}, not {value!r}.")


def require_at_least(name: str, value: int, least: int) -> None:
    """Refuse what is no integer, or an integer below its domain, or one of more than 63 bits.

    Raises:
        InvalidValueError: the value is such.
    """
    is_integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not is_integer or value < least:
        raise InvalidValueError(f"{name} must be an integer >= {least}, not {value!r}.")
    if value >= 2**63:
        raise InvalidValueError(f"{name} must be below 2**63, not {value!r}.")


def require_channels(
    name: str, values: Sequence[float], *, positive: bool = False
) -> tuple[float, ...]:
    """One number for each of red, green and blue.

    Raises:
        InvalidValueError: there are not three numbers, or one is not positive where all must be.
    """
    numbers = tuple(float(value) for value in values)
    if len(numbers) != 3 or (positive and min(numbers) <= 0):
        kind = "positive numbers" if positive else "numbers"
        raise InvalidValueError(
            f"{name} must be three {kind}, for red, green and blue of values in [0, 1], not "
            f"{values!r}."
        )
    return numbers
