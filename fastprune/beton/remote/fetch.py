"""Fetch rows into a mirror on threads: ahead of a loader that waits for them, or all at once."""

import shutil
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fastprune.base.errors import ArtifactError
from fastprune.base.progress import track
from fastprune.beton.beton import RowsLike, rows_of
from fastprune.beton.convert.cluster import (
    ClusterTask,
    RayAddress,
    cluster,
    nodes,
    run_tasks,
    shared,
    taken,
)
from fastprune.beton.remote.mirror import NUM_THREADS, Mirror, open_mirror
from fastprune.beton.remote.plan import SLACK, Request, in_windows, requests_for
from fastprune.beton.remote.store import RETRY_SECONDS
from fastprune.rows.subset import Subset

# Rows that a loader needs at about the same time are asked for together.
WINDOW_BYTES = 32 << 20
_SECONDS_BETWEEN_LOOKS = 0.05
_SECONDS_BETWEEN_COUNTS = 0.2
# File systems keep space for themselves and round files up.
_SPARE_BYTES = 64 << 20


@dataclass(frozen=True)
class Staged:
    """What `stage` did.

    Attributes:
        num_rows: rows of the subset, all of which are there now.
        num_fetched_rows: those that were missing before.
        fetched_bytes: bytes of them, and between them, that this process asked for.
        num_requests: ranges that this process asked for.
        seconds: from the request for the first row to the last.
        num_nodes: nodes of a cluster, whose rows, bytes and requests are added up.
    """

    num_rows: int
    num_fetched_rows: int
    fetched_bytes: int
    num_requests: int
    seconds: float
    num_nodes: int = 1


def stage(
    url: str,
    subset: RowsLike,
    folder: str | Path,
    *,
    threads: int = NUM_THREADS,
    retry_seconds: float = RETRY_SECONDS,
    ray: RayAddress = None,
) -> Staged:
    """Fetch the rows of a subset into a mirror on a local disk.

    Rows that are there are not fetched again. Several processes may stage into one mirror: each
    byte is fetched by one of them, and each returns when all of its rows are there. A process that
    is killed leaves all rows that it had fetched.

    Args:
        url: of a beton ("s3://bucket/train.beton") or of a folder of shards ("s3://bucket/train/"),
            with the manifests that `fastprune convert` writes beside it.
        subset: the rows, as a file, a `Subset` or an array; None for all of them.
        folder: of the mirror; made where it is missing.
        threads: requests at a time.
        retry_seconds: how long a request is repeated that fails or gives wrong bytes.
        ray: fetch them on each node of a Ray cluster, by a task a node: True for the cluster that
            RAY_ADDRESS names, or one on this machine; or an address.

    Returns:
        What was done.

    Raises:
        InvalidValueError: the URL or the rows are outside their domain.
        ArtifactMismatch: the subset was made from other images.
        StorageError: something is missing at the URL, access is denied, an object changed, or the
            server fails for too long.
        ArtifactError: the disk has less room than the rows need, or cannot be written.
        MissingDependencyError: Ray is not installed.
        ClusterError: the cluster cannot be reached, or a node died; the other nodes have the rows.
    """
    if ray is not None:
        return _stage_on_nodes(url, subset, Path(folder).absolute(), threads, retry_seconds, ray)
    mirror = open_mirror(url, folder, retry_seconds=retry_seconds)
    rows = rows_of(mirror.beton, subset)
    absent = mirror.absent(rows)
    started = time.monotonic()
    with Fetch(mirror, absent, threads=threads, slack=SLACK) as fetch:
        arrived = (row for count in fetch.arrivals() for row in range(count))
        for _ in track(arrived, description="stage", total=len(absent), unit="rows"):
            pass
        return Staged(
            len(rows),
            len(absent),
            fetch.fetched_bytes,
            fetch.num_requests,
            time.monotonic() - started,
        )


def _stage_on_nodes(
    url: str,
    subset: RowsLike,
    folder: Path,
    threads: int,
    retry_seconds: float,
    ray: str | bool,
) -> Staged:
    """Fetch the rows on every node; one that fails does not stop the others."""
    if isinstance(subset, str | Path):
        # The file is here, and not on the nodes.
        subset = Subset.load(subset)
    with cluster(ray):
        arguments = (url, shared(subset), folder, threads, retry_seconds)
        tasks = [ClusterTask(f"node {name}", arguments, node) for node, name in nodes().items()]
        # Without CPUs of the cluster's: a job that waits for its rows may hold all of them.
        with closing(run_tasks(_stage_here, tasks, num_cpus=0, keep_going=True)) as outcomes:
            tracked = track(outcomes, description="stage", total=len(tasks), unit="nodes")
            staged = [outcome for _, outcome in tracked]
    return Staged(
        num_rows=staged[0].num_rows,
        num_fetched_rows=sum(one.num_fetched_rows for one in staged),
        fetched_bytes=sum(one.fetched_bytes for one in staged),
        num_requests=sum(one.num_requests for one in staged),
        seconds=max(one.seconds for one in staged),
        num_nodes=len(staged),
    )


