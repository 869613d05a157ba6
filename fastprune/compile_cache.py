"""A place for Numba's compiled code where its usual ones cannot be written."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path


def ensure_compile_cache() -> None:
    """Give Numba a folder of this process where it would find none, and refuse to compile.

    Numba keeps compiled code beside the source, else in the user's cache folder. In a container
    with a read-only root or without a home, neither can be written. The folder is new and private:
    cached code is executed, so it must not come from where others can write. It is removed at
    exit; set NUMBA_CACHE_DIR to a folder that lasts to compile only once.
    """
    if "NUMBA_CACHE_DIR" in os.environ:
        return
    beside_source = Path(__file__).parent / "__pycache__"
    users = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    if _is_writable(beside_source) or _is_writable(users):
        return
    folder = tempfile.mkdtemp(prefix="fastprune-numba-")
    os.environ["NUMBA_CACHE_DIR"] = folder
    atexit.register(shutil.rmtree, folder, ignore_errors=True)


def _is_writable(folder: Path) -> bool:
    """Whether files can be made in a folder, or the folder itself where it is missing."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
