"""Entries from Python into compiled code, kept in Numba's disk cache."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit

from fastprune.jpeg.native import BOUNDS_CHECKED, VECTORS


def source_digest(*more: Path) -> int:
    """A number that changes with the decoder's sources, more files, and what it is compiled for.

    Numba notices edits of the file of a cached function alone, not of what it calls; but its key
    holds the values that a closure captures. So each entry captures this number; `more` are the
    files beyond this folder whose functions or numbers it uses.
    """
    digest = hashlib.blake2b(bytes([VECTORS, BOUNDS_CHECKED]), digest_size=7)
    for path in (*sorted(Path(__file__).parent.glob("*.py")), *more):
        digest.update(path.read_bytes())
    return int.from_bytes(digest.digest())


def cached(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function, from the disk cache where that has it."""
    compiled: Callable[..., Any] = njit(cache=True, nogil=True, error_model="numpy")(function)
    return compiled
