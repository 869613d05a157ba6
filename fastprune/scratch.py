"""Folders that can be written, also where the root file system cannot."""

import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path


def scratch_folders() -> Iterator[Path]:
    """The folders for temporary files that can be written here, the usual one first."""
    # A container with a read-only root file system has a writable /dev/shm all the same.
    for name in (os.environ.get("TMPDIR") or "/tmp", "/dev/shm"):  # noqa: S108
        if os.access(name, os.W_OK | os.X_OK):
            yield Path(name)


def keep_compiled_code_somewhere() -> None:
    """Name a folder for Numba's compiled code where Numba would find none.

    Numba refuses to import a cached function if it can write neither NUMBA_CACHE_DIR nor the
    package's folder nor the user's cache: a container with a read-only root, or without a home.
    """
    if any(_can_be_made(folder) for folder in _numba_folders()):
        return
    for scratch in scratch_folders():
        folder = scratch / f"fastprune-{os.getuid()}"
        if _is_private(folder):
            os.environ["NUMBA_CACHE_DIR"] = str(folder)
            if "numba" in sys.modules:
                sys.modules["numba"].config.CACHE_DIR = str(folder)
            return


def _numba_folders() -> list[Path]:
    """Where Numba keeps compiled code: the first that can be written."""
    named = os.environ.get("NUMBA_CACHE_DIR")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path(os.path.expanduser("~"), ".cache"))  # noqa: PTH111 - Path.home() raises for a user without a home
    return [*([Path(named)] if named else []), Path(__file__).parent, home]


def _can_be_made(folder: Path) -> bool:
    """Whether a folder can be written, or made in the nearest folder above it that is there."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return os.access(folder, os.W_OK | os.X_OK)


def _is_private(folder: Path) -> bool:
    """Make a folder that only this user can write: code is loaded from it, so it must be ours."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError:
        return False
    return (
        stat.S_ISDIR(status.st_mode)
        and status.st_uid == os.getuid()
        and stat.S_IMODE(status.st_mode) & 0o022 == 0
    )
