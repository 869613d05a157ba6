"""Open a beton from wherever it is: a file, a folder of shards, object storage, or a service."""

import os
import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastprune.base.errors import BetonError, ForeignManifestWarning, InvalidValueError, warn_user
from fastprune.base.provenance import structure_digest
from fastprune.beton import layout
from fastprune.beton.beton import Beton, BetonFile
from fastprune.beton.manifest import Manifest, manifest_of
from fastprune.beton.mapping import map_contiguously, map_file
from fastprune.beton.row_check import Placement, check_rows, label_faults
from fastprune.beton.shards import SET_NAME, Shard, read_set
from fastprune.beton.structure import Fault, Tables, read_tables

#: In a folder that mirrors a beton in object storage; see `remote.mirror`.
MIRROR_NAME = "mirror.json"

_URL = re.compile(r"([a-z][a-z0-9+.-]*)://.*", re.DOTALL)
_SERVICE_SCHEMES = ("grpc", "grpc+tls")


def is_url(location: object) -> bool:
    """Return whether a location is a URL and not a local path."""
    return isinstance(location, str) and _URL.match(location) is not None


def open_beton(
    source: str | Path,
    *,
    cache: str | Path | None = None,
    service: str | None = None,
    token: str | None = None,
) -> Beton:
    """Open a beton and check its structure: header, fields, metadata, allocation table.

    Reads any beton of format version 2, stock FFCV's too, that has an image field and an int field.
    The image is the field named "image", else the first image field; the label is the int field
    named "label", else the first int field. No image is decoded: `fastprune check --deep` does.

    Args:
        source: a file; a folder of shards; the URL of either in object storage
            ("s3://bucket/train/", gs://, file://); or of a beton at a loading service
            ("grpc+tls://HOST:PORT/NAME", docs/service.md).
        cache: a folder on a local disk, which gets the rows of a beton in object storage as they
            are asked for; required for these, refused for others.
        service: addresses of loading services that decode this beton's views, with commas between
            them; "" for none, None for FASTPRUNE_SERVICE of the environment.
        token: for services; None for FASTPRUNE_SERVICE_TOKEN of the environment.

    Raises:
        BetonError: the beton is missing, unfinished, cut or damaged, or some rows differ from its
            manifest; the text names the first fault.
        InvalidValueError: a URL in object storage without a cache, a cache or a service for a beton
            that cannot use it, or an unknown URL.
        StorageError: object storage does not give the beton's tables.
        LoadingError: no service at the URL has the beton.

    Warns:
        ForeignManifestWarning: the manifest is damaged or was made for another beton.
    """
    scheme = match[1] if isinstance(source, str) and (match := _URL.match(source)) else ""
    # Remote kinds are imported by name: a local file needs neither pyarrow.fs nor the service.
    if scheme in _SERVICE_SCHEMES:
        _refuse_cache(source, cache)
        if service:
            raise InvalidValueError(
                f"service={service!r} does not have {source}, which names its own. Leave out "
                "`service`."
            )
        served = import_module("fastprune.service.served_beton")
        beton: Beton = served.open_remote_beton(source, token)
        return replace(beton, token=token, reopen=partial(open_beton, source))
    if scheme:
        if cache is None:
            raise InvalidValueError(
                f"cache must be a folder on a local disk, which gets the rows of {source}."
            )
        cache = Path(cache).absolute()
        beton = import_module("fastprune.beton.remote.opening").open_mirrored(source, cache)
    else:
        _refuse_cache(source, cache)
        beton = open_files(Path(source))
        # Absolute, because a pickle may be opened from another working folder.
        source = Path(source).absolute()
    reopen = partial(open_beton, source, cache=cache, service=service)
    service = os.environ.get("FASTPRUNE_SERVICE", "") if service is None else service
    return replace(beton, service=service, token=token, reopen=reopen)


def _refuse_cache(source: str | Path, cache: str | Path | None) -> None:
    if cache is not None:
        raise InvalidValueError(
            f"cache is for betons in object storage, but {source} is not in one. Leave it out."
        )


