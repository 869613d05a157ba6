"""Refusals of arguments outside their domain."""

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
    """Refuse what is no integer, or an integer below its domain.

    Raises:
        InvalidValueError: the value is such.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise InvalidValueError(f"{name} must be an integer >= {least}, not {value!r}.")
