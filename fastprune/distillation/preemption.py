"""What ends a run from outside: signals of a scheduler, a launcher, or a terminal."""

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

from fastprune.errors import TrainingStopped

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_REPEAT_SECONDS = 5.0


class Signals:
    """Takes note of SIGTERM and SIGINT, so that a run can end with a checkpoint.

    Schedulers send a signal to every process, and launchers pass it on once more, so the same one
    within five seconds counts as one. Any other that follows acts as it would have without us.
    Python delivers signals to the main thread alone; in others nothing is noticed.

    Attributes:
        number: of the signal that came; 0 without one.
    """

    def __init__(self) -> None:
        self.number = 0
        self._came_at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Remember the first signal; let one that is no repetition end the process."""
        del frame
        now = time.monotonic()
        if not self.number:
            self.number, self._came_at = number, now
        elif number != self.number or now - self._came_at >= _REPEAT_SECONDS:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        """Put back what was there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def stopped(number: int, *, step: int, is_saved: bool) -> TrainingStopped:
    """The error that ends a run which a signal stopped."""
    name = signal.Signals(number).name
    where = "from there" if is_saved else "from the last checkpoint"
    return TrainingStopped(
        f"{name} stopped the run after step {step}. Go on {where} with --resume.",
        exit_code=128 + number,
    )
