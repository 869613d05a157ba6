"""Threads that work off tasks for one iterator, and whose death is noticed."""

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any

from fastprune.base.errors import LoadingError

_SECONDS_BETWEEN_CHECKS = 1.0


class ThreadDiedError(Exception):
    """A thread was killed from outside, and what it was doing will never be done."""


class WorkerThreads:
    """A few threads and a queue of tasks, done first come, first served.

    `concurrent.futures.ThreadPoolExecutor` waits for ever for a task whose thread was killed, and
    again when it is shut down after that; this one does not.
    """

    def __init__(self, num_threads: int, *, name: str):
        """Start the threads.

        Raises:
            LoadingError: the system does not allow so many; none is left running.
        """
        self._tasks: SimpleQueue[Any] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        # Before the first is started, for the next one may fail. Also when the interpreter ends,
        # whose memory the threads must not outlive.
        self._close = weakref.finalize(self, _close, self._tasks, self._threads)
        for i in range(num_threads):
            thread = threading.Thread(
                target=_work, args=(self._tasks,), name=f"{name}-{i}", daemon=True
            )
            try:
                thread.start()
            except (RuntimeError, MemoryError) as error:
                self.close()
                raise LoadingError(
                    f"only {i} of {num_threads} decoding threads could be started ({error}). Use a "
                    "smaller num_workers, or raise the limit on threads (`ulimit -u`) or memory."
                ) from error
            self._threads.append(thread)

    def submit(self, function: Callable[..., None], *arguments: Any) -> "Future[None]":
        """Queue a call."""
        future: Future[None] = Future()
        self._tasks.put((future, function, arguments))
        return future

    def wait(self, future: "Future[None]") -> None:
        """Wait until a call is done; raise what it raised.

        Raises:
            ThreadDiedError: it was not done or may never be, because a thread was killed.
        """
        while True:
            try:
                return future.result(timeout=_SECONDS_BETWEEN_CHECKS)
            except TimeoutError:
                if future.done():
                    raise
                if not all(thread.is_alive() for thread in self._threads):
                    raise ThreadDiedError from None

    def close(self) -> None:
        """Forget the queued calls, let the running ones end, and end the threads."""
        self._close()


def _close(tasks: "SimpleQueue[Any]", threads: list[threading.Thread]) -> None:
    """Empty the queue, tell every thread to end, and wait until it has."""
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
    """Do what is queued until told to end; an error goes to whoever waits for the call."""
    while (task := tasks.get()) is not None:
        future, function, arguments = task
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        except BaseException:  # as SystemExit, which would end the caller's process silently
            future.set_exception(ThreadDiedError())
            raise
        # An idle thread must not keep the last batch alive.
        del task, future, function, arguments
