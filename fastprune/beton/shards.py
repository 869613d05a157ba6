"""A sharded beton: a folder of betons and one manifest.json, which is written last."""

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import AfterValidator, model_validator

from fastprune.base.errors import ArtifactError, BetonError
from fastprune.base.files import write_text
from fastprune.base.headers import Header, read_header
from fastprune.base.provenance import Fingerprint, content_digest, structure_digest
from fastprune.beton.manifest import (
    Manifest,
    ManifestHeader,
    Part,
    manifest_path,
    read_manifest,
)

# Its presence means that all shards are whole, so it is written when nothing else is missing.
SET_NAME = "manifest.json"

_SHARD_NAME = re.compile(r"shard-\d+\.beton", re.ASCII)


def _shard_file(name: str) -> str:
    # Other names could leave the folder, or replace something else in it.
    if not _SHARD_NAME.fullmatch(name):
        raise ValueError(f"is {name!r}, which is not a shard's name")
    return name


class ListedShard(Header):
    """An entry of manifest.json."""

    file: Annotated[str, AfterValidator(_shard_file)]
    fingerprint: Fingerprint


class SetHeader(ManifestHeader):
    """The content of manifest.json; the shards are in the order of their rows."""

    format: Literal[1] = 1
    shards: tuple[ListedShard, ...]

    @model_validator(mode="after")
    def _require_sum(self) -> Self:
        num_rows = sum(shard.fingerprint.num_rows for shard in self.shards)
        if num_rows != self.fingerprint.num_rows:
            raise ValueError(
                f"its shards have {num_rows:,} rows, but the whole {self.fingerprint.num_rows:,}"
            )
        return self


@dataclass(frozen=True)
class Shard:
    """One shard as manifest.json lists it; its row 0 is row `first_row` of the set."""

    path: Path
    first_row: int
    fingerprint: Fingerprint


def shard_name(index: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{index:05d}.beton"


def read_set(folder: Path) -> tuple[Manifest, list[Shard]]:
    """Read manifest.json, and make sure that the folder has its shards; they are not opened.

    Returns:
        The manifest of the whole, which reads its lines from the shards' manifests, and the shards
        in the order of their rows.

    Raises:
        BetonError: it is missing or damaged, lists a missing shard or one twice, or does not list a
            shard that is there.
    """
    manifest, shards = read_listing(folder)
    # Only names are compared here; whoever opens the shards compares their content.
    _require_these_files(folder, shards)
    return manifest, shards


def read_listing(folder: Path) -> tuple[Manifest, list[Shard]]:
    """Read manifest.json alone; see `read_set`."""
    path = folder / SET_NAME
    if not path.exists():
        raise BetonError(_why_unfinished(folder))
    cure = f"Remove it, and make it again: fastprune convert IMAGES {folder} --shards N --resume"
    header = read_header(path, SetHeader, cure=cure, error=BetonError)
    shards, first_row = [], 0
    for listed in header.shards:
        shards.append(Shard(folder / listed.file, first_row, listed.fingerprint))
        first_row += listed.fingerprint.num_rows
    known = {name: getattr(header, name) for name in ManifestHeader.model_fields}
    parts = tuple(Part(manifest_path(shard.path), shard.first_row) for shard in shards)
    return Manifest(path, **known, parts=parts), shards


def _require_these_files(folder: Path, shards: list[Shard]) -> None:
    """Refuse a folder that does not hold each listed shard once, and no other."""
    listed = Counter(shard.path.name for shard in shards)
    present = {path.name for path in folder.glob("shard-*.beton")}
    name, count = listed.most_common(1)[0] if listed else ("", 0)
    if count != 1:
        raise BetonError(
            f"{folder / SET_NAME} lists "
            + (f"{name} {count} times" if count else "no shards")
            + f". Remove it, and make it again: fastprune convert IMAGES {folder} --shards N "
            "--resume"
        )
    if missing := sorted(listed.keys() - present):
        raise BetonError(
            f"{folder / missing[0]} is missing (with {len(missing) - 1:,} others of "
            f"{len(listed):,} shards). Copy it here, or make it again: fastprune convert IMAGES "
            f"{folder} --shards {len(listed)} --resume"
        )
    if foreign := sorted(present - listed.keys()):
        raise BetonError(
            f"{folder / foreign[0]} is not among the {len(listed):,} shards that {SET_NAME} lists. "
            "It is of another conversion, perhaps: move it away."
        )


def _why_unfinished(folder: Path) -> str:
    count = len(list(folder.glob("shard-*.beton")))
    if not count:
        return (
            f"{folder} is a folder without shards. Name a beton file, or make a sharded beton: "
            f"fastprune convert IMAGES {folder} --shards N"
        )
    return (
        f"{folder} is unfinished: it holds {count:,} shards, but no {SET_NAME}, which is written "
        f"when all are there. Make the others: fastprune convert IMAGES {folder} --shards N "
        "--resume"
    )


def missing_shards(
    folder: Path, num_shards: int, job: dict[str, Any], *, refuse_others: bool
) -> list[int]:
    """Find the shards that are not there yet.

    Args:
        folder: of the sharded beton.
        num_shards: of the whole.
        job: the settings that all shards of one conversion share.
        refuse_others: raise for a shard of another conversion; else it counts as missing, because
            the tasks of an array replace shards one by one.

    Raises:
        BetonError: a shard of another conversion is there.
    """
    missing = []
    for index in range(num_shards):
        path = folder / shard_name(index)
        if not path.exists():
            missing.append(index)
            continue
        try:
            settings = read_manifest(manifest_path(path)).settings
        except ArtifactError:
            settings = {}  # equal to no job: the shard is treated as another conversion's
        if settings == {**job, "shard": index}:
            continue
        if refuse_others:
            raise BetonError(
                f"{path} was made from other images or with other settings. Remove it, or name "
                "another folder."
            )
        missing.append(index)
    return missing


def write_set(folder: Path, num_shards: int, job: dict[str, Any]) -> Manifest:
    """Write manifest.json for shards that are all there.

    Every process writes the same bytes, so several may at once.

    Raises:
        ArtifactError: a shard's manifest cannot be read, or the file cannot be written.
    """
    manifests = [read_manifest(manifest_path(folder / shard_name(i))) for i in range(num_shards)]
    columns: dict[str, list[Any]] = {"label": [], "width": [], "height": [], "source_crc32c": []}
    counts: Counter[str] = Counter()
    for manifest in manifests:
        table = manifest.table(["row", *columns])
        # Skipped images have a line, but no row; digests are over rows.
        table = table.filter(table["row"].is_valid())
        for name, values in columns.items():
            values.append(table[name].to_numpy())
        counts.update(manifest.counts)
    whole = {name: np.concatenate(values) for name, values in columns.items()}
    structure = structure_digest(whole["label"], whole["width"], whole["height"])
    content = content_digest(whole["source_crc32c"])
    header = SetHeader(
        fingerprint=Fingerprint(len(whole["label"]), structure, content),
        class_names=manifests[0].class_names,
        counts={name: counts[name] for name in manifests[0].counts},
        settings=job,
        version=manifests[0].version,
        shards=tuple(
            ListedShard(file=shard_name(index), fingerprint=manifest.fingerprint)
            for index, manifest in enumerate(manifests)
        ),
    )
    record = {"format": header.format, **header.model_dump(mode="json")}
    write_text(folder / SET_NAME, json.dumps(record, indent=1) + "\n")
    return read_listing(folder)[0]
