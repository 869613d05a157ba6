"""Fetch the rows of a subset into a mirror before they are needed, here or on all nodes."""

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from fastprune.beton.remote.mirror import NUM_THREADS
from fastprune.beton.remote.opening import open_mirrored
from fastprune.beton.remote.plan import SLACK
from fastprune.beton.remote.store import RETRY_SECONDS
from fastprune.rows.subset import Subset


@dataclass(frozen=True)
class Staged:
    """Result of `stage`.

    Attributes:
        num_rows: rows of the subset, all of which are there now.
        num_fetched_rows: rows that were missing before.
        fetched_bytes: bytes that this process asked for: of the rows, and between them.
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

    Rows that are there are not fetched again. Several processes may stage into one mirror: one of
    them fetches each byte, and each returns when all of its rows are there. A killed process leaves
    all rows that it had fetched.

    Args:
        url: of a beton ("s3://bucket/train.beton") or of a folder of shards ("s3://bucket/train/"),
            with the manifests that `fastprune convert` writes beside it.
        subset: the rows, as a file, a `Subset` or an array; None for all of them.
        folder: of the mirror; made where it is missing.
        threads: requests at a time.
        retry_seconds: how long a request is repeated that fails or gives wrong bytes.
        ray: fetch them on each node of a Ray cluster, by a task a node: True for the cluster that
            RAY_ADDRESS names, or one on this machine; or an address.

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
    beton = open_mirrored(url, folder, retry_seconds=retry_seconds)
    rows = rows_of(beton, subset)
    absent = beton.absent(rows)
    request_bytes: list[int] = []

    def arrivals() -> Iterator[int]:
        for num_rows, num_bytes in fetched:
            request_bytes.append(num_bytes)
            yield from range(num_rows)

    started = time.monotonic()
    with closing(beton.fetched(absent, threads=threads, slack=SLACK)) as fetched:
        for _ in track(arrivals(), description="stage", total=len(absent), unit="rows"):
            pass
    return Staged(
        num_rows=len(rows),
        num_fetched_rows=len(absent),
        fetched_bytes=sum(request_bytes),
        # Rows that another process fetched took none.
        num_requests=sum(num_bytes > 0 for num_bytes in request_bytes),
        seconds=time.monotonic() - started,
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
