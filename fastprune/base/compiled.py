"""Compiled code, kept on disk for the next process.

Numba's own cache notices edits of a function's file but not of what the function calls, has an
index that processes write without a lock, and runs the code it finds in its folder. Here each
compiled function is one file. Its name holds a digest of everything the code was made from, so that
processes, versions and CPUs share a folder, and none finds another's code. Its content begins with
a digest of the rest, so that damage is found before the code runs. And only folders are used that
no other user can write to.
"""

import contextlib
import functools
import hashlib
import logging
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastprune.base.files import temporary_path, try_lock

_LOG = logging.getLogger(__name__)

_SUFFIX = ".compiled"
_DIGEST_BYTES = 16
# Long enough for a job that runs monthly to find its code again.
_UNUSED_SECONDS = 30 * 24 * 3600.0
_LONGEST_WAIT_SECONDS, _SECONDS_BETWEEN_TRIES = 120.0, 0.05


def cached(*sources: Path, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function at its first call, unless an earlier process has kept the compiled code.

    Processes that start together compile once: the first one does, the others wait for its files.

    Args:
        sources: every file of which functions or constants are compiled in, the function's own too.
        options: of `numba.njit`.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        from numba import njit
        from numba.core.compiler_lock import global_compiler_lock

        dispatcher = njit(**options)(function)
        # What `cache=True` sets, with an object of the same methods.
        dispatcher._cache = CompiledFiles(function, sources)
        compile_function = dispatcher.compile

        def compile_alone(signature: Any) -> Any:
            # Numba calls nothing of ours between loading and saving, and nothing at all if it
            # fails, so the lock that `load_overload` takes is released here.
            with global_compiler_lock, _turn:
                return compile_function(signature)

        dispatcher.compile = compile_alone
        return dispatcher

    return decorate


class _Turn:
    """The turn of this process to compile: a lock on the folder, until the outermost call ends.

    Functions are compiled inside of others' compilation, so calls nest. A lock on the folder is
    freed with the process, however it ends. All calls are made under Numba's own lock.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._descriptor: int | None = None

    def __enter__(self) -> None:
        self._depth += 1

    def __exit__(self, *error: object) -> None:
        self._depth -= 1
        if self._depth == 0 and self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def take(self, folder: Path) -> bool:
        """Wait for the turn; False where it was there already, so nothing new can be found.

        A process that compiles for longer than any function takes hangs, and is not waited for.
        """
        if self._descriptor is not None:
            return False
        try:
            self._descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        deadline, has_waited = time.monotonic() + _LONGEST_WAIT_SECONDS, False
        while not try_lock(self._descriptor) and time.monotonic() < deadline:
            has_waited = True
            time.sleep(_SECONDS_BETWEEN_TRIES)
        return has_waited


_turn = _Turn()


class CompiledFiles:
    """The compiled code of one function, a file for each signature; see `numba.core.caching`.

    Not a subclass of Numba's `FunctionCache`: that keeps an index without a lock, and looks for its
    folder as NUMBA_CACHE_LOCATOR_CLASSES tells all functions of the process.
    """

    def __init__(self, function: Callable[..., Any], sources: tuple[Path, ...]):
        self._name = f"{function.__module__}.{function.__qualname__}"
        self._sources = sources

    @property
    def cache_path(self) -> str:
        """Where new code is written."""
        return str(writable_folder())

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        """Load the code for a signature; None where the caller is to compile it."""
        from numba.core.compiler import CompileResult

        target_context.refresh()
        name = self._file_name(signature, target_context.codegen())
        payload = _find(name)
        if payload is None and (folder := writable_folder()) is not None and _turn.take(folder):
            payload = _find(name)  # by the process that was waited for
        return None if payload is None else CompileResult._rebuild(target_context, *payload)

    def save_overload(self, signature: Any, result: Any) -> None:
        """Write the code for a signature, if there is a folder for it."""
        # Imported late, as everywhere here: numba takes a second, and `--help` needs none of it.
        from numba.core.serialize import dumps

        assert not result.library.has_dynamic_globals, "addresses would be kept"
        folder = writable_folder()
        if folder is None:
            _note_no_folder()
            return
        content = dumps(result._reduce())
        try:
            _write(folder / self._file_name(signature, result.codegen), content)
            _remove_unused(folder, self._name)
        except OSError as error:
            _LOG.warning("compiled code cannot be kept in %s (%s)", folder, error)

    def enable(self) -> None:
        """Do nothing: the files are always used, and `recompile()` replaces them."""

    disable = flush = enable

    def _file_name(self, signature: Any, codegen: Any) -> str:
        import llvmlite
        import numba
        from numba.core import config
        from numba.core.sigutils import normalize_signature

        key = (
            [str(argument) for argument in normalize_signature(signature)[0]],
            codegen.magic_tuple(),  # the CPU's name and its features
            bool(getattr(config, "BOUNDSCHECK", False)),
            (sys.version, numba.__version__, llvmlite.__version__),
            _source_digest(self._sources),
        )
        digest = hashlib.blake2b(repr(key).encode(), digest_size=_DIGEST_BYTES)
        return f"{self._name}-{digest.hexdigest()}{_SUFFIX}"


@functools.cache
def _source_digest(sources: tuple[Path, ...]) -> str:
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for path in sources:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _find(name: str) -> Any:
    """Unpickle the first intact file of this name in a trusted folder, if there is one."""
    payloads = (_read(folder / name) for folder in _readable_folders())
    return next((payload for payload in payloads if payload is not None), None)


def _read(path: Path) -> Any:
    """Unpickle a file; None where it is missing, or damaged and therefore removed."""
    import pickle

    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, payload = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if digest != hashlib.blake2b(payload, digest_size=_DIGEST_BYTES).digest():
        _LOG.warning("%s is damaged: the function is compiled again", path)
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        return None
    with contextlib.suppress(OSError):  # root's file, in an image
        os.utime(path)  # see _remove_unused
    return pickle.loads(payload)  # noqa: S301 - only we can write here, see _is_trusted


def _write(path: Path, payload: bytes) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Whole or not at all: other processes may look for the file at the same time. Not fsynced,
    # because the digest finds what a power failure cut short.
    with temporary_path(path) as temporary:
        temporary.touch(0o600)
        digest = hashlib.blake2b(payload, digest_size=_DIGEST_BYTES).digest()
        temporary.write_bytes(digest + payload)
        temporary.replace(path)


def _remove_unused(folder: Path, name: str) -> None:
    """Remove files that were not loaded for a month: older versions, other CPUs, parts of files."""
    for path in folder.glob(f"*{name}-*"):
        if path.stat().st_mtime < time.time() - _UNUSED_SECONDS:
            path.unlink(missing_ok=True)


def writable_folder() -> Path | None:
    """The folder that new compiled code goes to; None where no folder can be trusted."""
    return next((folder for folder in _own_folders() if _make_private(folder)), None)


def _readable_folders() -> Iterator[Path]:
    """Trusted folders that may hold compiled code, including the code of a container image."""
    if name := os.environ.get("NUMBA_CACHE_DIR"):
        yield from filter(_is_trusted, (Path(name), Path(name) / "fastprune-0"))
    yield from filter(_is_trusted, _own_folders())


def _own_folders() -> Iterator[Path]:
    """Folders that compiled code may be kept in, the best first.

    A named folder is used itself if only we can write to it, else a private folder in it.
    """
    own = f"fastprune-{os.geteuid()}"
    if name := os.environ.get("NUMBA_CACHE_DIR"):
        yield Path(name)
        yield Path(name) / own
    if (users := Path(_users_cache(), "fastprune")).is_absolute():
        yield users
    for folder in scratch_folders():
        yield folder / own


def _users_cache() -> str:
    # Unlike Path.home(), this does not raise for a user who is not in /etc/passwd: "~" stays.
    return os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111


def _make_private(folder: Path) -> bool:
    """Create a folder if it is missing; return whether only we can write to it."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return False
    return _is_trusted(folder) and os.access(folder, os.W_OK | os.X_OK)


def _is_trusted(folder: Path) -> bool:
    """Whether only root and this user can put files into a folder, or replace the folder.

    Checks the literal path as well as the one its links lead to. In a parent that belongs to root
    and has the sticky bit, such as /tmp, others can make files but not replace ours.
    """
    literal, real = Path(os.path.abspath(folder)), Path(os.path.realpath(folder))  # noqa: PTH100
    for path in {literal, *literal.parents, real, *real.parents}:
        try:
            status = path.lstat()
        except OSError:
            return False
        if status.st_uid not in (0, os.geteuid()):
            return False
        # A link's own mode means nothing; the folder it leads to is in the other path.
        if stat.S_ISLNK(status.st_mode) or not status.st_mode & 0o022:
            continue
        is_sticky = status.st_uid == 0 and status.st_mode & stat.S_ISVTX
        if not is_sticky or path in (literal, real):
            return False
    return True


@functools.cache
def _note_no_folder() -> None:
    """Warn once that every process compiles."""
    _LOG.warning(
        "compiled code cannot be kept, so each process compiles for some seconds. Name a folder in "
        "NUMBA_CACHE_DIR that you own and that no other user can write to."
    )


def ensure_compile_cache() -> None:
    """Give Numba's own cache, for the functions of other libraries, a folder that it can use.

    Numba runs the code it finds in NUMBA_CACHE_DIR, even if another user put it there, and refuses
    to compile where neither that nor its usual folders can be written.
    """
    named = os.environ.get("NUMBA_CACHE_DIR")
    beside_source = Path(__file__).parents[1] / "__pycache__"
    users = Path(_users_cache())
    if _is_trusted(Path(named)) if named else any(map(_is_writable, (beside_source, users))):
        return
    if (folder := writable_folder()) is not None:
        os.environ["NUMBA_CACHE_DIR"] = str(folder)


def _is_writable(folder: Path) -> bool:
    """Whether files can be made in a folder, or the folder itself where it is missing."""
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def scratch_folders() -> Iterator[Path]:
    """Writable folders for temporary files, the usual one first."""
    # A container with a read-only root file system still has a writable /dev/shm.
    for name in (os.environ.get("TMPDIR") or "/tmp", "/dev/shm"):  # noqa: S108
        if os.access(name, os.W_OK | os.X_OK):
            yield Path(name)