def open_files(path: Path) -> Beton:
    """Open a local file or folder of shards; of a mirror, the marks of its rows too."""
    records = read_records(path)
    image, label = image_and_label(records.fields, path)
    columns = records.metadata[f"f{image}"]
    # Copied out of the records: strided reads of the mapping would touch every page of it.
    labels = np.ascontiguousarray(records.metadata[f"f{label}"])
    widths = np.ascontiguousarray(columns["width"])
    heights = np.ascontiguousarray(columns["height"])
    sizes = records.placements[image].sizes
    structure = structure_digest(labels, widths, heights)
    if faults := label_faults(labels):
        raise damaged(path, faults)
    known = {"label": labels, "width": widths, "height": heights, "bytes": sizes}
    manifest = records.manifest
    if manifest is not None:
        _require_listed_shards(manifest, records.shards, known, structure)
    else:
        manifest, faults = manifest_of(path, known, structure)
        # Images without a usable manifest can still be read; damaged rows cannot.
        for fault in [fault for fault in faults if fault.kind == "manifest"]:
            faults.remove(fault)
            warn_user(fault.message, ForeignManifestWarning)
        if faults:
            raise damaged(path, faults)
    beton = Beton(
        path=path,
        labels=labels,
        widths=widths,
        heights=heights,
        modes=np.ascontiguousarray(columns["mode"]),
        offsets=records.placements[image].offsets,
        sizes=sizes,
        fields=records.fields,
        page_bytes=records.page_bytes,
        content=records.content,
        files=records.files,
        structure=structure,
        manifest=manifest,
    )
    present = rows_present(path)
    if present is None:
        return beton
    files = tuple(replace(file, is_filled=True) for file in beton.files)
    return replace(beton, files=files, present=present)


def rows_present(path: Path) -> NDArray[np.bool_] | None:
    """Return which rows of a mirror are there, (N,) bool; None for any other beton.

    Raises:
        ArtifactError: the mirror's record or marks are damaged.
    """
    folder = path if path.is_dir() else path.parent
    if not (folder / MIRROR_NAME).exists():
        return None
    present: NDArray[np.bool_] | None
    # By name: other betons must not load pyarrow.fs.
    present = import_module("fastprune.beton.remote.mirror").marks_of(path)
    return present


@dataclass(frozen=True)
class Records:
    """The records of all rows of a beton, of one file or several.

    Attributes:
        page_bytes: the largest page size of the files.
        metadata: (N,) records; pointers in them are offsets in the row's file.
        placements: where the data of each field lies in `content`, by the field's index.
        manifest: of a sharded beton; a single file's is looked up by `manifest_of`.
        shards: of a sharded beton, as its manifest lists them.
    """

    fields: tuple[layout.Field, ...]
    page_bytes: int
    metadata: NDArray[np.void]
    placements: dict[int, Placement]
    content: NDArray[np.uint8]
    files: tuple[BetonFile, ...]
    manifest: Manifest | None = None
    shards: tuple[Shard, ...] = ()


def read_records(path: Path) -> Records:
    """Read the records of a beton, of one file or a folder of shards.

    Raises:
        BetonError: a file is missing, unfinished, cut or damaged, or the shards do not belong
            together.
    """
    if not path.is_dir():
        content, mapped = map_file(path)
        tables = read_tables(path, (content, mapped))
        return Records(
            tables.fields,
            tables.page_bytes,
            tables.metadata,
            _sound_placements(path, tables),
            content,
            (BetonFile(path.absolute(), 0, 0, mapped),),
        )
    manifest, shards = read_set(path)
    content, starts, statuses = map_contiguously([shard.path for shard in shards])
    files = tuple(
        BetonFile(shard.path.absolute(), shard.first_row, start, mapped)
        for shard, start, mapped in zip(shards, starts, statuses, strict=True)
    )
    parts = [
        read_tables(file.path, (content[file.start :][: file.num_bytes], file.mapped))
        for file in files
    ]
    # Before anything is concatenated: records of other fields have another dtype.
    for shard, tables in zip(shards, parts, strict=True):
        if tables.fields != parts[0].fields:
            raise _foreign(shard, "it has other fields than the first shard")
        if len(tables.metadata) != shard.fingerprint.num_rows:
            raise _foreign(shard, f"it has {len(tables.metadata):,} rows")
    found = [_sound_placements(file.path, part) for file, part in zip(files, parts, strict=True)]
    # Offsets in the files become offsets in the one content.
    placements = {
        index: Placement(
            np.concatenate(
                [at[index].offsets + file.start for at, file in zip(found, files, strict=True)]
            ),
            np.concatenate([at[index].sizes for at in found]),
        )
        for index in found[0]
    }
    return Records(
        parts[0].fields,
        max(tables.page_bytes for tables in parts),
        np.concatenate([tables.metadata for tables in parts]),
        placements,
        content,
        files,
        manifest,
        tuple(shards),
    )


