"""Folders for temporary files, also where the root file system cannot be written."""

import os
from collections.abc import Iterator
from pathlib import Path


def scratch_folders() -> Iterator[Path]:
    """The folders for temporary files that can be written here, the usual one first."""
    # A container with a read-only root file system has a writable /dev/shm all the same.
    for name in (os.environ.get("TMPDIR") or "/tmp", "/dev/shm"):  # noqa: S108
        if os.access(name, os.W_OK | os.X_OK):
            yield Path(name)
