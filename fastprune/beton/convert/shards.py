"""A conversion into shards: into a folder or a bucket, one by one or by tasks of a cluster."""

import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastprune.base.errors import ConversionError, InvalidValueError
from fastprune.base.progress import track
from fastprune.beton.convert.assembly import row_order
from fastprune.beton.convert.build import Job, build_beton, discard_partial
from fastprune.beton.convert.cluster import (
    ClusterTask,
    RayAddress,
    cluster,
    run_tasks,
    shared,
    taken,
)
from fastprune.beton.convert.listing import Listing
from fastprune.beton.manifest import Manifest, manifest_path, read_manifest
from fastprune.beton.opening import is_url
from fastprune.beton.remote.store import Store
from fastprune.beton.shards import SET_NAME, missing_shards, shard_name, write_set

_log = logging.getLogger(__name__)

Build = Callable[[Path], Manifest]


def convert_shards(
    job: Job,
    where: str | Path,
    listing: Listing,
    num_shards: int,
    *,
    shard: int | None,
    ray: RayAddress,
) -> Manifest:
    """Make the shards that are missing, or one of them; write manifest.json once all are there.

    Args:
        job: the settings.
        where: a folder, or a URL of object storage.
        listing: the images of all shards.
        num_shards: of the whole.
        shard: the one to make; None for all.
        ray: the cluster whose tasks make them; None makes them here, one after another.

    Returns:
        The manifest of the whole, or of the last shard made while others are missing.

    Raises:
        ConversionError: as `convert`; or a sharded beton is there already that is not to be
            resumed.
        BetonError: a shard of another conversion is there.
        StorageError: the store cannot be read or written.
        ClusterError: the cluster cannot be reached, or gave a task up.
    """
    with _opened(where) as target:
        target.prepare(resume=job.settings.resume)
        if num_shards > len(listing):
            raise InvalidValueError(
                f"shards must be at most the number of images, {len(listing):,}, but is "
                f"{num_shards:,}."
            )
        # All shards of a conversion have these in their settings.
        settings = {**job.choices, "shards": num_shards, "images": listing.identity}
        # Without resume, shards that exist are made again.
        todo = list(range(num_shards)) if shard is None else [shard]
        if job.settings.resume:
            missing = target.missing(settings, refuse_others=True)
            todo = [index for index in todo if index in missing]
        order = row_order(len(listing), job.settings.shuffle_seed)
        # Ranges of positions that differ in size by one at most, in the order of the rows.
        bounds = [at * len(listing) // num_shards for at in range(num_shards + 1)]
        parts = {index: order[bounds[index] : bounds[index + 1]] for index in todo}
        manifest = None
        try:
            if ray is None:
                for index, part in parts.items():
                    build = _builder(job, settings, index, listing.take(part))
                    manifest = target.make(index, build)
            else:
                _make_on_cluster(job, where, settings, listing, parts, ray)
        except KeyboardInterrupt:
            num_whole = num_shards - len(target.missing(settings, refuse_others=False))
            _log.warning(
                "%d of %d shards are whole in %s: repeat the command with --resume to make the "
                "others",
                *(num_whole, num_shards, where),
            )
            raise
        missing = target.missing(settings, refuse_others=False)
        if not missing:
            return target.finish(settings)
        if ray is not None and shard is None:
            raise ConversionError(
                f"{where} lacks {shard_name(missing[0])} (and {len(missing) - 1:,} others), which "
                "a task made elsewhere: a folder must be one that all nodes share. Name such a "
                "folder, or a URL of object storage."
            )
        return manifest or read_manifest(manifest_path(Path(where) / shard_name(shard or 0)))


def _builder(job: Job, settings: dict[str, Any], index: int, listing: Listing) -> Build:
    return lambda path: build_beton(job, path, listing, shard={**settings, "shard": index})


def _make_on_cluster(
    job: Job,
    where: str | Path,
    settings: dict[str, Any],
    listing: Listing,
    parts: Mapping[int, NDArray[np.int64]],
    ray: str | bool,
) -> None:
    """Make shards by tasks; each gets its part of the listing."""
    tasks, is_ours = [], False
    num_rows = sum(map(len, parts.values()))
    try:
        with cluster(ray) as is_ours:
            tasks = [
                ClusterTask(
                    shard_name(index), (job, where, settings, index, shared(listing.take(part)))
                )
                for index, part in parts.items()
            ]
            with closing(run_tasks(_make_one, tasks, num_cpus=job.num_threads)) as finished:
                rows = (row for _, count in finished for row in range(count))
                for _ in track(rows, description="convert", total=num_rows, unit="images"):
                    pass
    except BaseException:
        # Tasks end with our own connection; with the caller's they may continue.
        if is_ours and not (is_url(where) or job.settings.resume or job.settings.keep_partial):
            for task in tasks:
                discard_partial(Path(where) / task.name)
        raise


def _make_one(
    job: Job, where: str | Path, settings: dict[str, Any], index: int, part: list[Any]
) -> int:
    """Make one shard, in a task; returns the number of its images."""
    with _opened(where) as target:
        manifest = target.make(index, _builder(job, settings, index, taken(part)))
        return sum(manifest.counts.values())


@contextmanager
def _opened(where: str | Path) -> "Iterator[_Folder | _Bucket]":
    if not is_url(where):
        yield _Folder(Path(where))
        return
    with tempfile.TemporaryDirectory(prefix="fastprune-shards-") as name:
        yield _Bucket(Store(str(where)), Path(name))


@dataclass(frozen=True)
class _Folder:
    """Shards are built where they stay."""

    path: Path

    def prepare(self, *, resume: bool) -> None:
        """Make the folder; refuse one that holds a sharded beton which is not to be resumed."""
        if not resume and (self.path / SET_NAME).exists():
            raise ConversionError(
                f"{self.path} holds a sharded beton already. Add --resume to keep the shards that "
                "are whole, remove the folder, or name another one."
            )
        if self.path.exists() and not self.path.is_dir():
            raise ConversionError(f"{self.path} is a file. Name a folder for the shards.")
        try:
            self.path.mkdir(exist_ok=True)
        except OSError as error:
            raise ConversionError(
                f"cannot make the folder {self.path}: {os.strerror(error.errno or 0)}. Name one "
                "whose parent exists and that you may write to."
            ) from error

    def missing(self, settings: dict[str, Any], *, refuse_others: bool) -> list[int]:
        return missing_shards(self.path, settings["shards"], settings, refuse_others=refuse_others)

    def make(self, index: int, build: Build) -> Manifest:
        return build(self.path / shard_name(index))

    def finish(self, settings: dict[str, Any]) -> Manifest:
        return write_set(self.path, settings["shards"], settings)


@dataclass(frozen=True)
class _Bucket:
    """Each shard is built in a local folder, uploaded, and removed there.

    Its manifest is uploaded after it, so a shard that has one is whole.
    """

    store: Store
    folder: Path

    def prepare(self, *, resume: bool) -> None:
        """Refuse a prefix that holds a sharded beton which is not to be resumed."""
        if not resume and self.store.exists(SET_NAME):
            raise ConversionError(
                f"{self.store.url} holds a sharded beton already. Add --resume to keep the shards "
                "that are whole, or name another prefix."
            )

    def missing(self, settings: dict[str, Any], *, refuse_others: bool) -> list[int]:
        missing = []
        for index in range(settings["shards"]):
            path = manifest_path(self.folder / shard_name(index))
            if not path.exists():
                if not self.store.exists(path.name):
                    missing.append(index)
                    continue
                path.write_bytes(self.store.read_whole(path.name))
            if read_manifest(path).settings == {**settings, "shard": index}:
                continue
            path.unlink()
            if refuse_others:
                raise ConversionError(
                    f"{self.store.url}/{shard_name(index)} was made from other images or with "
                    "other settings. Remove it, or name another prefix."
                )
            missing.append(index)
        return missing

    def make(self, index: int, build: Build) -> Manifest:
        local = self.folder / shard_name(index)
        manifest = build(local)
        self.store.write(local.name, local)
        self.store.write(manifest.path.name, manifest.path)
        local.unlink()
        return manifest

    def finish(self, settings: dict[str, Any]) -> Manifest:
        manifest = write_set(self.folder, settings["shards"], settings)
        self.store.write(SET_NAME, manifest.path)
        return manifest
