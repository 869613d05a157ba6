"""Images on their way into the partial file: fetch -> prepare -> place -> write, on threads."""

import errno
import os
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastprune.base.checksums import crc32c
from fastprune.base.errors import ConversionError
from fastprune.base.run_ahead import ordered_ahead, run_ahead
from fastprune.base.threads import WorkerThreads
from fastprune.beton.convert.assembly import Assembly, place
from fastprune.beton.convert.journal import RECORD, AtWork, Journal
from fastprune.beton.convert.listing import Fetcher, Reader
from fastprune.beton.convert.transcode import (
    SKIPPED,
    CompilationError,
    Content,
    prepare_image,
    source_bytes,
)
from fastprune.beton.output import write_images
from fastprune.settings import ImageSettings

# One chunk of work: small enough to balance the threads at the end, large enough that handing it
# over costs nothing. Neither number changes a byte of the result.
_CHUNK_IMAGES = 64
_CHUNK_BYTES = 4 << 20

# The SDK of an object store keeps 25 connections; more threads would wait for one.
_FETCH_THREADS = 24
_FETCHED_CHUNKS_AHEAD = 16

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass(slots=True)
class _Chunk:
    """Some neighboring images, as the stages fill it in.

    Attributes:
        positions: theirs.
        contents: what was fetched of each image, or why it could not be; None if the thread that
            prepares an image reads it.
        data: the bytes to store.
        records: (n,) of dtype `RECORD`.
        reasons: why an image was transcoded, skipped or not rewritten, by position in the chunk.
        offsets: of each image in the file.
    """

    positions: range
    contents: list[bytes | ConversionError] | None
    data: list[bytes]
    records: NDArray[np.void]
    reasons: dict[int, str]
    offsets: list[int]


@dataclass(frozen=True)
class _Preparation:
    """What the threads share."""

    assembly: Assembly
    reader: Reader | Fetcher
    settings: ImageSettings
    skip_errors: bool
    at_work: AtWork
    stop: threading.Event

    def prepare(self, chunk: _Chunk) -> _Chunk:
        """Read and prepare the images of a chunk, on a worker thread."""
        for index, position in enumerate(chunk.positions):
            if self.stop.is_set():
                break  # nobody waits for the result
            self.at_work.note(position)
            image = int(self.assembly.order[position])
            labels = self.assembly.listing.labels
            label = -1 if labels is None else int(labels[image])
            try:
                stored, record, reason = self._prepare_one(chunk, index, image, label)
            except CompilationError as error:
                raise ConversionError(f"{error}.") from error
            except ConversionError as error:
                # With on_error="skip" a full disk must not leave every further image out.
                cure = _cure_of_machine(error)
                if cure or not self.skip_errors:
                    where = self.assembly.listing.where(image)
                    raise ConversionError(f"{where}: {cure or error}.") from error
                stored, reason = b"", str(error)
                record = (0, 0, label, 0, 0, 0, 0, SKIPPED)
            chunk.data.append(stored)
            chunk.records[index] = record
            if reason:
                chunk.reasons[index] = reason
        chunk.contents = None
        return chunk

    def _prepare_one(
        self, chunk: _Chunk, index: int, image: int, label: int
    ) -> tuple[bytes, tuple[int, ...], str]:
        """Prepare one image: the bytes to store, its record, why it is not as asked."""
        try:
            content: Content | ConversionError
            if chunk.contents is not None:
                content = chunk.contents[index]
            else:
                assert not isinstance(self.reader, Fetcher)
                content, own_label = self.reader.read(self.assembly.listing.location(image))
                label = label if own_label is None else own_label
            if isinstance(content, ConversionError):
                raise content
            prepared = prepare_image(content, self.settings)
        except ConversionError:
            raise
        except OSError as error:
            raise ConversionError(
                f"it cannot be read: {error.strerror or error}. Did it change during the "
                "conversion?"
            ) from error
        except (Exception, SystemExit) as error:  # a user's dataset and PIL may raise anything
            raise ConversionError(f"reading it failed with {error!r}") from error
        # The fingerprint is made of the source, so that it does not change with the JPEG layout.
        source = source_bytes(content)
        source_crc = crc32c(source)
        stored_crc = source_crc if prepared.data is source else crc32c(prepared.data)
        size = len(prepared.data), len(source)
        shape = prepared.width, prepared.height, prepared.action
        return prepared.data, (*size, label, source_crc, stored_crc, *shape), prepared.reason


