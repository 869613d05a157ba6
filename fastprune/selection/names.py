"""A hint for a name that is not known."""

import difflib
from collections.abc import Iterable


def nearest_name(name: str, known: Iterable[str]) -> str:
    """Say what was probably meant, and what there is.

    >>> nearest_name("mediun", ["easy", "medium"])
    " Did you mean 'medium'? There are: easy, medium."
    """
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    meant = f" Did you mean {close[0]!r}?" if close else ""
    return f"{meant} There are: {', '.join(names)}."
