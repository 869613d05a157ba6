"""A mirror: sparse local files of a beton in object storage, filled row by row.

The files have the size of the whole and hold the fetched rows at their own offsets, so a mirror is
read like the beton itself. A byte per row in `mirror.rows.npy` marks the rows that are there. Any
number of threads and processes may fill one mirror at once.
"""

import os
import shutil
import threading
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator

from fastprune.base.checksums import is_intact
from fastprune.base.errors import ArtifactError, StorageError
from fastprune.base.files import named_os_errors, write_all
from fastprune.base.headers import Header, read_header
from fastprune.base.provenance import Fingerprint
from fastprune.base.run_ahead import ordered_ahead
from fastprune.base.threads import ThreadDiedError, WorkerThreads
from fastprune.beton.beton import Beton
from fastprune.beton.opening import MIRROR_NAME
from fastprune.beton.remote.plan import Places, Request, in_windows, requests_for
from fastprune.beton.remote.store import BadBodyError, Store
from fastprune.rows.store import Marks

MARKS_NAME = "mirror.rows.npy"
NUM_THREADS = 16
# Rows that a loader needs at about the same time are asked for together.
WINDOW_BYTES = 32 << 20

# Of requests beyond the batch that is waited for. Their bytes go to disk, so a deep queue costs no
# memory, and it bridges the time in which the trainer does not ask for a batch.
_REQUESTS_AHEAD = 4096
_SECONDS_BETWEEN_LOOKS = 0.05
# File systems keep space for themselves and round files up.
_SPARE_BYTES = 64 << 20


def _file_name(name: str) -> str:
    # Rows are written into these files: a name must not leave the folder.
    if Path(name).name != name or name in ("", ".", ".."):
        raise ValueError(f"is {name!r}, which is not a file name")
    return name


class MirroredFile(Header):
    """One file of a mirror.

    Attributes:
        name: of the file and of its object.
        size: of the whole file, in bytes.
        version: the object's when the mirror was made; an object of another version is refused.
    """

    name: Annotated[str, AfterValidator(_file_name)]
    num_rows: int
    size: int
    version: str


class MirrorHeader(Header):
    """The content of mirror.json.

    Attributes:
        url: of the beton, or of the folder of its shards, without a slash at its end.
        files: in the order of their rows.
    """

    format: Literal[2] = 2
    url: str
    fingerprint: Fingerprint
    files: tuple[MirroredFile, ...]

    @classmethod
    def read(cls, folder: Path) -> "MirrorHeader":
        """Read mirror.json of a folder, or raise an `ArtifactError`."""
        cure = f"Remove {folder}, and fetch the rows again: fastprune stage URL SUBSET FOLDER"
        return read_header(folder / MIRROR_NAME, cls, cure=cure)

    def marks(self, folder: Path) -> Marks:
        """Map the marks of the rows, or raise an `ArtifactError`."""
        cure = (
            f"Remove {folder}, and fetch the rows again: fastprune stage {self.url} SUBSET {folder}"
        )
        return Marks(folder / MARKS_NAME, self.fingerprint.num_rows, cure=cure)


def marks_of(path: Path) -> NDArray[np.bool_] | None:
    """Return which rows of a beton in a mirror are there; see `opening.rows_present`."""
    folder = path if path.is_dir() else path.parent
    header = MirrorHeader.read(folder)
    marks = header.marks(folder).array
    if path == folder:
        return marks
    first_row = 0
    for file in header.files:
        if file.name == path.name:
            return marks[first_row : first_row + file.num_rows]
        first_row += file.num_rows
    return None


