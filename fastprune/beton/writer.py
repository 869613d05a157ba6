"""Images -> beton: JPEGs, copied or rewritten by supervised workers, in aligned places."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fastprune.beton.build import Job, build_beton
from fastprune.beton.manifest import Manifest, manifest_path, read_manifest
from fastprune.beton.reader import open_beton
from fastprune.beton.remote.store import Store, is_url
from fastprune.beton.remote.upload import upload_shards
from fastprune.beton.shards import MAX_SHARDS, SET_NAME, missing_shards, shard_name, write_set
from fastprune.beton.sources import source_for
from fastprune.beton.sources.listing import Listing, renumbered
from fastprune.beton.sources.parquet import ParquetSource
from fastprune.beton.transcode import LAYOUTS, ImageSettings
from fastprune.checks import require_at_least, require_one_of
from fastprune.cpus import usable_cpus
from fastprune.errors import ArtifactError, ConversionError, InvalidValueError
from fastprune.jpeg.headers import MAX_SIDE

# More processes than this only wait for the disk; --workers may still ask for more.
_MOST_WORKERS = 16
_MOST_WORKERS_ASKED = 1024


def convert(
    images: Any,
    beton_path: str | Path,
    *,
    labels: str | Path | None = None,
    unlabeled: bool = False,
    workers: int | None = None,
    jpeg: str = "auto",
    on_error: str = "stop",
    quality: int = 95,
    max_side: int | None = None,
    exif: str = "ignore",
    verify: bool = False,
    classes_from: str | Path | None = None,
    shuffle_seed: int | None = None,
    resume: bool = False,
    keep_partial: bool = False,
    shards: int | None = None,
    shard: int | None = None,
) -> Manifest:
    """Write a beton and its manifest; JPEGs keep their coefficients, copied or rewritten.

    The same images and settings give the same bytes, whatever the number of workers and however
    often the conversion was interrupted and resumed. While it is being written the beton is called
    `<beton_path>.partial`; it gets its name, and the manifest its own, when both are on the disk.

    Args:
        images: the root of an ImageFolder tree; a folder of WebDataset tars (jpg and cls) or of
            Hugging Face style Parquet files, a single such file or a pattern of them; with
            `labels`, a flat folder of images; or an indexable dataset whose samples are
            (image, label) or {"image": ..., "label": ...}, an image being a PIL image, uint8
            pixels (height, width, 3) or (height, width), or the bytes of an image file.
        beton_path: the file to write; an older one is replaced at the very end, with its manifest.
            With `shards` also a URL, such as s3://bucket/train/.
        labels: for a flat folder, a text file with a line "name class" per image.
        unlabeled: leave classes out: every label is 0, and what needs labels refuses the beton. The
            folder may be any tree of images; tars, Parquet files and datasets need no labels.
        workers: processes; by default one per CPU that affinity and cgroup quota leave, at
            most 16.
        jpeg: what becomes of 8-bit baseline and progressive JPEGs, gray or YCbCr. "original" copies
            their bytes. "fast" rewrites baseline ones without loss, with a restart marker after
            each row of MCUs, at which a loader enters them; others keep their bytes. "auto" does
            so for files of at least 16 KiB, where it pays, and copies smaller ones.
        on_error: "stop" at the first unreadable image, or "skip" it and list it in the manifest.
        quality: JPEG quality of images that must be transcoded, [1, 100].
        max_side: shrink images with a longer side, in pixels, by area; None keeps all sizes.
        exif: "ignore" the orientation, as FFCV and torchvision do, or "apply" it by transcoding.
        verify: decode every JPEG that is kept once, as the loader does, to find damage inside its
            data too.
        classes_from: a beton or manifest whose class names number the classes here, so that a
            folder that lacks a class numbers the others as the training set does.
        shuffle_seed: put the rows in a random order; the manifest has the map.
        resume: continue the partial file of an interrupted run, if there is one.
        keep_partial: leave the partial file for a later `resume` when the conversion fails.
        shards: write a sharded beton: `beton_path` is a folder, which gets so many betons with
            contiguous ranges of the rows, and a manifest.json when all of them are there. It is
            used as one beton is: same rows, same fingerprint. With `resume`, shards that are
            whole are kept.
        shard: make this one alone, in [0, shards); the run that finds all of them whole writes
            manifest.json.

    Returns:
        The manifest; of a sharded beton that is not whole yet, the one of the last shard made. One
        that was uploaded has no lines here.

    Raises:
        InvalidValueError: a setting is outside its domain.
        ConversionError: an image or the folder cannot be read, a class is not in
            `classes_from`, the beton cannot be written, memory or file descriptors ran out, or a
            worker died. Nothing is left behind, unless a partial file was asked for.
        ArtifactError: `classes_from` cannot be read or has no class names of its own.
        StorageError: the URL cannot be written.
    """
    settings = _checked_settings(jpeg, quality, max_side, exif, verify)
    num_workers = _checked_workers(workers)
    require_one_of("on_error", on_error, ("stop", "skip"))
    if shuffle_seed is not None and shuffle_seed < 0:
        raise InvalidValueError(f"shuffle_seed must be >= 0, but is {shuffle_seed}.")
    if shards is not None:
        require_at_least("shards", shards, 1)
        if shards > MAX_SHARDS:
            raise InvalidValueError(f"shards must be at most {MAX_SHARDS:,}, not {shards:,}.")
    if shard is not None and not 0 <= shard < (shards or 0):
        raise InvalidValueError(f"shard must lie in [0, {shards or 0:,}), not {shard:,}.")
    if unlabeled and classes_from is not None:
        raise InvalidValueError(
            f"classes_from ({classes_from}) numbers classes, but the images shall have none. Leave "
            "one of them out (--classes-from, --no-labels)."
        )
    names = None if classes_from is None else _class_names_of(Path(classes_from))
    source = source_for(images, labels, unlabeled=unlabeled)
    if shuffle_seed is not None and isinstance(source, ParquetSource):
        raise InvalidValueError(
            "shuffle_seed cannot be used with Parquet files, which are read row group by row "
            "group. Convert in order; the loader shuffles."
        )

    def list_images() -> Listing:
        listing = source.list_images()
        return listing if names is None else renumbered(listing, names)

    job = Job(
        source, settings, on_error, shuffle_seed, num_workers, resume, keep_partial, unlabeled
    )
    if shards is None:
        if is_url(beton_path):
            raise InvalidValueError(
                f"shards must be at least 1 where the beton goes to {beton_path}: each shard is "
                "made on the local disk and uploaded."
            )
        return build_beton(job, Path(beton_path), list_images)
    if is_url(beton_path):
        store = Store(str(beton_path))
        listing = list_images()
        identity = _shard_settings(job, listing, shards)
        return upload_shards(
            store,
            partial(_make_shard, job, listing, identity),
            num_shards=shards,
            shard=shard,
            settings=identity,
            resume=resume,
        )
    return _convert_shards(job, Path(beton_path), list_images, shards, shard)


def _convert_shards(
    job: Job,
    folder: Path,
    list_images: Callable[[], Listing],
    num_shards: int,
    shard: int | None,
) -> Manifest:
    """Make the shards that are missing, or one of them; write the manifest when all are there."""
    if folder.exists() and not folder.is_dir():
        raise ConversionError(f"{folder} is a file. Name a folder for the shards.")
    if (folder / SET_NAME).exists() and not job.resume:
        raise ConversionError(
            f"{folder} holds a sharded beton already. Add --resume to keep the shards that are "
            "whole, remove the folder, or name another one."
        )
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise ConversionError(
            f"cannot make the folder {folder}: {os.strerror(error.errno or 0)}. Name one whose "
            "parent exists and that you may write to."
        ) from error
    listing = list_images()
    settings = _shard_settings(job, listing, num_shards)
    # Without resume, what is there of this shard (or of all) is made anew.
    todo = range(num_shards) if shard is None else [shard]
    if job.resume:
        missing = missing_shards(folder, num_shards, settings, refuse_others=True)
        todo = [index for index in todo if index in missing]
    manifest = None
    for index in todo:
        manifest = _make_shard(job, listing, settings, index, folder / shard_name(index))
    if not missing_shards(folder, num_shards, settings, refuse_others=False):
        return write_set(folder, num_shards, settings)
    if manifest is None:
        manifest = read_manifest(manifest_path(folder / shard_name(shard or 0)))
    return manifest


def _shard_settings(job: Job, listing: Listing, num_shards: int) -> dict[str, Any]:
    """Return what all shards of a conversion have in their settings."""
    if num_shards > len(listing):
        raise InvalidValueError(
            f"shards must be at most the number of images, {len(listing):,}, but is {num_shards:,}."
        )
    return {**job.choices, "shards": num_shards, "images": listing.identity}


def _make_shard(
    job: Job, listing: Listing, settings: dict[str, Any], index: int, path: Path
) -> Manifest:
    # Ranges of positions that differ in size by one at most, in the order of the rows.
    first, last = (at * len(listing) // settings["shards"] for at in (index, index + 1))
    return build_beton(
        job,
        path,
        lambda: listing,
        part=lambda order: order[first:last],
        shard={**settings, "shard": index},
    )


def _checked_settings(
    jpeg: str, quality: int, max_side: int | None, exif: str, verify: bool
) -> ImageSettings:
    require_one_of("jpeg", jpeg, LAYOUTS)
    require_one_of("exif", exif, ("ignore", "apply"))
    if not 1 <= quality <= 100:
        raise InvalidValueError(f"quality must lie in [1, 100], but is {quality}.")
    if max_side is not None and not 1 <= max_side <= MAX_SIDE:
        raise InvalidValueError(f"max_side must lie in [1, {MAX_SIDE:,}], but is {max_side:,}.")
    return ImageSettings(jpeg, quality, max_side, exif, verify)


def _checked_workers(workers: int | None) -> int:
    if workers is None:
        return min(usable_cpus(), _MOST_WORKERS)
    if not 1 <= workers <= _MOST_WORKERS_ASKED:
        raise InvalidValueError(
            f"workers must lie in [1, {_MOST_WORKERS_ASKED:,}], but is {workers:,}. More processes "
            "than CPUs only cost memory."
        )
    return workers


def _class_names_of(path: Path) -> tuple[str, ...]:
    """Return the class names in a beton's manifest, or a manifest, in the order of their labels."""
    manifest = read_manifest(path) if path.suffix == ".parquet" else open_beton(path).manifest
    if manifest is None or manifest.class_names is None:
        why = " (it has no manifest of its own)" if manifest is None else ""
        raise ArtifactError(
            f"{path}{why} has no class names, so it cannot number classes. Name a beton that was "
            "converted from folders or names of classes."
        )
    return manifest.class_names
