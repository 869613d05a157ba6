"""Supervised processes that prepare images and write them: none hangs, none fails unheard."""

import contextlib
import errno
import itertools
import mmap
import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Self

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from fastprune.base.errors import ConversionError
from fastprune.beton.convert.sources.listing import FetchedSource, Listing, Source
from fastprune.beton.convert.sources.parquet import without_bytes
from fastprune.beton.convert.transcode import (
    SKIPPED,
    CompilationError,
    prepare_image,
    source_bytes,
)
from fastprune.beton.output import write_images
from fastprune.settings import ImageSettings

# Chunks that a worker may hold: one in work, others waiting for their place in the file.
CHUNKS_PER_WORKER = 3

# A worker in the middle of an image may take this long to notice that its pipe is closed.
_SECONDS_TO_STOP = 5.0
# A crash is noticed by its pipe at once; this is for a dead worker whose pipe a child keeps open.
_SECONDS_BETWEEN_LOOKS = 1.0

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

RECORD = np.dtype(
    [
        ("size", "<i8"),
        ("source_bytes", "<i8"),
        ("label", "<i8"),
        ("source_crc32c", "<u4"),
        ("stored_crc32c", "<u4"),
        ("width", "<u2"),
        ("height", "<u2"),
        ("action", "u1"),
    ]
)


@dataclass(frozen=True)
class Task:
    """The part of the job that every worker knows.

    Attributes:
        source: reads the images.
        settings: what is done to them.
        skip_errors: whether an unreadable image is left out instead of ending the job.
        path: the file to write into.
    """

    source: Source
    settings: ImageSettings
    skip_errors: bool
    path: Path


@dataclass(frozen=True)
class Prepared:
    """A worker's report on one chunk.

    Attributes:
        worker: who holds the data.
        chunk: the chunk's number.
        records: (n,) of dtype `RECORD`.
        reasons: why an image was transcoded or skipped, or copied though it should have been
            rewritten, by its position in the chunk.
    """

    worker: int
    chunk: int
    records: NDArray[np.void]
    reasons: dict[int, str]


@dataclass(frozen=True)
class Written:
    """A worker's word that a chunk's data is in the file."""

    worker: int
    chunk: int


@dataclass(frozen=True)
class _Failed:
    """Why a worker gave up, and at which image; None where the image is not to blame."""

    item: int | None
    message: str


class HandedSource:
    """The source of workers whose images are fetched by their parent."""

    def list_images(self) -> Listing:
        """The parent has listed them."""
        raise AssertionError("a worker lists nothing")

    def read(self, location: tuple[int, int, int]) -> tuple[bytes, None]:
        """Read one image out of a file in memory, by its descriptor, offset and size."""
        descriptor, offset, size = location
        if size < 0:
            raise without_bytes()
        return os.pread(descriptor, size, offset), None