@dataclass(frozen=True, eq=False, repr=False)
class MirroredBeton(Beton):
    """A beton in object storage, whose rows are fetched into a mirror when they are asked for.

    Rows that are not there are zeros in `content` until `arriving` or `fetched` fetched them.
    """

    folder: Path = Path()
    mirrored: tuple[MirroredFile, ...] = ()
    store: Store | None = None
    marks: Marks | None = None

    def arriving(self, batches: Iterable[NDArray[np.int64]]) -> Iterator[NDArray[np.int64]]:
        """Yield each batch once its rows are fetched, in order; later ones are fetched ahead."""
        batches = list(batches)
        rows = np.concatenate(batches) if batches else np.empty(0, np.int64)
        # Each row once, where it is needed first.
        _, first = np.unique(rows, return_index=True)
        with closing(self.fetched(self.absent(rows[np.sort(first)]))) as fetched:
            for batch in batches:
                # The marks decide: another process may have fetched these rows.
                while len(self.absent(batch)):
                    next(fetched)
                yield batch

    def absent(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the rows that are not there, in their order."""
        assert self.marks is not None
        absent: NDArray[np.int64] = rows[~self.marks.array[rows]]
        return absent

    def fetched(
        self, rows: NDArray[np.int64], *, threads: int = NUM_THREADS, slack: float | None = None
    ) -> Generator[tuple[int, int], None, None]:
        """Fetch rows on threads, ahead of the caller.

        Args:
            rows: that are absent, in the order in which they are needed.
            threads: requests at a time.
            slack: see `plan.requests_for`: all rows are planned at once, by their place; None
                plans them in windows, in their order.

        Yields:
            Of each request in order, once all of its rows are there: the number of its rows, and
            the bytes that this process asked for.

        Raises:
            ArtifactError: the disk is full, or has less room than the rows need.
            StorageError: a row cannot be fetched, or its object changed.
        """
        if not len(rows):
            return
        self._require_room(rows)
        _ = self.crcs, self.places  # read once, before the threads ask for them
        stop = threading.Event()
        pool = WorkerThreads(min(threads, len(rows)), name="fastprune-fetch", error=StorageError)

        def fetch(request: Request) -> tuple[int, int]:
            # Another process that fetches some of these rows may die, so they are asked for again.
            while (num_bytes := self._fetch(request, stop)) is None:
                if stop.wait(_SECONDS_BETWEEN_LOOKS):
                    return 0, 0
            return len(request.rows), num_bytes

        try:
            yield from ordered_ahead(pool, fetch, self._planned(rows, slack), _REQUESTS_AHEAD)
        except ThreadDiedError:
            raise StorageError(
                f"a thread that fetched rows of {self.path} died. Run the command again: the rows "
                "that are there stay."
            ) from None
        finally:
            stop.set()
            pool.close()

    def _planned(self, rows: NDArray[np.int64], slack: float | None) -> Iterator[Request]:
        if slack is not None:
            yield from requests_for(self.places, rows, slack=slack)
            return
        for window in in_windows(self.places, rows, window_bytes=WINDOW_BYTES):
            yield from requests_for(self.places, self.absent(window), slack=0)

    def _fetch(self, request: Request, stop: threading.Event) -> int | None:
        """Fetch a range, unless another process is fetching some of its rows (None).

        Bytes are checked before they are written, and rows are marked after. A killed process
        leaves nothing else: the kernel writes out what it has accepted. After a power failure,
        the CRC-32C that a loader compares at the first read catches a mark whose data was lost.
        Returns the number of bytes fetched, 0 if all rows were there.
        """
        assert self.marks is not None
        store = self.store
        assert store is not None
        file, places, crcs = self.mirrored[request.file], self.places, self.crcs
        with self.marks.claim(request.rows) as rows:
            if rows is None:
                return None
            if not len(rows):
                return 0
            start = int(places.offsets[rows[0]])
            size = int((places.offsets[rows] + places.sizes[rows]).max()) - start
            require_version(store, file)

            def require_rows(content: bytes) -> None:
                view = memoryview(content)
                for row in rows.tolist():
                    at = int(places.offsets[row]) - start
                    if not is_intact(view[at : at + int(places.sizes[row])], crcs[row]):
                        # Another version of the object would never have the right bytes.
                        require_version(store, file)
                        raise BadBodyError(f"the bytes of row {row:,} are others (CRC-32C)")

            content = store.read(file.name, start, size, require=require_rows, stop=stop)
            path = self.folder / file.name
            with named_os_errors(path):
                descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
                try:
                    write_all(descriptor, content, start)
                finally:
                    os.close(descriptor)
                self.marks.done(rows)
            return size

    def _require_room(self, rows: NDArray[np.int64]) -> None:
        wanted = int(self.sizes[rows].sum())
        free = shutil.disk_usage(self.folder).free
        if wanted and wanted + _SPARE_BYTES > free:
            raise ArtifactError(
                f"{self.folder} has {free:,} bytes free, but {len(rows):,} rows with {wanted:,} "
                "bytes are wanted. Free some space, name a folder on another disk, or stage a "
                "smaller subset."
            )

    @cached_property
    def places(self) -> Places:
        """Where each row lies in its file."""
        first_rows = [file.first_row for file in self.files]
        files = np.searchsorted(first_rows, np.arange(self.num_rows), side="right") - 1
        starts = np.array([file.start for file in self.files])
        return Places(files, self.offsets - starts[files], self.sizes)

    @cached_property
    def crcs(self) -> NDArray[np.uint32]:
        """CRC-32C of each row's stored bytes, (N,), by the manifests."""
        assert self.manifest is not None, "its fingerprint has a content"
        lines = self.manifest.table(["row", "stored_crc32c"])
        crcs: NDArray[np.uint32] = lines.filter(lines["row"].is_valid())["stored_crc32c"].to_numpy()
        return crcs


def require_version(store: Store, file: MirroredFile) -> None:
    """Refuse an object that is not the one that the mirror was made of, by a `StorageError`."""
    now = store.status(file.name)
    if (now.size, now.version) != (file.size, file.version):
        raise StorageError(
            f"{store.url}/{file.name} changed since the mirror was made: it was {file.version} "
            f"({file.size:,} bytes), and is {now.version} ({now.size:,} bytes). Remove the mirror "
            "and fetch the rows again."
        )
