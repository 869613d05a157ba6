"""An unfinished pass on disk, from which a killed pass resumes."""

import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fastprune.base.errors import ArtifactError
from fastprune.base.files import try_lock, write_text
from fastprune.base.untrusted import BAD_HEADER
from fastprune.settings.score import LOGIT_METRICS

logger = logging.getLogger(__name__)

# Metrics stay float64 until the table is made: class std is a mean over many rows.
ROW_DTYPE = np.dtype([*((name, "<f8") for name in LOGIT_METRICS), ("prediction", "<i8")])
_LARGEST_HALF = float(np.finfo(np.float16).max)
# Large enough for the disk, small beside the memory of a machine that scores.
_COPY_BYTES = 64 * 2**20


class PassJournal:
    """The folder `<out>.partial`, with the features and metrics of the rows that are done.

    Rows are done in row order. The files are memory maps: their pages belong to the file system's
    cache, not to this process. Use it as a context manager; leaving it commits what is done.

    Attributes:
        folder: path of the files.
        rows_done: rows 0 .. rows_done - 1 are on disk.
    """

    def __init__(
        self,
        out_path: Path,
        *,
        num_rows: int,
        identity: dict[str, Any],
        resume: bool,
        started: float | None = None,
    ):
        """Resume a pass of the same identity, or start one.

        Args:
            out_path: the score table that the pass will write.
            num_rows: N.
            identity: images, teacher and view, which decide the result. JSON values.
            resume: False to start anew even where a pass could be resumed.
            started: when this process began on the pass, by `time.monotonic`; None for now.

        Raises:
            ArtifactError: the folder cannot be written, or another process is writing it.
        """
        self.folder = out_path.with_name(f"{out_path.name}.partial")
        self.rows_done = 0
        self._num_rows = num_rows
        self._rows: np.memmap[Any, Any]
        self._identity = identity
        self._features: np.memmap[Any, Any] | None = None
        self._committed_at = time.monotonic()
        self._started = self._committed_at if started is None else started
        self._earlier_seconds = 0.0
        try:
            self.folder.mkdir(exist_ok=True)
            self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise ArtifactError(
                f"cannot write {self.folder}: {os.strerror(error.errno or 0)}. Name an output in a "
                "folder that exists and may be written."
            ) from error
        self._take_lock()
        if not (resume and self._resume()):
            self._start()

    @property
    def seconds(self) -> float:
        """Seconds of the pass: of this process, and of earlier ones up to their last commit."""
        return self._earlier_seconds + time.monotonic() - self._started

    @property
    def features(self) -> np.memmap[Any, Any]:
        """(N, D) float16 or float32 memory map; zeros where rows are not done."""
        assert self._features is not None
        return self._features

    @property
    def rows(self) -> NDArray[Any]:
        """(N,) records of ROW_DTYPE, a memory map; zeros where rows are not done."""
        return self._rows

    def append(self, features: NDArray[np.float32], records: NDArray[Any]) -> None:
        """Write the next rows.

        Args:
            features: (n, D) float32, finite.
            records: (n,) of ROW_DTYPE.
        """
        if self._features is None:
            self._make_features(features.shape[1], np.float16)
        if self.features.dtype == np.float16 and np.abs(features).max(initial=0) > _LARGEST_HALF:
            self._widen_features()
        stop = self.rows_done + len(records)
        self.features[self.rows_done : stop] = features
        self._rows[self.rows_done : stop] = records
        self.rows_done = stop

    def commit(self, *, older_than_seconds: float = 0.0) -> None:
        """Flush finished rows to disk, unless the last commit is younger than this."""
        if time.monotonic() - self._committed_at < older_than_seconds:
            return
        if self._features is not None:
            self._features.flush()
            self._rows.flush()
        # The data reaches the disk before the count that vouches for it.
        state = {
            "identity": self._identity,
            "rows_done": self.rows_done,
            "seconds": self.seconds,
            "features": None if self._features is None else self._features_path.name,
        }
        write_text(self.folder / "pass.json", json.dumps(state))
        self._committed_at = time.monotonic()

    def keep_features(self, path: Path) -> None:
        """Move the features out of the folder, as a .npy file."""
        self.features.flush()
        self._features_path.replace(path)

    def remove(self) -> None:
        """Delete the folder."""
        self.rows_done = 0
        shutil.rmtree(self.folder)

    def close(self) -> None:
        """Commit finished rows and release the folder."""
        if self.folder.exists():
            self.commit()
        os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _take_lock(self) -> None:
        """One process per folder."""
        if not try_lock(self._lock):
            os.close(self._lock)
            raise ArtifactError(
                f"{self.folder} is being written by another process. Wait for it, or name another "
                "output."
            )

    def _resume(self) -> bool:
        """Open the files of an earlier pass; False where its identity differs or a file is gone."""
        try:
            state = json.loads((self.folder / "pass.json").read_text())
            if state["identity"] != self._identity:
                logger.info("%s is of another pass and is started anew", self.folder)
                return False
            rows, features = _open_map(self.folder / "rows.npy"), None
            if state["features"] is not None:
                self._features_path = self.folder / state["features"]
                features = _open_map(self._features_path)
            rows_done, seconds = int(state["rows_done"]), float(state.get("seconds", 0.0))
            sizes = {len(rows), self._num_rows if features is None else len(features)}
            # Another version of fastprune may keep other metrics.
            if rows.dtype != ROW_DTYPE or sizes != {self._num_rows}:
                raise ValueError("its files are of other rows or of another version")
        except FileNotFoundError:
            return False
        except (OSError, ValueError, KeyError, TypeError, *BAD_HEADER) as error:
            logger.warning("%s is damaged (%s) and is started anew", self.folder, error)
            return False
        self._rows, self._features = rows, features
        self.rows_done, self._earlier_seconds = rows_done, seconds
        logger.info("resuming after %s of %s rows", f"{self.rows_done:,}", f"{self._num_rows:,}")
        return True

    def _start(self) -> None:
        """Make empty files in place of an earlier pass's."""
        for name in ("pass.json", "rows.npy", "features-float16.npy", "features-float32.npy"):
            (self.folder / name).unlink(missing_ok=True)
        self._rows = _make_map(self.folder / "rows.npy", ROW_DTYPE, (self._num_rows,))

    def _make_features(self, width: int, dtype: type[np.floating[Any]]) -> None:
        self._features_path = self.folder / f"features-{np.dtype(dtype)}.npy"
        self._features = _make_map(self._features_path, dtype, (self._num_rows, width))

    def _widen_features(self) -> None:
        """Copy the features to a float32 file, because a value exceeds float16's range."""
        logger.info("features exceed float16's range; they are kept in float32 from here on")
        narrow, narrow_path = self.features, self._features_path
        self._make_features(narrow.shape[1], np.float32)
        step = max(1, _COPY_BYTES // narrow[:1].nbytes)
        for start in range(0, self.rows_done, step):
            stop = min(start + step, self.rows_done)
            self.features[start:stop] = narrow[start:stop]
        self.commit()
        narrow_path.unlink()


def _open_map(path: Path) -> np.memmap[Any, Any]:
    """Map a .npy file to go on with it.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is shorter than its header says, or no .npy file of numbers.
    """
    # For writing, NumPy would fill up a file that was cut, and zeros would count as rows.
    np.load(path, mmap_mode="r")
    return np.lib.format.open_memmap(path, mode="r+")


def _make_map(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.memmap[Any, Any]:
    """Make a .npy file of zeros with reserved blocks, and map it."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    try:
        with path.open("rb+") as file:
            # A full disk fails here, not as a SIGBUS at some later row.
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        path.unlink()
        raise ArtifactError(
            f"cannot reserve {array.nbytes / 1e9:.1f} GB for {path}: "
            f"{os.strerror(error.errno or 0)}. Free some space or name another output."
        ) from error
    return array