class WorkerPool:
    """Worker processes for the time of one conversion.

    They are forked, so that a dataset that cannot be pickled can be converted, and before the
    images are listed, so that they do not share the list's memory.
    """

    def __init__(self, num_workers: int, task: Task) -> None:
        # For images that this process fetches: a file in memory for each chunk that a worker holds.
        self._handed: list[list[int]] = []
        self._num_handed = [0] * num_workers
        if isinstance(task.source, FetchedSource):
            task = replace(task, source=HandedSource())
            self._handed = [
                [os.memfd_create("fastprune-images") for _ in range(CHUNKS_PER_WORKER)]
                for _ in range(num_workers)
            ]
        # Shared memory, because a worker that is killed can report nothing any more.
        self._at_work_on = mmap.mmap(-1, 8 * num_workers)
        self._connections: list[Connection] = []
        self._processes: list[BaseProcess] = []
        try:
            self._start(num_workers, task)
        except OSError as error:
            # Those that were started must not stay behind.
            self.__exit__()
            raise ConversionError(
                f"cannot start {num_workers:,} worker processes: {os.strerror(error.errno or 0)}. "
                "Use fewer with --workers, or raise the limits (`ulimit -n`, `ulimit -u`)."
            ) from error

    def _start(self, num_workers: int, task: Task) -> None:
        context = multiprocessing.get_context("fork")
        pipes: list[tuple[Connection, Connection]] = []
        try:
            for _ in range(num_workers):
                pipes.append(context.Pipe())
                self._connections.append(pipes[-1][0])
            for worker, (_, theirs) in enumerate(pipes):
                others = [end for pair in pipes for end in pair if end is not theirs]
                arguments = (theirs, others, task, self._at_work_on, worker)
                process = context.Process(target=_work, args=arguments, daemon=True)
                with warnings.catch_warnings():
                    # Python >= 3.12 warns of threads at a fork. The workers run only code that
                    # holds up there: no torch, no OpenMP, Numba without threads of its own, and
                    # pyarrow, which sets up its threads anew.
                    warnings.simplefilter("ignore", DeprecationWarning)
                    process.start()
                self._processes.append(process)
        finally:
            # Else the pipe of a dead worker would never read as closed here.
            for _, theirs in pipes:
                theirs.close()

    def __len__(self) -> int:
        return len(self._connections)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._connections:
            connection.close()
        deadline = time.monotonic() + _SECONDS_TO_STOP
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode is None:
                process.kill()
                process.join()
        self._at_work_on.close()
        for descriptor in itertools.chain.from_iterable(self._handed):
            os.close(descriptor)
        self._handed = []

    def prepare(self, worker: int, chunk: int, items: list[tuple[int, Any, int]]) -> None:
        """Have a worker read and prepare images: (item, location, label) each."""
        self._send(worker, (chunk, items, None))

    def prepare_fetched(
        self,
        worker: int,
        chunk: int,
        items: list[tuple[int, Any, int]],
        images: list[bytes | None],
    ) -> None:
        """Have a worker prepare images that this process has; locations are not looked at.

        The worker must hold less than `CHUNKS_PER_WORKER` chunks.
        """
        # A worker's chunks are written in their order, so the oldest one's file is free.
        descriptor = self._handed[worker][self._num_handed[worker] % CHUNKS_PER_WORKER]
        self._num_handed[worker] += 1
        os.ftruncate(descriptor, 0)
        handed, offset = [], 0
        for (item, _, label), image in zip(items, images, strict=True):
            size = -1 if image is None else len(image)
            handed.append((item, (descriptor, offset, size), label))
            offset += max(size, 0)
        write_images(
            descriptor, [image or b"" for image in images], [at for _, (_, at, _), _ in handed]
        )
        self.prepare(worker, chunk, handed)

    def write(self, worker: int, chunk: int, offsets: list[int]) -> None:
        """Have a worker write a chunk that it holds, image by image, to these file offsets."""
        self._send(worker, (chunk, None, offsets))

    def reports(self) -> Iterator[Prepared | Written]:
        """Wait for at least one worker and yield what it says.

        Raises:
            ConversionError: an image could not be read, the file could not be written, or a worker
                died. The image is named by its number, in `item`.
        """
        while not (ready := wait(self._connections, _SECONDS_BETWEEN_LOOKS)):
            # A dead worker's pipe stays open while a process that it started lives.
            for worker, process in enumerate(self._processes):
                if process.exitcode is not None and not self._connections[worker].poll():
                    raise self._death(worker)
        for connection in ready:
            worker = self._connections.index(connection)  # type: ignore[arg-type]
            try:
                report = self._connections[worker].recv()
            except (EOFError, OSError):
                raise self._death(worker) from None
            if isinstance(report, _Failed):
                raise WorkerError(report.message, report.item)
            yield report

    def _send(self, worker: int, message: object) -> None:
        """Send to a worker that may have died."""
        try:
            self._connections[worker].send(message)
        except OSError:
            raise self._death(worker) from None

    def _death(self, worker: int) -> "WorkerError":
        """Describe a worker that ended without a report."""
        process = self._processes[worker]
        process.join(_SECONDS_TO_STOP)
        code = process.exitcode
        how = f"exit code {code}"
        if code is not None and code < 0:
            how = f"signal {-code}, {signal.strsignal(-code)}"
        item = int.from_bytes(self._at_work_on[8 * worker : 8 * worker + 8], "little")
        return WorkerError(
            f"a worker process died ({how}) while it was at this image. If memory ran out, use "
            "fewer workers with --workers, or leave the image out",
            item,
        )


class WorkerError(ConversionError):
    """Ends a worker; `item` is the number of the image, None where none is to blame."""

    def __init__(self, message: str, item: int | None) -> None:
        super().__init__(message)
        self.item = item


