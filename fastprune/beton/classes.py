"""Classes numbered as in another beton, whatever classes a folder lacks."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from fastprune.beton.manifest import read_manifest
from fastprune.beton.reader import open_beton
from fastprune.beton.sources import Listing
from fastprune.errors import ArtifactError, ConversionError, InvalidValueError


def class_names_of(path: str | Path) -> tuple[str, ...]:
    """The class names in a beton's manifest, in the order of their numbers.

    Args:
        path: a beton with its manifest beside it, or a manifest.

    Raises:
        ArtifactError: there is no manifest of that beton, or it has no class names.

    Warns:
        ForeignManifestWarning: the manifest is damaged or was made for another beton.
    """
    path = Path(path)
    manifest = read_manifest(path) if path.suffix == ".parquet" else open_beton(path).manifest
    if manifest is None or manifest.class_names is None:
        why = " (it has no manifest of its own)" if manifest is None else ""
        raise ArtifactError(
            f"{path}{why} tells no class names, so it cannot number classes. Name a beton that was "
            "converted from folders or names of classes."
        )
    return manifest.class_names


def renumbered(listing: Listing, names: tuple[str, ...]) -> Listing:
    """The same images, their classes numbered by the position of their names in `names`.

    Raises:
        InvalidValueError: the images' classes have no names, or are not known before reading.
        ConversionError: a class is not among the names, or a label is no class.
    """
    if listing.labels is None:
        raise InvalidValueError(
            f"classes_from needs labels that are known before images are read, but {listing.root} "
            "is a dataset, which tells them with its images. Number them there, and leave it out."
        )
    if listing.class_names is None:
        raise InvalidValueError(
            f"classes_from numbers named classes, but {listing.root} has numbers. Leave it out."
        )
    numbers = {name: number for number, name in enumerate(names)}
    unknown = [name for name in listing.class_names if name not in numbers]
    if unknown:
        raise ConversionError(
            f"{listing.root} has the class {unknown[0]} (and {len(unknown) - 1:,} more) that "
            f"classes_from does not name among its {len(names):,}. Name the beton of the same "
            "classes, or leave it out."
        )
    outside = (listing.labels < 0) | (listing.labels >= len(listing.class_names))
    if outside.any():
        first = int(outside.argmax())
        raise ConversionError(
            f"{listing.where(first)}: its label is {listing.labels[first]:,}, but labels must lie "
            f"in [0, {len(listing.class_names):,}). Name images that have classes, or leave "
            "classes_from out."
        )
    lookup = np.array([numbers[name] for name in listing.class_names], np.int64)
    digest = hashlib.blake2b(repr((listing.identity, names)).encode(), digest_size=16)
    return replace(
        listing,
        labels=lookup[listing.labels],
        class_names=names,
        identity=digest.hexdigest(),
    )
