"""The domains of a loader's arguments, checked before anything is opened."""

from collections.abc import Mapping
from typing import Any

import torch

from fastprune.base.checks import require_at_least, require_one_of
from fastprune.base.errors import InvalidValueError
from fastprune.loading.batch import FIELDS
from fastprune.loading.crops import AUGMENTS
from fastprune.loading.sampler import ORDERS, TAILS

_CHOICES = {
    "augment": (None, *AUGMENTS),
    "order": (None, *ORDERS),
    "tail": (None, *TAILS),
    "on_error": ("raise", "skip"),
    "dtype": (torch.float32, torch.float16, torch.bfloat16, torch.uint8),
}
_LEAST = {
    "batch_size": 1,
    "image_size": 1,
    "seed": 0,
    "open_pages": 1,
    "num_negatives": 1,
    "num_views": 1,
    "num_workers": 1,
}
# More is a slip of the keyboard, and would end in a MemoryError or a system without threads.
MOST_PIXELS = 8192
_MOST = {"image_size": MOST_PIXELS, "num_workers": 1024}
_OPTIONAL = ("num_views", "num_workers")


def require_arguments(given: Mapping[str, Any]) -> None:
    """Refuse what is outside its domain, by the name of the argument.

    Raises:
        InvalidValueError: an argument is.
    """
    for name, allowed in _CHOICES.items():
        require_one_of(name, given[name], allowed)
    fields = given["fields"]
    if not fields or set(fields) - set(FIELDS) or len(set(fields)) < len(fields):
        raise InvalidValueError(f"fields must be some of {', '.join(FIELDS)}, not {fields!r}.")
    for name, least in _LEAST.items():
        if given[name] is not None or name not in _OPTIONAL:
            require_at_least(name, given[name], least)
    for name, most in _MOST.items():
        if given[name] is not None and given[name] > most:
            raise InvalidValueError(f"{name} must be at most {most:,}, not {given[name]:,}.")