def _work(
    connection: Connection,
    others: list[Connection],
    task: Task,
    at_work_on: mmap.mmap,
    worker: int,
) -> None:
    """Prepare and write the chunks that arrive, until the pipe closes."""
    # The terminal's Ctrl-C goes to every process; the parent decides what happens then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The parent's handler came along with the fork; a worker is ended by SIGTERM.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # PIL warns of large images and odd metadata; what it cannot read it refuses.
    warnings.simplefilter("ignore")
    for other in others:  # else this process would keep the siblings' pipes open
        other.close()
    # Memory is bounded: a worker holds at most CHUNKS_PER_WORKER chunks.
    held: dict[int, list[bytes]] = {}
    descriptor = None
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        # The pipe closes when the parent is done, or dead.
        try:
            while True:
                chunk, items, offsets = connection.recv()
                if items is not None:
                    held[chunk], records, reasons = _prepare(items, task, at_work_on, worker)
                    connection.send(Prepared(worker, chunk, records, reasons))
                else:
                    if descriptor is None:
                        descriptor = os.open(task.path, os.O_WRONLY)
                    _write(descriptor, held.pop(chunk), offsets, task.path)
                    connection.send(Written(worker, chunk))
        except WorkerError as error:
            connection.send(_Failed(error.item, str(error)))


def _prepare(
    items: list[tuple[int, Any, int]], task: Task, at_work_on: mmap.mmap, worker: int
) -> tuple[list[bytes], NDArray[np.void], dict[int, str]]:
    """Read and prepare the images of one chunk."""
    records = np.zeros(len(items), RECORD)
    data: list[bytes] = []
    reasons: dict[int, str] = {}
    for position, (item, location, label) in enumerate(items):
        at_work_on[8 * worker : 8 * worker + 8] = item.to_bytes(8, "little")
        try:
            stored, record, reason = _prepare_one(location, label, task)
        except CompilationError as error:
            raise WorkerError(str(error), None) from error
        except ConversionError as error:
            # With on_error="skip" a full disk must not leave every further image out.
            if cure := _cure_of_machine(error):
                raise WorkerError(cure, item) from error
            if not task.skip_errors:
                raise WorkerError(str(error), item) from error
            stored, reason = b"", str(error)
            record = (0, 0, label, 0, 0, 0, 0, SKIPPED)
        records[position] = record
        data.append(stored)
        if reason:
            reasons[position] = reason
    return data, records, reasons


def _prepare_one(location: Any, label: int, task: Task) -> tuple[bytes, tuple[int, ...], str]:
    """Read and prepare one image: the bytes to store, its record, why it is not as asked."""
    try:
        content, own_label = task.source.read(location)
        prepared = prepare_image(content, task.settings)
    except ConversionError:
        raise
    except OSError as error:
        raise ConversionError(
            f"it cannot be read: {error.strerror or error}. Did it change during the conversion?"
        ) from error
    except Exception as error:  # a user's dataset may raise anything, and so may PIL's plugins
        raise ConversionError(f"reading it failed with {error!r}") from error
    # The fingerprint is made of the source, so that it does not change with the JPEG layout.
    source = source_bytes(content)
    source_crc = google_crc32c.value(source)
    same = prepared.data is source
    record = (
        len(prepared.data),
        len(source),
        label if own_label is None else own_label,
        source_crc,
        source_crc if same else google_crc32c.value(prepared.data),
        prepared.width,
        prepared.height,
        prepared.action,
    )
    return prepared.data, record, prepared.reason


def _cure_of_machine(error: BaseException | None) -> str:
    """Return the cure where the machine is to blame; empty where it is the image."""
    # PIL and datasets wrap the machine's errors in their own: the whole chain is looked at.
    while error is not None:
        if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
            return "memory ran out. Use fewer workers with --workers"
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            return f"{os.strerror(error.errno)}. Raise the limit with `ulimit -n`"
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            return f"{os.strerror(error.errno)}. Free some space for temporary files"
        error = error.__cause__ or error.__context__
    return ""


def _write(descriptor: int, data: list[bytes], offsets: list[int], path: Path) -> None:
    """Write images to their offsets; name the cure when the system refuses."""
    try:
        write_images(descriptor, data, offsets)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise WorkerError(
            f"cannot write {path}: {reason}. Free some space, or name another folder, and run the "
            "command again",
            None,
        ) from error
