"""Decodes rows of the mapped file on CPU threads, a few batches ahead of the caller."""

import logging
from collections import Counter
from collections.abc import Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fastprune.base.errors import LoadingError
from fastprune.base.run_ahead import run_ahead
from fastprune.base.threads import ThreadDiedError, WorkerThreads
from fastprune.beton.beton import Beton
from fastprune.decoding.decoder import Decoded, DrawViews
from fastprune.decoding.faults import ALTERED, ChangeDetector, RowFaults
from fastprune.decoding.memory import BatchMemory
from fastprune.decoding.pixels import Outcome, RowDecoder, StoredImages

_LOG = logging.getLogger(__name__)

_BATCHES_AHEAD = 3
_CHUNKS_PER_WORKER = 4  # so that a thread with easy images takes over from one with large ones
_MIN_CHUNK_PIXELS = 8 * 224 * 224  # less is done sooner than handed over

_VIEWS_BEFORE_ADVICE = 4096
_SHARE_TO_WARN_OF = 0.01


@dataclass
class _Batch:
    """A batch that decoding threads fill chunk by chunk."""

    rows: NDArray[np.int64]
    views: NDArray[np.int32]
    pixels: torch.Tensor
    chunks: list[Future[None]] = field(default_factory=list)
    outcome: Outcome = field(default_factory=Outcome)


class CpuDecoder:
    """Decodes rows of a beton on CPU threads; see `decoder.Decoder`."""

    name = "cpu"

    def __init__(
        self,
        beton: Beton,
        *,
        image_size: int,
        num_workers: int,
        pin_memory: bool,
        faults: RowFaults,
    ):
        self._beton = beton
        self._image_size = image_size
        self._num_workers = num_workers
        self._pin_memory = pin_memory
        self._memory = BatchMemory()
        self._faults = faults
        self._changes = ChangeDetector(beton)
        self._advice = Advice(beton.path)
        self._decoder = RowDecoder(image_size)

    def decode(
        self, batches: Sequence[NDArray[np.int64]], draw_views: DrawViews
    ) -> Generator[Decoded, None, None]:
        """Decode batches in order; see `decoder.Decoder.decode`."""

        def start(rows: NDArray[np.int64]) -> _Batch:
            self._changes.check()
            batch = _Batch(rows, draw_views(rows), self.new_pixels(len(rows)))
            for part in chunks(len(rows), self._num_workers, self._image_size):
                batch.chunks.append(threads.submit(self._decode_part, batch, part))
            return batch

        # Threads of this iterator alone: leaving the loop ends them, and no epoch waits for
        # another one's batches.
        threads = WorkerThreads(self._num_workers, name="fastprune-decode")
        finish = partial(self._finish, threads)
        try:
            yield from run_ahead(self._beton.arriving(batches), start, finish, _BATCHES_AHEAD)
        finally:
            threads.close()
            self._advice.give()

    def new_pixels(self, num_rows: int) -> torch.Tensor:
        """Return memory for a batch of its own, so that a held batch is never overwritten."""
        shape = (num_rows, self._image_size, self._image_size, 3)
        if self._pin_memory:
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        return self._memory.take(shape, torch.uint8)

    def decode_rows(
        self, rows: NDArray[np.int64], views: NDArray[np.int32], images: NDArray[np.uint8]
    ) -> Outcome:
        """Decode rows (n,) by views (n, 7) into images (n, S, S, 3), in the calling thread."""
        outcome = self._decoder.decode(stored_images(self._beton, rows), views, images)
        for i in np.flatnonzero(self._faults.altered(rows)).tolist():
            outcome.faults.setdefault(i, ALTERED)
        return outcome

    def _decode_part(self, batch: _Batch, part: slice) -> None:
        """Decode one chunk, in a decoding thread."""
        outcome = self.decode_rows(batch.rows[part], batch.views[part], batch.pixels.numpy()[part])
        # Both are safe from several threads at once: a single call each, under the GIL.
        batch.outcome.faults.update({part.start + i: text for i, text in outcome.faults.items()})
        batch.outcome.whole_kinds.extend(outcome.whole_kinds)

    def _finish(self, threads: WorkerThreads, batch: _Batch) -> Decoded:
        """Wait for a batch, and leave out the rows that cannot be used."""
        try:
            for chunk in batch.chunks:
                threads.wait(chunk)
        except ThreadDiedError as error:
            raise LoadingError(
                f"a thread that decoded rows {batch.rows.min():,} to {batch.rows.max():,} of "
                f"{self._beton.path} was killed. Start the epoch again, or resume it from a "
                "state_dict."
            ) from error
        kinds = batch.outcome.whole_kinds
        self._faults.num_decoded_whole += len(kinds)
        self._advice.note(len(batch.rows), kinds)
        return self._faults.without_failed(batch.pixels, batch.rows, batch.outcome.faults)


def stored_images(beton: Beton, rows: NDArray[np.int64]) -> StoredImages:
    """Return where rows (n,) of a beton lie."""
    return StoredImages(
        beton.content,
        beton.offsets[rows],
        beton.sizes[rows],
        beton.modes[rows],
        np.stack([beton.heights[rows], beton.widths[rows]], axis=1),
    )


def chunks(num_rows: int, num_workers: int, image_size: int) -> list[slice]:
    """Cut a batch into pieces that a thread decodes at a time."""
    most, least = num_workers * _CHUNKS_PER_WORKER, num_workers
    worthwhile = -(-_MIN_CHUNK_PIXELS // image_size**2)
    size = max(-(-num_rows // most), min(-(-num_rows // least), worthwhile))
    return [slice(start, start + size) for start in range(0, num_rows, size)]


class Advice:
    """Logs, once for each loader, how many images take the slow way and how to avoid it."""

    def __init__(self, path: Path):
        self._path = path
        self._num_views = 0
        self._kinds: Counter[str] = Counter()
        self._given = False

    def note(self, num_views: int, whole_kinds: list[str]) -> None:
        """Count a batch."""
        self._num_views += num_views
        self._kinds.update(whole_kinds)
        # Enough to know the share; a shorter epoch is reported at its end.
        if self._num_views >= _VIEWS_BEFORE_ADVICE:
            self.give()

    def give(self) -> None:
        """Log the counts, the first time that there are any."""
        count = self._kinds.total()
        if self._given or not count:
            return
        self._given = True
        kinds = ", ".join(f"{number:,} {kind}" for kind, number in self._kinds.most_common())
        share = count / self._num_views
        _LOG.log(
            logging.WARNING if share >= _SHARE_TO_WARN_OF else logging.INFO,
            "%s: %s of the first %s views (%.1f%%) are of JPEGs that the view decoder does not "
            "know (%s). Pillow decodes them whole, which is slower. Make progressive files and "
            "those of several scans baseline without loss, `jpegtran -copy all -outfile NEW OLD`, "
            "and convert the images again: that also re-encodes CMYK, RGB, arithmetic and 12-bit "
            "ones. Files of unusual sampling stay slow until they are encoded again.",
            self._path,
            f"{count:,}",
            f"{self._num_views:,}",
            100 * share,
            kinds,
        )
