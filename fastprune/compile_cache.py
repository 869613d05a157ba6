"""A place for Numba's compiled code where its usual ones cannot be written."""

import atexit
import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from fastprune.scratch import scratch_folders

PREFIX = "fastprune-numba-"


def ensure_compile_cache() -> None:
    """Give Numba a folder of this process where it would find none, and refuse to compile.

    Numba keeps compiled code in NUMBA_CACHE_DIR, else beside the source, else in the user's cache
    folder. In a container with a read-only root or without a home, none can be written. The folder
    is new and private: cached code is executed, so it must not come from where others can write.
    It is removed at exit; set NUMBA_CACHE_DIR to a folder that lasts to compile only once. What a
    NUMBA_CACHE_DIR that is filled but read-only holds, in an image that was built with it, is taken
    along, though other places may be written: Numba would not look for it there.
    """
    named = [Path(name)] if (name := os.environ.get("NUMBA_CACHE_DIR")) else []
    is_filled = any(not _is_writable(place) and _holds_files(place) for place in named)
    beside_source = Path(__file__).parent / "__pycache__"
    # Unlike Path.home(), this does not raise for a user who is not in /etc/passwd.
    users = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))  # noqa: PTH111
    if not is_filled and any(_is_writable(place) for place in (*named, beside_source, users)):
        return
    scratch = next(scratch_folders(), None)
    if scratch is None:
        return  # Numba will say what it tried.
    folder = tempfile.mkdtemp(prefix=PREFIX, dir=scratch)
    with contextlib.suppress(OSError):  # it may be missing, or unreadable too
        for compiled in named:
            _copy_files(compiled, Path(folder))
    os.environ["NUMBA_CACHE_DIR"] = folder
    atexit.register(shutil.rmtree, folder, ignore_errors=True)


def _copy_files(source: Path, target: Path) -> None:
    """Copy a tree's files, but not its modes: the copy is private and can be written."""
    for path in source.rglob("*"):
        if path.is_file():
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


def _holds_files(folder: Path) -> bool:
    """Whether there is anything to copy in a folder."""
    try:
        return any(path.is_file() for path in folder.rglob("*"))
    except OSError:
        return False


def _is_writable(folder: Path) -> bool:
    """Whether files can be made in a folder, or the folder itself where it is missing."""
    folder = folder.absolute()
    existing = next(path for path in (folder, *folder.parents) if _exists(path))
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def _exists(path: Path) -> bool:
    """Whether a path can be seen: what lies in a folder that others may not enter cannot."""
    try:
        return path.exists()
    except PermissionError:
        return False