def _stage_here(
    url: str, subset: list[Any], folder: Path, threads: int, retry_seconds: float
) -> Staged:
    """Fetch the rows on this node, in a task."""
    return stage(url, taken(subset), folder, threads=threads, retry_seconds=retry_seconds)


class Fetch:
    """Rows on their way into a mirror.

    Attributes:
        fetched_bytes: so far, by this process.
        num_requests: likewise.
    """

    def __init__(
        self,
        mirror: Mirror,
        rows: NDArray[np.int64],
        *,
        threads: int = NUM_THREADS,
        slack: float | None = None,
    ):
        """Start to fetch what is missing.

        Args:
            mirror: to fetch into.
            rows: in the order in which they are needed.
            threads: requests at a time.
            slack: see `plan.requests_for`: all rows are planned at once, by their place; None
                plans them in windows, in their order.

        Raises:
            ArtifactError: the disk has less room than the rows need.
        """
        self.fetched_bytes = self.num_requests = 0
        self._mirror = mirror
        self._absent = mirror.absent(rows)
        _require_room(mirror, self._absent)
        self._requests = self._planned(slack)
        # Requests whose range another process is fetching, and when to look again.
        self._taken: deque[tuple[float, Request]] = deque()
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._finished = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, name=f"fastprune-fetch-{number}", daemon=True)
            for number in range(min(threads, len(self._absent)))
        ]
        self._num_running = len(self._threads)
        if not self._threads:
            self._finished.set()
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop, when the requests that are under way are done."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait(self, rows: NDArray[np.int64]) -> None:
        """Wait until rows are there.

        Raises:
            FastpruneError: they cannot be fetched.
        """
        while len(self._mirror.absent(rows)):
            self._look()

    def arrivals(self) -> Iterator[int]:
        """Yield how many more of the rows are there, until all are.

        Raises:
            FastpruneError: one cannot be fetched.
        """
        num_left = len(self._absent)
        is_done = False
        while not is_done:
            # Now and then, and not at each arrival: all rows are looked at.
            is_done = self._finished.wait(_SECONDS_BETWEEN_COUNTS)
            if self._error is not None:
                raise self._error
            now_left = len(self._mirror.absent(self._absent))
            if now_left < num_left:
                yield num_left - now_left
            num_left = now_left

    def _look(self) -> None:
        """Wait until a thread of this process has done something, or a moment for others."""
        with self._changed:
            if self._error is not None:
                raise self._error
            self._changed.wait(_SECONDS_BETWEEN_LOOKS)

    def _planned(self, slack: float | None) -> Iterator[Request]:
        places = self._mirror.places
        if slack is not None:
            yield from requests_for(places, self._absent, slack=slack)
            return
        for window in in_windows(places, self._absent, window_bytes=WINDOW_BYTES):
            yield from requests_for(places, self._mirror.absent(window), slack=0)

    def _run(self) -> None:
        """Fetch one request after another, in a thread."""
        try:
            while (request := self._next()) is not None:
                fetched_bytes = self._mirror.fetch(request, self._stop)
                with self._changed:
                    if fetched_bytes is None:
                        # Whoever has it may die, so it is not left to them.
                        again = time.monotonic() + _SECONDS_BETWEEN_LOOKS
                        self._taken.append((again, request))
                    else:
                        self.fetched_bytes += fetched_bytes
                        self.num_requests += fetched_bytes > 0
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._error = self._error or error
                self._stop.set()
                self._changed.notify_all()
        finally:
            with self._changed:
                self._num_running -= 1
                if self._num_running == 0:
                    self._finished.set()

    def _next(self) -> Request | None:
        """Return what to fetch next; None when all is done."""
        with self._changed:
            while not self._stop.is_set():
                if self._taken and self._taken[0][0] <= time.monotonic():
                    return self._taken.popleft()[1]
                if (request := next(self._requests, None)) is not None:
                    return request
                if not self._taken:
                    return None
                self._changed.wait(_SECONDS_BETWEEN_LOOKS)
            return None


def _require_room(mirror: Mirror, absent: NDArray[np.int64]) -> None:
    wanted = int(mirror.places.sizes[absent].sum())
    free = shutil.disk_usage(mirror.folder).free
    if wanted and wanted + _SPARE_BYTES > free:
        raise ArtifactError(
            f"{mirror.folder} has {free:,} bytes free, but {len(absent):,} rows with {wanted:,} "
            "bytes are wanted. Free some space, name a folder on another disk, or stage a smaller "
            "subset."
        )
