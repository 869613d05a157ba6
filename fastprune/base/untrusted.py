"""Readers over plain JSON objects, for callers that do not declare a `Header` yet."""

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastprune.base import headers
from fastprune.base.files import MAX_BYTES, open_regular, read_bytes, read_text
from fastprune.base.headers import (
    BAD_HEADER,
    parse_json,
    parse_toml,
    read_npy,
    read_npz_member,
)

__all__ = [
    "BAD_HEADER",
    "MAX_BYTES",
    "member",
    "numbers",
    "open_regular",
    "parquet_metadata",
    "parse_json",
    "parse_toml",
    "read_bytes",
    "read_json",
    "read_npy",
    "read_npz_member",
    "read_text",
]

_JSON_NAMES = {
    dict: "an object",
    list: "a list",
    str: "text",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def read_json(path: str | Path) -> Any:
    """Read a JSON file; see `parse_json`."""
    return parse_json(read_bytes(path))


def parquet_metadata(path: str | Path, key: bytes) -> Any:
    """Parse the JSON in the metadata of a Parquet file."""
    return parse_json(headers.parquet_metadata(path, key))


def member(record: Any, key: str, *types: type | None) -> Any:
    """Return one entry of a JSON object if it has one of these types.

    Args:
        record: what should be an object.
        key: of the entry.
        types: of JSON: dict, list, str, int, float (integers fit too), bool; None for null. Where
            null is allowed, the entry may be missing.

    Raises:
        ValueError: the record is no object, or the entry is missing or of another type.
    """
    if not isinstance(record, dict):
        raise ValueError(f"it holds {_json_name(record)}, but must hold an object")
    if key not in record and None not in types:
        raise ValueError(f"it has no {key!r}")
    value = record.get(key)
    for kind in types:
        if kind is None and value is None:
            return value
        accepted = (int, float) if kind is float else kind or ()
        # True is an int to Python, and json.loads takes NaN and Infinity for numbers.
        if isinstance(value, accepted) and (kind is bool or not isinstance(value, bool)):
            if isinstance(value, float) and not math.isfinite(value):
                break
            return value
    wanted = " or ".join(_JSON_NAMES[kind or type(None)] for kind in types)
    raise ValueError(f"its {key!r} is {_json_name(value)}, but must be {wanted}")


def numbers(record: Any, key: str, *, max_count: int) -> NDArray[np.float64]:
    """Return a list of finite numbers >= 0 in a JSON object; null stands for NaN.

    Args:
        record: what should be an object.
        key: of the list.
        max_count: the longest list that makes sense.

    Returns:
        (n,) float64.

    Raises:
        ValueError: it is no such list.
    """
    values = member(record, key, list)
    if len(values) > max_count:
        raise ValueError(f"its {key!r} has {len(values):,} numbers, but at most {max_count:,} fit")
    for value in values:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        # JSON's integers have no bound, a float64 has.
        if value is not None and not (is_number and 0 <= value <= sys.float_info.max):
            shown = repr(value)[:40]
            raise ValueError(f"its {key!r} holds {shown}, but must hold finite numbers >= 0")
    return np.array(values, np.float64)


def _json_name(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return _JSON_NAMES.get(type(value), type(value).__name__)
