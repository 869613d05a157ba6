"""Is a beton whole? The structure always, every image and checksum on request."""

from dataclasses import dataclass, replace
from pathlib import Path

from fastprune.artifacts.fingerprint import Fingerprint, structure_digest
from fastprune.artifacts.subset import Subset, checked_rows
from fastprune.beton.decode_check import image_faults
from fastprune.beton.manifest import Manifest, manifest_path, read_manifest
from fastprune.beton.reader import image_and_label
from fastprune.beton.row_check import check_rows
from fastprune.beton.structure import Fault, UnreadableBetonError, read_tables
from fastprune.errors import ArtifactError, BetonError, FastpruneError


def check_beton(
    path: str | Path, *, deep: bool = False, subset: str | Path | None = None
) -> list[Fault]:
    """Find everything that is wrong with a beton.

    The structure is checked always: header, fields, metadata, allocation table, and whether the
    manifest beside the file belongs to it.

    Args:
        path: the beton, ours or stock FFCV's.
        deep: also decode every image and compare it with its metadata and, where there is a
            manifest, with its CRC-32C. A flipped bit in a JPEG often decodes without complaint, so
            only the CRC finds it.
        subset: a subset's file, to be checked against the beton.

    Returns:
        The faults, named by row and source file; empty when the beton is whole.

    Raises:
        BetonError: the file cannot be opened. Damaged content is never raised but returned.
    """
    path = Path(path)
    try:
        tables = read_tables(path)
    except UnreadableBetonError as error:
        return [error.fault]
    placements, faults = check_rows(tables)
    try:
        image, label = image_and_label(tables.fields, path)
    except BetonError as error:
        return [*faults, Fault("fields", str(error))]
    columns, labels = tables.metadata[f"f{image}"], tables.metadata[f"f{label}"]
    structure = structure_digest(labels, columns["width"], columns["height"])
    manifest = own_manifest(path, structure)
    rows_at_fault = any(fault.row is not None for fault in faults)
    lines = _lines(manifest) if deep or rows_at_fault else None
    faults += [found for found in (manifest, lines) if isinstance(found, Fault)]
    if deep:
        crcs = lines.crcs if isinstance(lines, _Lines) else None
        faults += image_faults(tables, image, placements[image], crcs)
    if subset is not None:
        content = manifest.fingerprint.content if isinstance(manifest, Manifest) else None
        beton = Fingerprint(len(labels), structure, content)
        faults += _subset_faults(Path(subset), path, beton)
    if isinstance(lines, _Lines):
        return [
            fault if fault.row is None else replace(fault, source=lines.sources.get(fault.row))
            for fault in faults
        ]
    return faults


def own_manifest(path: Path, structure: str) -> Manifest | Fault | None:
    """The manifest beside a beton, a fault if it is not its own, None where there is none."""
    beside = manifest_path(path)
    if not beside.exists():
        return None
    try:
        manifest = read_manifest(beside)
    except ArtifactError as error:
        return Fault("manifest", str(error))
    if manifest.fingerprint.structure != structure:
        return Fault(
            "manifest",
            f"{beside} was made for another beton: its structure is "
            f"{manifest.fingerprint.structure}, this one's is {structure}. Remove it, or make it "
            f"again: fastprune check {path} --deep --write-manifest",
        )
    return manifest


@dataclass(frozen=True)
class _Lines:
    """What the manifest's lines tell of each row."""

    sources: dict[int, str]
    crcs: dict[int, int]


def _lines(manifest: Manifest | Fault | None) -> _Lines | Fault | None:
    """Read the manifest's lines; a fault if they cannot be read."""
    if not isinstance(manifest, Manifest):
        return None
    try:
        table = manifest.table(["row", "source", "stored_crc32c"])
    except ArtifactError as error:
        return Fault("manifest", str(error))
    rows, sources, crcs = (column.to_pylist() for column in table.columns)
    return _Lines(dict(zip(rows, sources, strict=True)), dict(zip(rows, crcs, strict=True)))


def _subset_faults(subset_path: Path, path: Path, beton: Fingerprint) -> list[Fault]:
    """What keeps a subset from indexing this beton."""
    try:
        subset = Subset.load(subset_path)
        checked_rows(subset.rows, name=str(subset_path), num_rows=beton.num_rows)
    except FastpruneError as error:
        return [Fault("subset", str(error))]
    made_for = subset.fingerprint
    if made_for is None:
        return []
    both_known = beton.content is not None and made_for.content is not None
    same = (
        made_for.content == beton.content if both_known else made_for.structure == beton.structure
    )
    if same:
        return []
    return [
        Fault(
            "subset",
            f"{subset_path} was made from beton {made_for}, but {path} is {beton}. Make a subset "
            f"for this beton: fastprune score {path} ... && fastprune select ...",
        )
    ]
