"""What interrupts a run: signals of a scheduler or a terminal, and checkpoints that are due."""

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

from fastprune.base import interrupts
from fastprune.base.errors import TrainingStopped
from fastprune.base.ranks import Agreement, Ranks
from fastprune.settings import RunSettings

# What a process asks of all of them at a step: nothing (0), this, or a signal's number, which is
# larger; the largest request is heard.
CHECKPOINT = 1

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# torchrun repeats a signal to its workers within a second; a person waits longer.
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
        # signal.signal raises in any other thread.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
            # One that was swallowed during start-up ends the run at its first step.
            self.number = interrupts.take()
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
        # Only a note: the step that runs ends, and the checkpoint is of a whole step.
        if not self.number:
            self.number, self._came_at = number, now
        elif number != self.number or now - self._came_at >= _REPEAT_SECONDS:
            # A second Ctrl-C ends a run that hangs.
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        """Put back what was there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


class Requests:
    """What the processes of a run ask of each other at each step: to save, or to stop.

    Use it as a context manager: signals are taken note of in between.

    Attributes:
        signals: those that came to this process.
    """

    def __init__(self, settings: RunSettings, ranks: Ranks) -> None:
        self.signals = Signals()
        self._settings = settings
        self._ranks = ranks
        self._agreement = Agreement(ranks)
        self._saved_at = time.monotonic()

    def __enter__(self) -> Self:
        self.note_checkpoint()
        self.signals.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.signals.__exit__(kind, error, traceback)
        if kind is None:
            # The request of the last step is under way; the group must not end before it.
            self._agreement.close()

    def note_checkpoint(self) -> None:
        """Count the minutes until the next checkpoint from here."""
        self._saved_at = time.monotonic()

    def ask(self, step: int, *, is_last: bool) -> int:
        """Say what is due on this process, and hear what is due on all of them.

        Args:
            step: optimizer steps done.
            is_last: whether it is an epoch's last one, behind which there is a checkpoint anyway.

        Returns:
            0, `CHECKPOINT`, or the number of a signal; the same on every process.
        """
        answer = self._agreement.ask(self._due(step, is_last=is_last))
        return 0 if answer == CHECKPOINT and is_last else answer

    def _due(self, step: int, *, is_last: bool) -> int:
        # A signal outweighs a checkpoint, which comes with it anyway.
        if self.signals.number:
            return self.signals.number
        every, minutes = self._settings.checkpoint_every, self._settings.checkpoint_minutes
        is_due = every is not None and step % every == 0
        # Clocks differ among processes, so the first one's counts.
        is_late = self._ranks.is_first and time.monotonic() - self._saved_at >= 60 * minutes
        if is_last or not (is_due or is_late):
            return 0
        # The answer comes a step later; until then nothing more is due.
        self.note_checkpoint()
        return CHECKPOINT


def stopped(number: int, *, step: int, is_saved: bool) -> TrainingStopped:
    """The error that ends a run which a signal stopped."""
    name = signal.Signals(number).name
    where = "from there" if is_saved else "from the last checkpoint"
    return TrainingStopped(
        f"{name} stopped the run after step {step}. Go on {where} with --resume.",
        exit_code=128 + number,
    )
