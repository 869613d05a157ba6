"""Images -> beton: JPEGs, copied or rewritten by supervised workers, in aligned places."""

from pathlib import Path
from typing import Any

from fastprune.base.checks import require_at_least, require_one_of
from fastprune.base.cpus import usable_cpus
from fastprune.base.errors import ArtifactError, InvalidValueError
from fastprune.beton.convert.build import Job, build_beton
from fastprune.beton.convert.cluster import RayAddress
from fastprune.beton.convert.sharded import convert_shards
from fastprune.beton.convert.sources import source_for
from fastprune.beton.convert.sources.listing import Listing, renumbered
from fastprune.beton.convert.sources.parquet import ParquetSource
from fastprune.beton.convert.transcode import LAYOUTS, ImageSettings
from fastprune.beton.manifest import Manifest, read_manifest
from fastprune.beton.opening import is_url, open_beton
from fastprune.beton.shards import MAX_SHARDS
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
    ray: RayAddress = None,
) -> Manifest:
    """Write a beton and its manifest; JPEGs keep their coefficients, copied or rewritten.

    The same images and settings give the same bytes, whatever the number of workers and however
    often the conversion was interrupted and resumed. While it is being written the beton is called
    `<beton_path>.partial`; it gets its name, and the manifest its own, when both are on the disk.

    Args:
        images: the root of an ImageFolder tree; a folder of WebDataset tars (jpg and cls) or of
            Hugging Face style Parquet files, a single such file or a pattern of them; with
            `labels`, a flat folder of images; a URL of any of them; or an indexable dataset
            whose samples are (image, label) or {"image": ..., "label": ...}, an image being a PIL
            image, uint8 pixels (height, width, 3) or (height, width), or the bytes of an image
            file.
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
        ray: make the shards by tasks of a Ray cluster, each with `workers` CPUs, 1 by default:
            True for the cluster that RAY_ADDRESS names, or one on this machine for the time being;
            or an address. All nodes must see the images, and the folder unless it is a URL.

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
        MissingDependencyError: Ray is not installed.
        ClusterError: the cluster cannot be reached, or a task died too often.
    """
    settings = _checked_settings(jpeg, quality, max_side, exif, verify)
    num_workers = _checked_workers(1 if workers is None and ray is not None else workers)
    require_one_of("on_error", on_error, ("stop", "skip"))
    if shuffle_seed is not None and shuffle_seed < 0:
        raise InvalidValueError(f"shuffle_seed must be >= 0, but is {shuffle_seed}.")
    if shards is not None:
        require_at_least("shards", shards, 1)
        if shards > MAX_SHARDS:
            raise InvalidValueError(f"shards must be at most {MAX_SHARDS:,}, not {shards:,}.")
    if shard is not None and not 0 <= shard < (shards or 0):
        raise InvalidValueError(f"shard must lie in [0, {shards or 0:,}), not {shard:,}.")
    if ray is not None:
        if shards is None:
            raise InvalidValueError("ray needs shards: a task makes a shard. Add --shards.")
        images, beton_path = _absolute(images), _absolute(beton_path)
        labels = None if labels is None else _absolute(labels)
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
    if shards is not None:
        return convert_shards(job, beton_path, list_images, shards, shard=shard, ray=ray)
    if is_url(beton_path):
        raise InvalidValueError(
            f"shards must be at least 1 where the beton goes to {beton_path}: each shard is "
            "made on the local disk and uploaded."
        )
    return build_beton(job, Path(beton_path), list_images)


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


def _absolute(location: Any) -> Any:
    """Return a path as a task finds it, whose working folder is another; all else as it is."""
    is_path = isinstance(location, str | Path) and not is_url(location)
    return Path(location).absolute() if is_path else location


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
