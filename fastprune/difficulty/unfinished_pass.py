"""The folder of an unfinished scoring pass, from which a killed pass resumes."""

import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fastprune.base.errors import ArtifactError
from fastprune.base.files import lock, write_text
from fastprune.base.headers import read_header
from fastprune.base.provenance import differences
from fastprune.base.ranks import Ranks
from fastprune.difficulty.teacher import RECORD
from fastprune.rows.store import RowStore, StoreHeader

logger = logging.getLogger(__name__)

_HEADER_NAME = "pass.json"
# A killed pass loses at most this much work.
_COMMIT_SECONDS = 10.0
_LARGEST_HALF = float(np.finfo(np.float16).max)
# Large enough for the disk, small beside the memory of a machine that scores.
_COPY_BYTES = 64 << 20


class PassHeader(StoreHeader):
    """pass.json.

    Attributes:
        width: D, of the features.
        seconds: spent on the pass so far.
    """

    width: Annotated[int, Field(ge=1)]
    seconds: Annotated[float, Field(ge=0)]


class UnfinishedPass:
    """Features and metrics of the rows that are done; every rank writes its own.

    Features are stored in float16; rows beyond its range also in a second store, in float32. All
    files are memory maps: their pages belong to the file system's cache, not to this process.

    Attributes:
        folder: of the files.
        started: when this process began on the pass, by `time.monotonic`.
    """

    def __init__(self, folder: Path, header: PassHeader, *, started: float, is_first: bool):
        """For `open_pass`."""
        self.folder = folder
        self.started = started
        self._header = header
        self._is_first = is_first
        self._committed_at = time.monotonic()
        self._store = RowStore(
            folder,
            header.num_rows,
            {"features": np.dtype((np.float16, (header.width,))), "records": RECORD},
        )
        self._wide = self._wide_store("wide")

    @property
    def seconds(self) -> float:
        """Seconds of the pass: of this process, and of earlier ones up to their last commit."""
        return self._header.seconds + time.monotonic() - self.started

    @property
    def records(self) -> NDArray[Any]:
        """(N,) of RECORD, a memory map."""
        return self._store.map("records")

    def missing(self) -> NDArray[np.int64]:
        """The rows that are not done, sorted."""
        return self._store.missing()

    def put(
        self, rows: NDArray[np.int64], features: NDArray[np.float32], records: NDArray[Any]
    ) -> None:
        """Keep the results of some rows, and commit every ten seconds.

        Args:
            rows: (n,).
            features: (n, D), finite.
            records: (n,) of RECORD.
        """
        is_wide = np.abs(features).max(axis=1, initial=0) > _LARGEST_HALF
        if is_wide.any():
            self._wide.put(rows[is_wide], features[is_wide])
            # Before any row of them can be marked as done.
            self._wide.commit()
        with np.errstate(over="ignore"):
            self._store.put(rows, features.astype(np.float16), records)
        if time.monotonic() - self._committed_at >= _COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Write what was put, with checksums, and the seconds so far."""
        for store in (self._wide, self._store):
            store.commit(seal=True)
        if self._is_first:
            so_far = self._header.model_copy(update={"seconds": self.seconds})
            write_text(self.folder / _HEADER_NAME, so_far.model_dump_json())
        self._committed_at = time.monotonic()

    def check(self) -> Iterator[str]:
        """Compare what is there with its checksums: a sentence for each fault."""
        yield from self._store.check()
        yield from self._wide.check()

    def features(self) -> NDArray[Any]:
        """(N, D) memory map: float16, or float32 if a row is beyond float16's range."""
        return self._features()[0]

    def keep_features(self, path: Path) -> None:
        """Move the features out of the folder, as a .npy file."""
        self._features()[1].replace(path)

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder)

    def prepare(self, *, resume: bool) -> None:
        """On the first rank: check what an earlier pass left, or make the files anew.

        Raises:
            ArtifactError: the folder cannot be written, or the disk is too small.
        """
        earlier = self._read_earlier() if resume else None
        if earlier is None:
            for path in [self.folder / _HEADER_NAME, *self.folder.glob("*.npy")]:
                path.unlink(missing_ok=True)
        else:
            self._header = earlier
            done = self._header.num_rows - len(self.missing())
            logger.info("resuming after %s of %s rows", f"{done:,}", f"{self._header.num_rows:,}")
        # All of its room now: hours later, a full disk would be a worse surprise.
        self._store.create(reserve=True)
        self.commit()

    def _read_earlier(self) -> PassHeader | None:
        """The header of a pass that can be resumed; None if there is none."""
        try:
            earlier = read_header(self.folder / _HEADER_NAME, PassHeader, cure="It starts over.")
            ours, theirs = (h.model_dump(exclude={"seconds"}) for h in (self._header, earlier))
            if found := differences(ours, theirs):
                logger.info("%s is of another pass and starts over: %s", self.folder, found[0])
                return None
            for fault in self.check():
                raise ArtifactError(fault)
            return earlier
        except ArtifactError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                logger.warning("%s is damaged and starts over: %s", self.folder, error)
            # The maps of damaged files are of no use.
            self._store.close()
            return None

    def _features(self) -> tuple[NDArray[Any], Path]:
        """The features and their file."""
        narrow, wide_rows = self._store.map("features"), self._wide.done_rows()
        if len(wide_rows) == 0:
            return narrow, self._store.path("features")
        logger.info("features exceed float16's range and are kept in float32")
        combined = self._wide_store("features-float32")
        step = max(1, _COPY_BYTES // narrow[:1].nbytes)
        for start in range(0, len(narrow), step):
            block = np.array(narrow[start : start + step], np.float32)
            first, stop = np.searchsorted(wide_rows, [start, start + step])
            if first < stop:
                rows = wide_rows[first:stop]
                block[rows - start] = self._wide.read("wide", rows)
            combined.put(np.arange(start, start + len(block)), block)
        combined.commit()
        return combined.map("features-float32"), combined.path("features-float32")

    def _wide_store(self, field: str) -> RowStore:
        """A store of float32 features, whose files are made when rows are put."""
        dtype = np.dtype((np.float32, (self._header.width,)))
        names = {"marks": f"marks-{field}", "checksums": f"crc32c-{field}"}
        return RowStore(self.folder, self._header.num_rows, {field: dtype}, **names)


@contextmanager
def open_pass(
    out_path: Path,
    *,
    num_rows: int,
    width: int,
    identity: dict[str, Any],
    resume: bool,
    started: float,
    ranks: Ranks,
) -> Iterator[UnfinishedPass]:
    """Resume a pass of the same identity, or start one; a collective.

    On leaving, finished rows are committed.

    Args:
        out_path: the score table that the pass will write; the folder is `<out_path>.partial`.
        num_rows: N.
        width: D, of the features.
        identity: images, teacher and view, which decide the result. JSON values.
        resume: False to start over even if a pass could be resumed.
        started: when this process began on the pass, by `time.monotonic`.
        ranks: that share the pass, and the folder.

    Raises:
        ArtifactError: the folder cannot be written, another process is writing it, or a rank does
            not see it.
    """
    folder = out_path.with_name(f"{out_path.name}.partial")
    header = PassHeader(num_rows=num_rows, width=width, identity=identity, seconds=0.0)
    unfinished = UnfinishedPass(folder, header, started=started, is_first=ranks.is_first)
    with ExitStack() as stack:
        if ranks.is_first:
            try:
                folder.mkdir(exist_ok=True)
            except OSError as error:
                raise ArtifactError(
                    f"cannot write {folder}: {error.strerror}. Name an output in a folder that "
                    "exists and may be written."
                ) from error
            # Of the pass; the stores lock their writing by themselves.
            stack.enter_context(lock(folder / "pass.lock", wait=False))
            unfinished.prepare(resume=resume)
        # Scores are written by the first rank, so its folder is the one that counts.
        ranks.from_first("prepared")
        if not (folder / _HEADER_NAME).exists():
            raise ArtifactError(
                f"rank {ranks.rank} does not see {folder}, in which all ranks write. Name an "
                "output on a disk that they share."
            )
        try:
            yield unfinished
        finally:
            if folder.exists():
                unfinished.commit()