def fill(
    assembly: Assembly,
    reader: Reader | Fetcher,
    settings: ImageSettings,
    partial: Path,
    journal: Journal,
    *,
    num_threads: int,
    skip_errors: bool,
    at_work: AtWork,
) -> Generator[int, None, None]:
    """Prepare and write all images that have no offset yet.

    An image's offset depends on the sizes before it. So chunks are prepared on all threads, placed
    in order, and then written on all threads, while the next ones are prepared.

    Yields:
        The number of further images that are in the file, as it grows without gaps.

    Raises:
        ConversionError: an image cannot be read, or a thread ended.
        OSError: the file cannot be written.
    """
    stop = threading.Event()
    preparation = _Preparation(assembly, reader, settings, skip_errors, at_work, stop)
    descriptor = os.open(partial, os.O_WRONLY)

    def place_chunk(chunk: _Chunk) -> _Chunk:
        chunk.offsets = place(assembly, chunk.records, chunk.reasons)
        return chunk

    def write(chunk: _Chunk) -> _Chunk:
        write_images(descriptor, chunk.data, chunk.offsets)
        chunk.data = []
        return chunk

    pool = WorkerThreads(num_threads, name="fastprune-convert", error=ConversionError)
    try:
        with closing(_fetched(assembly, reader, stop)) as chunks:
            # Memory is bounded: about three chunks for each thread.
            prepared = ordered_ahead(pool, preparation.prepare, chunks, 2 * num_threads)
            placed = map(place_chunk, prepared)
            with (
                closing(prepared),
                closing(ordered_ahead(pool, write, placed, num_threads)) as written,
            ):
                for chunk in written:
                    journal.add(chunk.records, chunk.reasons)
                    yield len(chunk.positions)
    finally:
        stop.set()
        pool.close()
        os.close(descriptor)


def _chunks(assembly: Assembly) -> Iterator[_Chunk]:
    """Cut the positions without an offset into chunks of bounded number and bytes."""
    start, total = assembly.num_placed, 0
    sizes, end = assembly.listing.sizes, len(assembly.order)
    for position in range(start, end):
        total += int(sizes[assembly.order[position]])
        count = position + 1 - start
        if count == _CHUNK_IMAGES or total >= _CHUNK_BYTES or position + 1 == end:
            positions = range(start, position + 1)
            yield _Chunk(positions, None, [], np.zeros(count, RECORD), {}, [])
            start, total = position + 1, 0


def _fetched(
    assembly: Assembly, reader: Reader | Fetcher, stop: threading.Event
) -> Generator[_Chunk, None, None]:
    """Yield the chunks in order, fetched ahead if the reader is a fetcher."""
    if not isinstance(reader, Fetcher):
        yield from _chunks(assembly)
        return
    pool = WorkerThreads(_FETCH_THREADS, name="fastprune-fetch", error=ConversionError)

    def start(chunk: _Chunk) -> tuple[_Chunk, list[Any]]:
        images = assembly.order[chunk.positions.start : chunk.positions.stop].tolist()
        pieces = reader.pieces([assembly.listing.location(image) for image in images])
        return chunk, [pool.submit(_fetch_piece, reader, piece, stop) for piece in pieces]

    def finish(started: tuple[_Chunk, list[Any]]) -> _Chunk:
        chunk, futures = started
        chunk.contents = [content for future in futures for content in pool.wait(future)]
        return chunk

    try:
        yield from run_ahead(_chunks(assembly), start, finish, _FETCHED_CHUNKS_AHEAD)
    except BaseException:  # the consumer failed too: requests must not be repeated for minutes
        stop.set()
        raise
    finally:
        pool.close()


def _fetch_piece(
    fetcher: Fetcher, piece: list[Any], stop: threading.Event
) -> Sequence[bytes | ConversionError]:
    try:
        return fetcher.fetch(piece, stop)
    except ConversionError as error:
        # It belongs to these images, and may be skipped with them.
        return [error] * len(piece)


def _cure_of_machine(error: BaseException | None) -> str:
    """Return the cure if the machine is to blame, "" if the image is."""
    # PIL and datasets wrap the machine's errors in their own: look at the whole chain.
    while error is not None:
        if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
            return "memory ran out. Use fewer workers with --workers"
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            return f"{os.strerror(error.errno)}. Raise the limit with `ulimit -n`"
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            return f"{os.strerror(error.errno)}. Free some space for temporary files"
        error = error.__cause__ or error.__context__
    return ""
