"""Ctrl-C and SIGTERM, from the first millisecond of a command to its last."""

import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Time to leave the callback from C that dropped the signal.
_SECONDS_BEFORE_AGAIN = 0.05
# A scheduler signals every process of a job, and torchrun passes the signal on: the second one must
# not break the cleaning up after the first.
_REPEAT_SECONDS = 1.0

_noted = 0
_noted_at = 0.0


class Interrupted(KeyboardInterrupt):
    """A signal that ends the command.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def listen() -> None:
    """Let SIGINT and SIGTERM raise `Interrupted` in the main thread, and see that it arrives.

    Python drops an exception that a signal raises inside a callback from C, as llvmlite makes them
    while Numba compiles, and a library's bare `except:` swallows it. So signals are also noted: a
    dropped one is raised again a moment later, and `check` raises a swallowed one. A program that
    was started with SIGINT ignored still ignores it.
    """
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _note)
    sys.unraisablehook = _raising_again(sys.unraisablehook)


def take() -> int:
    """Return the number of the noted signal, 0 without one, and forget it."""
    global _noted
    number, _noted = _noted, 0
    return number


def check() -> None:
    """Raise `Interrupted` for a signal that was swallowed on its way to the caller."""
    if _noted:
        raise Interrupted(_noted)


def _note(number: int, frame: FrameType | None) -> None:
    global _noted, _noted_at
    del frame
    now = time.monotonic()
    if number == _noted and now - _noted_at < _REPEAT_SECONDS:
        return
    _noted, _noted_at = number, now
    raise Interrupted(number)


def _raising_again(before: Callable[[Any], Any]) -> Callable[[Any], None]:
    """A hook for exceptions that Python drops; a signal's is raised again."""

    def hook(dropped: Any) -> None:
        if not isinstance(dropped.exc_value, KeyboardInterrupt):
            before(dropped)
            return
        # Not here: this is still inside of the callback that dropped it.
        threading.Thread(target=_raise_later, daemon=True).start()

    return hook


def _raise_later() -> None:
    global _noted
    time.sleep(_SECONDS_BEFORE_AGAIN)
    number, _noted = _noted or signal.SIGINT, 0
    main = threading.main_thread().ident
    assert main is not None, "it runs"
    # To the main thread, which may wait in the kernel.
    signal.pthread_kill(main, number)
