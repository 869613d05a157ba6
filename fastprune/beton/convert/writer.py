"""Images -> beton: checks what was asked for, lists the images, and has the beton built."""

from pathlib import Path
from typing import Any

from fastprune.base.cpus import usable_cpus
from fastprune.base.errors import ArtifactError, InvalidValueError
from fastprune.beton.convert.build import Job, build_beton
from fastprune.beton.convert.cluster import RayAddress
from fastprune.beton.convert.listing import renumbered
from fastprune.beton.convert.parquet import ParquetSource
from fastprune.beton.convert.shards import convert_shards
from fastprune.beton.convert.sources import source_for
from fastprune.beton.manifest import Manifest, read_manifest
from fastprune.beton.opening import is_url, open_beton
from fastprune.settings import ConvertSettings, takes_settings

# More threads than this only wait for the disk, unless they are asked for.
_MOST_WORKERS = 16


@takes_settings(ConvertSettings)
def convert(
    images: Any, beton_path: str | Path, *, ray: RayAddress = None, settings: ConvertSettings
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
        ray: make the shards by tasks of a Ray cluster, each with `workers` CPUs, 1 by default:
            True for the cluster that RAY_ADDRESS names, or one on this machine for the time being;
            or an address. All nodes must see the images, and the folder unless it is a URL.
        settings: the fields of `ConvertSettings`, as keywords.

    Returns:
        The manifest; of a sharded beton that is not whole yet, the one of the last shard made. One
        that was uploaded has no lines here.

    Raises:
        InvalidValueError: a setting is outside its domain.
        ConversionError: an image or the folder cannot be read, a class is not in
            `classes_from`, the beton cannot be written, or memory or file descriptors ran out.
            Nothing is left behind, unless a partial file was asked for.
        ArtifactError: `classes_from` cannot be read or has no class names of its own.
        StorageError: the URL cannot be written.
        MissingDependencyError: Ray is not installed.
        ClusterError: the cluster cannot be reached, or a task died too often.
    """
    # A task of Ray has one CPU, unless more are asked for.
    default = min(usable_cpus(), _MOST_WORKERS) if ray is None else 1
    labels: str | Path | None = settings.labels
    if ray is not None:
        if settings.shards is None:
            raise InvalidValueError("ray needs shards: a task makes a shard. Add --shards.")
        images, beton_path = _absolute(images), _absolute(beton_path)
        labels = None if labels is None else _absolute(labels)
    names = None if settings.classes_from is None else _class_names_of(settings.classes_from)
    source = source_for(images, labels, unlabeled=settings.unlabeled)
    if settings.shuffle_seed is not None and isinstance(source, ParquetSource):
        raise InvalidValueError(
            "shuffle_seed cannot be used with Parquet files, which are read row group by row "
            "group. Convert in order; the loader shuffles."
        )

    if settings.shards is None and is_url(beton_path):
        raise InvalidValueError(
            f"shards must be at least 1 where the beton goes to {beton_path}: each shard is "
            "made on the local disk and uploaded."
        )
    listing = source.list_images()
    if names is not None:
        listing = renumbered(listing, names)
    job = Job(source, settings, settings.workers or default)
    if settings.shards is not None:
        return convert_shards(
            job, beton_path, listing, settings.shards, shard=settings.shard, ray=ray
        )
    return build_beton(job, Path(beton_path), listing)


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
