"""Advice on a beton whose images the view decoder does not know."""

import logging
from collections import Counter
from pathlib import Path

_LOG = logging.getLogger(__name__)

_VIEWS_BEFORE_ADVICE = 4096
_SHARE_TO_WARN_OF = 0.01


class Advice:
    """Says once of a loader how many images take the slow way, and what to do about it."""

    def __init__(self, path: Path):
        self._path = path
        self._num_views = 0
        self._kinds: Counter[str] = Counter()
        self._given = False

    def note(self, num_views: int, unknown_kinds: list[str]) -> None:
        """Count a batch."""
        self._num_views += num_views
        self._kinds.update(unknown_kinds)
        if self._num_views >= _VIEWS_BEFORE_ADVICE:
            self.give()

    def give(self) -> None:
        """Log what was counted, the first time that there is something."""
        count = self._kinds.total()
        if self._given or not count:
            return
        self._given = True
        kinds = ", ".join(f"{number:,} {kind}" for kind, number in self._kinds.most_common())
        share = count / self._num_views
        _LOG.log(
            logging.WARNING if share >= _SHARE_TO_WARN_OF else logging.INFO,
            "%s: %s of the first %s views (%.1f%%) are of JPEGs that the view decoder does not "
            "know (%s). Pillow decodes them whole, which is slower. Make progressive files and "
            "those of several scans baseline without loss, `jpegtran -copy all -outfile NEW OLD`, "
            "and convert the images again, which encodes CMYK, RGB, arithmetic and 12-bit ones "
            "anew. Files of unusual sampling stay slow until they are encoded anew.",
            self._path,
            f"{count:,}",
            f"{self._num_views:,}",
            100 * share,
            kinds,
        )
