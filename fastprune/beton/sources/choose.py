"""Which kind of source a folder is."""

from pathlib import Path

from fastprune.beton.sources import Source
from fastprune.beton.sources.folder import FolderSource


def source_for(images: str | Path) -> Source:
    """The source that reads what is at `images`."""
    return FolderSource(Path(images))
