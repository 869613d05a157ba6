"""Progress on stderr: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

_SECONDS_BEFORE_BAR = 1.0
_SECONDS_BETWEEN_LINES = 10.0


def track(
    items: Iterable[Item],
    *,
    description: str,
    total: int,
    unit: str,
    step: int = 1,
    done: int = 0,
    note: Callable[[], str] | None = None,
) -> Iterator[Item]:
    """Yield the items and show the progress on stderr.

    Args:
        items: parts of the work.
        description: title of the bar.
        total: the number of units in all of the items together.
        unit: name of the units, such as "images".
        step: units per item; the last item may hold fewer.
        done: units that were done before, by an earlier process.
        note: returns further words, called whenever they are shown.

    Yields:
        The items, unchanged and in order.
    """
    if sys.stderr.isatty():
        yield from _with_bar(items, description, total, unit, step, done, note)
    else:
        yield from _with_lines(items, description, total, unit, step, done, note)


def _with_bar(
    items: Iterable[Item],
    description: str,
    total: int,
    unit: str,
    step: int,
    done: int,
    note: Callable[[], str] | None,
) -> Iterator[Item]:
    """A tqdm bar, shown only when the work takes longer than a second."""
    options = {"delay": _SECONDS_BEFORE_BAR, "leave": False, "unit_scale": True}
    with tqdm(total=total, initial=done, desc=description, unit=f" {unit}", **options) as bar:
        for item in items:
            yield item
            if bar.update(min(step, total - bar.n)) and note is not None:
                bar.set_postfix_str(note(), refresh=False)


def _with_lines(
    items: Iterable[Item],
    description: str,
    total: int,
    unit: str,
    step: int,
    done: int,
    note: Callable[[], str] | None,
) -> Iterator[Item]:
    """One line every ten seconds, for logs."""
    start = last = time.monotonic()
    before = done
    for item in items:
        yield item
        done = min(done + step, total)
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_LINES:
            last = now
            rate = (done - before) / (now - start)
            remaining_seconds = (total - done) / rate
            line = f"{description}: {done:,}/{total:,} {unit}, {rate:,.0f}/s"
            words = f", {note()}" if note is not None else ""
            print(f"{line}, {remaining_seconds:.0f} s left{words}", file=sys.stderr)  # noqa: T201
