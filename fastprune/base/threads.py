"""A thread pool for one iterator that notices the death of its threads."""

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from fastprune.base.errors import FastpruneError, LoadingError

Result = TypeVar("Result")

# How late a death is noticed; waiting itself costs nothing.
_SECONDS_BETWEEN_CHECKS = 1.0


class ThreadDiedError(Exception):
    """A thread was killed from outside, so its task will never finish."""


class WorkerThreads:
    """A few threads and a queue of tasks, first come, first served.

    `concurrent.futures.ThreadPoolExecutor` waits forever for a task whose thread was killed, and
    again at its shutdown; this pool does not.
    """

    def __init__(self, num_threads: int, *, name: str, error: type[FastpruneError] = LoadingError):
        """Start the threads, named `name-0` and so on.

        Raises:
            LoadingError, or `error`: the system does not allow so many; none is left running.
        """
        self._tasks: SimpleQueue[Any] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        # Registered before the first thread starts, because a later one may fail to. The finalizer
        # also runs at interpreter exit: the threads must not outlive the interpreter's memory.
        self._close = weakref.finalize(self, _close, self._tasks, self._threads)
        for i in range(num_threads):
            thread = threading.Thread(
                target=_work, args=(self._tasks,), name=f"{name}-{i}", daemon=True
            )
            try:
                thread.start()
            except (RuntimeError, MemoryError) as failure:
                self.close()
                raise error(
                    f"only {i} of {num_threads} threads could be started ({failure}). Use fewer "
                    "workers (num_workers), or raise the limit on threads (`ulimit -u`) or memory."
                ) from failure
            self._threads.append(thread)

    def submit(self, function: Callable[..., Result], *arguments: Any) -> "Future[Result]":
        """Queue a call; pass the future to `wait`, which notices a dead thread."""
        future: Future[Result] = Future()
        self._tasks.put((future, function, arguments))
        return future

    def wait(self, future: "Future[Result]") -> Result:
        """Wait for a call; return its result or raise its exception.

        Raises:
            ThreadDiedError: a thread was killed, so the call may never finish.
        """
        while True:
            try:
                return future.result(timeout=_SECONDS_BETWEEN_CHECKS)
            except TimeoutError:
                # The function itself may raise TimeoutError.
                if future.done():
                    raise
                if not all(thread.is_alive() for thread in self._threads):
                    raise ThreadDiedError from None

    def close(self) -> None:
        """Drop the queued calls, let the running ones finish, and end the threads."""
        self._close()


def _close(tasks: "SimpleQueue[Any]", threads: list[threading.Thread]) -> None:
    try:
        while True:
            tasks.get_nowait()
    except Empty:
        pass
    for _ in threads:
        tasks.put(None)
    for thread in threads:
        # The garbage collector may close a forgotten iterator in one of its own threads.
        if thread is not threading.current_thread():
            thread.join()


def _work(tasks: "SimpleQueue[Any]") -> None:
    """Run queued calls until told to end; an exception goes to the caller who waits."""
    while (task := tasks.get()) is not None:
        future, function, arguments = task
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function(*arguments))
            except Exception as error:
                future.set_exception(error)
            except BaseException:  # as SystemExit, which would end the caller's process silently
                future.set_exception(ThreadDiedError())
                raise
        # An idle thread must not keep the last batch alive.
        del task, future, function, arguments