def _sound_placements(path: Path, tables: Tables) -> dict[int, Placement]:
    placements, faults = check_rows(tables)
    if faults:
        raise damaged(path, faults)
    return placements


def damaged(path: Path, faults: list[Fault]) -> BetonError:
    """Describe a beton by its first fault."""
    more = f", and {len(faults) - 1:,} more faults" if len(faults) > 1 else ""
    return BetonError(
        f"{path} is damaged: {faults[0]}{more}. See all: fastprune check {path}; then convert "
        "the images again or get a whole copy of the file."
    )


def _require_listed_shards(
    manifest: Manifest,
    shards: tuple[Shard, ...],
    columns: dict[str, NDArray[Any]],
    structure: str,
) -> None:
    """Refuse shards that are not the ones that manifest.json lists, in their order."""
    listed = Counter(shard.fingerprint.structure for shard in shards)
    # One digest over all rows shows that every shard is right. Only if it differs, the culprit is
    # looked for. Shards of one class and one size share a structure, so their own manifests must
    # tell them apart.
    is_whole = structure == manifest.fingerprint.structure
    for shard in shards:
        if is_whole and listed[shard.fingerprint.structure] == 1:
            continue
        rows = slice(shard.first_row, shard.first_row + shard.fingerprint.num_rows)
        own = {name: values[rows] for name, values in columns.items()}
        own_structure = structure_digest(own["label"], own["width"], own["height"])
        own_manifest, faults = manifest_of(shard.path, own, own_structure)
        if faults := [fault for fault in faults if fault.kind != "manifest"]:
            raise damaged(shard.path, faults)
        if own_structure != shard.fingerprint.structure:
            raise _foreign(shard, "its labels or sizes are others")
        if own_manifest is not None and own_manifest.fingerprint != shard.fingerprint:
            raise _foreign(shard, f"it is {own_manifest.fingerprint}")
    if not is_whole:
        raise BetonError(
            f"{manifest.path} does not list the shards in the order of their rows. Remove it, and "
            "make it again: fastprune convert IMAGES FOLDER --shards N --resume"
        )


def _foreign(shard: Shard, why: str) -> BetonError:
    return BetonError(
        f"{shard.path} is not the shard {shard.fingerprint} that {SET_NAME} lists: {why}. It was "
        "mixed up with another one, or is of another conversion: get the right one."
    )


def image_and_label(fields: tuple[layout.Field, ...], path: Path) -> tuple[int, int]:
    """Return the indices of the image field and the label field.

    Raises:
        BetonError: such a field is missing.
    """
    return _pick(fields, "image", "image", path), _pick(fields, "label", "int", path)


def _pick(fields: tuple[layout.Field, ...], name: str, kind: str, path: Path) -> int:
    """Return the field of that kind and name, or else the first of that kind."""
    candidates = [index for index, field in enumerate(fields) if field.kind == kind]
    if not candidates:
        have = ", ".join(f"{field.name} ({field.kind})" for field in fields)
        raise BetonError(
            f"{path} has no {kind} field for the {name}; its fields are {have}. Write it again "
            f"with one: fastprune convert IMAGES {path}"
        )
    named = [index for index in candidates if fields[index].name == name]
    return (named or candidates)[0]
