"""Progress on stderr: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from fastprune.base import interrupts

Item = TypeVar("Item")

_SECONDS_BEFORE_BAR = 1.0  # quick work shows none
_SECONDS_BETWEEN_LINES = 10.0  # in a job's log, which is kept
_SECONDS_BETWEEN_BARS = 0.1
_BAR_CHARACTERS = 10  # which leaves most of 80 columns to the words


def track(
    items: Iterable[Item],
    *,
    description: str,
    total: int,
    unit: str,
    step: int = 1,
    done: int = 0,
    note: Callable[[], str] | None = None,
    seconds_left: Callable[[], float | None] | None = None,
) -> Iterator[Item]:
    """Yield the items and show the progress on stderr.

    Rate and time left are measured behind the first item, which may wait for compilation.

    Args:
        items: yielded unchanged and in order.
        description: title of the bar.
        total: units in all items together.
        unit: name of the units, such as "images".
        step: units per item; the last item may hold fewer.
        done: units that were done before, by an earlier process.
        note: returns further words, called whenever they are shown.
        seconds_left: estimates the time left where these items are a part of a longer work; None
            for this work's own.
    """
    clock = _Clock(total, done, unit, note, seconds_left)
    items = _interruptible(items)
    if sys.stderr is None:  # closed by the caller, as `2>&-` does
        yield from items
    elif sys.stderr.isatty():
        yield from _with_bar(items, clock, description, step)
    else:
        yield from _with_lines(items, clock, description, step)


def _interruptible(items: Iterable[Item]) -> Iterator[Item]:
    """Yield the items; raise a signal that a library has swallowed."""
    for item in items:
        yield item
        interrupts.check()


class _Clock:
    """Rate and time left, from the end of the first item on."""

    def __init__(
        self,
        total: int,
        done: int,
        unit: str,
        note: Callable[[], str] | None,
        seconds_left: Callable[[], float | None] | None,
    ):
        self.total, self.done, self.unit = total, done, unit
        self._note, self._given_seconds_left = note, seconds_left
        self._first: tuple[float, int] | None = None

    def advance(self, units: int) -> int:
        """Count an item; return the units that it really held, fewer at the end."""
        before, self.done = self.done, min(self.done + units, self.total)
        if self._first is None:
            # The first item may wait for compilation, so the rate starts after it.
            self._first = time.monotonic(), self.done
        return self.done - before

    def words(self) -> str:
        """Describe rate and time left, as `1,234 images/s, 3 min left, loss 2.31`."""
        assert self._first is not None, "an item was counted"
        began, done = self._first
        seconds = time.monotonic() - began
        words = []
        if self.done > done and seconds > 0:
            rate = (self.done - done) / seconds
            words.append(
                f"{rate:,.0f} {self.unit}/s" if rate >= 10 else f"{rate:.1f} {self.unit}/s"
            )
            left = (self.total - self.done) / rate
            given = self._given_seconds_left() if self._given_seconds_left else left
            if given is not None:
                words.append(f"{duration(given)} left")
        if self._note is not None and (note := self._note()):
            words.append(note)
        return ", ".join(words)


def duration(seconds: float) -> str:
    """Round a duration to what a waiting person wants to know.

    >>> duration(42.4), duration(200), duration(9000)
    ('42 s', '3 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def _with_bar(items: Iterable[Item], clock: _Clock, description: str, step: int) -> Iterator[Item]:
    # Here, because it takes a twentieth of a second to import.
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    bar = Progress(
        TextColumn("{task.description}", markup=False),
        TaskProgressColumn(),
        BarColumn(_BAR_CHARACTERS),
        TextColumn("{task.fields[words]}", markup=False),
        console=Console(stderr=True),
        transient=True,
        auto_refresh=False,  # a thread of its own would draw while a batch is waited for
        # What is printed meanwhile belongs where the caller sends it.
        redirect_stdout=False,
        redirect_stderr=False,
    )
    task = bar.add_task(description, total=clock.total, words="")
    began, drawn = time.monotonic(), 0.0
    try:
        for item in items:
            yield item
            clock.advance(step)
            now = time.monotonic()
            if now - began >= _SECONDS_BEFORE_BAR and now - drawn >= _SECONDS_BETWEEN_BARS:
                bar.start()
                drawn = now
                bar.update(task, completed=clock.done, words=clock.words(), refresh=True)
    finally:
        bar.stop()


def _with_lines(
    items: Iterable[Item], clock: _Clock, description: str, step: int
) -> Iterator[Item]:
    last = time.monotonic()
    for item in items:
        yield item
        clock.advance(step)
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_LINES:
            last = now
            stamp = time.strftime("%Y-%m-%d %H:%M:%S")
            counted = f"{clock.done:,}/{clock.total:,} {clock.unit}"
            words = f", {clock.words()}" if clock.words() else ""
            print(f"{stamp} {description}: {counted}{words}", file=sys.stderr)  # noqa: T201
