"""Shards into object storage: each made in a local folder, uploaded, and removed there."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastprune.beton.manifest import Manifest, manifest_path, read_manifest
from fastprune.beton.remote.store import Store
from fastprune.beton.shards import SET_NAME, shard_name, write_set
from fastprune.errors import ConversionError


def upload_shards(
    store: Store,
    make: Callable[[int, Path], Manifest],
    *,
    num_shards: int,
    shard: int | None,
    settings: dict[str, Any],
    resume: bool,
) -> Manifest:
    """Make the shards that the store lacks, or one of them; write manifest.json when all are there.

    A shard's manifest is uploaded behind it, so a shard that has one is whole.

    Args:
        store: of the sharded beton.
        make: makes a shard of a number at a local path.
        num_shards: of the whole.
        shard: the one to make; None for all.
        settings: what all shards of this conversion have in their settings.
        resume: whether whole shards are kept.

    Returns:
        The manifest of the whole, or of the last shard made while others are missing.

    Raises:
        ConversionError: there is a sharded beton already, and it is not to be resumed; or a shard
            of another conversion.
        StorageError: the store cannot be read or written.
    """
    if not resume and store.exists(SET_NAME):
        raise ConversionError(
            f"{store.url} holds a sharded beton already. Add --resume to keep the shards that are "
            "whole, or name another prefix."
        )
    with tempfile.TemporaryDirectory(prefix="fastprune-shards-") as name:
        folder = Path(name)
        manifest = None
        for index in range(num_shards) if shard is None else [shard]:
            local = folder / shard_name(index)
            if resume and _is_whole(store, folder, index, settings):
                continue
            manifest = make(index, local)
            store.write(local.name, local)
            store.write(manifest_path(local).name, manifest_path(local))
            local.unlink()
        if all(_is_whole(store, folder, index, settings) for index in range(num_shards)):
            manifest = write_set(folder, num_shards, settings)
            store.write(SET_NAME, manifest.path)
        if manifest is None:
            manifest = read_manifest(manifest_path(folder / shard_name(shard or 0)))
        return manifest


def _is_whole(store: Store, folder: Path, index: int, settings: dict[str, Any]) -> bool:
    """Return whether a shard of this conversion is there; its manifest is copied to the folder."""
    path = manifest_path(folder / shard_name(index))
    if not path.exists():
        if not store.exists(path.name):
            return False
        path.write_bytes(store.read_whole(path.name))
    if read_manifest(path).settings != {**settings, "shard": index}:
        raise ConversionError(
            f"{store.url}/{shard_name(index)} was made from other images or with other settings. "
            "Remove it, or name another prefix."
        )
    return True
