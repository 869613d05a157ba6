"""Former home of bounded readers, for imports that have not moved yet."""

from fastprune.base.files import open_regular, read_text
from fastprune.base.headers import parse_json

__all__ = ["open_regular", "parse_json", "read_text"]
