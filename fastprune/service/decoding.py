"""The threads of a service: they decode what the window wants, straight into the slab."""

import queue
import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fastprune.beton.beton import Beton
from fastprune.decoding.cpu import stored_images
from fastprune.decoding.faults import ALTERED, RowFaults
from fastprune.decoding.pixels import RowDecoder
from fastprune.service.window import Task
from fastprune.service.wire import GUARD_BYTES, MOST_REASON_CHARACTERS, WANTED


class Decoders:
    """Threads that decode tasks, first come, first served."""

    def __init__(
        self,
        betons: list[Beton],
        slab: NDArray[np.uint8],
        *,
        num_threads: int,
        done: Callable[[Task, dict[int, str]], None],
    ):
        """Start the threads.

        Args:
            betons: `Images.index` is a position in it.
            slab: (num_bytes,) uint8, writable.
            num_threads: how many decode.
            done: called in one of the threads, with a task and its faults by position.
        """
        self._betons = betons
        self._slab = slab
        self._done = done
        # Once for all clients, who compare nothing the first time.
        self._faults = [RowFaults(beton, skip=True, verify_crc=None) for beton in betons]
        self._decoders: dict[int, RowDecoder] = {}
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"fastprune-serve-{i}", daemon=True)
            for i in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, task: Task) -> None:
        """Queue a task."""
        self._tasks.put(task)

    def close(self) -> None:
        """End the threads, after what is queued."""
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                reasons = self._decode(task)
            except Exception as error:  # such as a MemoryError: of these views alone
                reason = f"{type(error).__name__}: {error}"
                reasons = dict.fromkeys(range(len(task.entries)), reason)
            self._done(task, {i: text[:MOST_REASON_CHARACTERS] for i, text in reasons.items()})

    def _decode(self, task: Task) -> dict[int, str]:
        """Decode views into their places; return why some cannot be decoded, by position."""
        size = task.images.image_size
        decoder = self._decoders.setdefault(size, RowDecoder(size))
        wanted = np.frombuffer(b"".join(entry.key for entry in task.entries), WANTED)
        starts = np.array([entry.offset for entry in task.entries]) + GUARD_BYTES
        index = task.images.index
        reasons = decoder.decode_into(
            stored_images(self._betons[index], wanted["row"]),
            np.ascontiguousarray(wanted["view"]),
            self._slab,
            starts,
        ).faults
        for i in np.flatnonzero(self._faults[index].altered(wanted["row"])).tolist():
            reasons.setdefault(i, ALTERED)
        return reasons
