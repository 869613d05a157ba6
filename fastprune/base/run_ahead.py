"""Work that runs a few items ahead of its consumer, with the results in order."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from typing import TypeVar

from fastprune.base.threads import WorkerThreads

Item = TypeVar("Item")
Started = TypeVar("Started")
Result = TypeVar("Result")


def run_ahead(
    items: Iterable[Item],
    start: Callable[[Item], Started],
    finish: Callable[[Started], Result],
    ahead: int,
) -> Generator[Result, None, None]:
    """Start each item early, finish it when its turn comes.

    For work that is not one call on a thread: a copy to the device, a request to a service, a
    batch cut into several tasks. Both functions run in the consumer's thread. While the consumer
    works on a result, the `ahead` items after it have been started.

    Yields:
        `finish(start(item))` of each item, in order. No reference to a result is kept.
    """
    started: deque[Started] = deque()
    for item in items:
        started.append(start(item))
        # The consumer may drop an item before the next one is taken.
        del item
        if len(started) > ahead:
            yield finish(started.popleft())
    while started:
        yield finish(started.popleft())


def ordered_ahead(
    pool: WorkerThreads, function: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Generator[Result, None, None]:
    """Run a function over items on a pool's threads, `ahead` items ahead of the consumer.

    When the generator is closed or fails, calls that have not begun are canceled. The pool stays
    open; its owner closes it.

    Raises:
        Exception: raised by the function, where its result would have come.
        ThreadDiedError: a thread of the pool was killed.
    """
    pending: set[Future[Result]] = set()

    def start(item: Item) -> "Future[Result]":
        future = pool.submit(function, item)
        pending.add(future)
        return future

    def finish(future: "Future[Result]") -> Result:
        pending.discard(future)
        return pool.wait(future)

    try:
        yield from run_ahead(items, start, finish, ahead)
    finally:
        for future in pending:
            future.cancel()
