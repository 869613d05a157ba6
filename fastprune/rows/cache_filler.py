"""Fills a teacher cache on a thread, beside the work that makes its logits."""

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Self

import numpy as np
from numpy.typing import NDArray

from fastprune.base.errors import ArtifactError
from fastprune.rows.teacher_cache import TeacherCache

logger = logging.getLogger(__name__)

# Queued batches hold the caller's memory, perhaps a device's.
_MOST_QUEUED = 8

_Job = tuple[NDArray[np.int64], int, Callable[[], NDArray[np.float32]]]


class CacheFiller:
    """Writes into a cache on its own thread, and gives up when the disk is full.

    A full disk costs the cache and not the run: one warning is logged, and later logits are
    dropped. Logits that cannot be stored, or whose function fails, raise at the caller's next call.

    Attributes:
        cache: that is filled.
        seconds: spent on writing so far, beside the caller's work.
        has_failed: whether it gave up.
    """

    def __init__(self, cache: TeacherCache):
        """Prepare; the thread starts with the first `put`."""
        self.cache = cache
        self.seconds = 0.0
        self.has_failed = False
        self._fault: Exception | None = None
        self._jobs: queue.Queue[_Job | None] = queue.Queue(_MOST_QUEUED)
        self._thread: threading.Thread | None = None

    def put(
        self, rows: NDArray[np.int64], slot: int, logits: Callable[[], NDArray[np.float32]]
    ) -> None:
        """Queue logits to be stored.

        Args:
            rows: (n,) int64, of the cache.
            slot: which of their views.
            logits: returns (n, C) float32; called on the thread, where it may wait for a device.

        Raises:
            InvalidValueError: logits put earlier are not finite, or beyond the dtype's range.
            Exception: that an earlier `logits` raised.
        """
        self._raise_fault()
        if self.has_failed:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True, name="cache filler")
            self._thread.start()
        self._jobs.put((rows, slot, logits))

    def flush(self, *, seal: bool = False) -> None:
        """Wait until what was put is on the disk.

        Args:
            seal: also checksum the blocks that any process changed.

        Raises as `put`.
        """
        self._jobs.join()
        self._raise_fault()
        if not self.has_failed:
            self._attempt(lambda: self.cache.commit(seal=seal))

    def close(self) -> None:
        """Write what was put, and end the thread."""
        self._jobs.join()
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None
        if not self.has_failed:
            self._attempt(self.cache.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            rows, slot, logits = job
            try:
                values = logits()
                if not self.has_failed:
                    self._attempt(lambda: self.cache.put(rows, slot, values))  # noqa: B023
            # Of any kind: if the thread ended here, its caller would wait forever.
            except Exception as error:
                self._fault = self._fault or error
            finally:
                del job, logits
                self._jobs.task_done()
        self._jobs.task_done()

    def _attempt(self, write: Callable[[], object]) -> None:
        """Write, or warn and give up."""
        began = time.perf_counter()
        try:
            write()
        except ArtifactError as error:
            self.has_failed = True
            logger.warning("the teacher cache is not filled any further: %s", error)
        self.seconds += time.perf_counter() - began

    def _raise_fault(self) -> None:
        if self._fault is not None:
            raise self._fault
