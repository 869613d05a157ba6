"""Images -> beton: JPEGs, copied or rewritten by supervised workers, in aligned places."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from fastprune import __version__
from fastprune.artifacts.atomic import destination, sync
from fastprune.beton import layout
from fastprune.beton.assembly import (
    Assembly,
    fill,
    frame_pages,
    manifest_lines,
    place,
    start_assembly,
)
from fastprune.beton.journal import Journal, intact_rows
from fastprune.beton.manifest import (
    Manifest,
    manifest_path,
    read_manifest,
    replace_pair,
    write_parquet,
)
from fastprune.beton.reader import open_beton
from fastprune.beton.sources import source_for
from fastprune.beton.sources.listing import renumbered
from fastprune.beton.sources.parquet import ParquetSource
from fastprune.beton.transcode import (
    ACTIONS,
    COPIED,
    LAYOUTS,
    REWRITTEN,
    SKIPPED,
    TRANSCODED,
    ImageSettings,
)
from fastprune.beton.workers import Task, WorkerError, WorkerPool
from fastprune.checks import require_one_of
from fastprune.cpus import usable_cpus
from fastprune.errors import ArtifactError, ConversionError, InvalidValueError
from fastprune.jpeg.headers import MAX_SIDE
from fastprune.progress import track

# More processes than this only wait for the disk; --workers may still ask for more.
_MOST_WORKERS = 16
_MOST_WORKERS_ASKED = 1024
_DONE = (COPIED, REWRITTEN, TRANSCODED, SKIPPED)


def convert(
    images: Any,
    beton_path: str | Path,
    *,
    labels: str | Path | None = None,
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
        labels: for a flat folder, a text file with a line "name class" per image.
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

    Returns:
        The manifest.

    Raises:
        InvalidValueError: a setting is outside its domain.
        ConversionError: an image or the folder cannot be read, a class is not in
            `classes_from`, the beton cannot be written, memory or file descriptors ran out, or a
            worker died. Nothing is left behind, unless a partial file was asked for.
        ArtifactError: `classes_from` cannot be read or has no class names of its own.
    """
    settings = _checked_settings(jpeg, quality, max_side, exif, verify)
    num_workers = _checked_workers(workers)
    require_one_of("on_error", on_error, ("stop", "skip"))
    if shuffle_seed is not None and shuffle_seed < 0:
        raise InvalidValueError(f"shuffle_seed must be >= 0, but is {shuffle_seed}.")
    names = None if classes_from is None else _class_names_of(Path(classes_from))
    path, partial = _destinations(Path(beton_path))
    source = source_for(images, labels)
    task = Task(source, settings, on_error == "skip", partial)
    with (
        Journal(_journal_path(partial)) as journal,
        # Forked before the images are listed: the list would be copied into every worker.
        WorkerPool(num_workers, task) as pool,
    ):
        listing = source.list_images()
        if names is not None:
            listing = renumbered(listing, names)
        if shuffle_seed is not None and isinstance(source, ParquetSource):
            raise InvalidValueError(
                "shuffle_seed cannot be used with Parquet files, which are read row group by row "
                "group. Convert in order; the loader shuffles."
            )
        assembly = start_assembly(listing, shuffle_seed, layout.DEFAULT_PAGE_BYTES)
        choices = {**asdict(settings), "on_error": on_error, "shuffle_seed": shuffle_seed}
        # What must be the same for a later run to resume the partial file of this one.
        identity = {
            "images": listing.identity,
            "settings": choices,
            "fastprune": __version__,
            "pillow": PIL.__version__,
        }
        try:
            _start_partial(assembly, partial, journal, identity, resume=resume)
            _fill(assembly, pool, journal, partial)
            manifest = _finish(assembly, partial, path, choices)
        except BaseException:
            manifest_path(partial).unlink(missing_ok=True)
            # What is framed took its time and is whole: only its name is missing.
            if not (keep_partial or resume or assembly.is_framed):
                partial.unlink(missing_ok=True)
                journal.remove()
            raise
        journal.remove()
    return manifest


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


def _destinations(path: Path) -> tuple[Path, Path]:
    """Return where the beton and its partial file are written, links followed."""
    try:
        path = destination(path)
        partial = path.with_name(f"{path.name}.partial")
        for other in (partial, _journal_path(partial), manifest_path(path)):
            destination(other)
    except ArtifactError as error:
        raise ConversionError(str(error)) from None
    if path.is_dir():
        raise ConversionError(f"{path} is a folder. Name a file, such as {path / 'train.beton'}.")
    return path, partial


def _journal_path(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.journal")


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


def _start_partial(
    assembly: Assembly, partial: Path, journal: Journal, identity: dict[str, Any], *, resume: bool
) -> None:
    """Start an empty partial file, or resume the intact part of an earlier one.

    Raises:
        ConversionError: the earlier run had other images or settings.
    """
    if resume:
        earlier, records, reasons = journal.read()
        if earlier is not None and partial.exists():
            for key, value in identity.items():
                if earlier.get(key) != value:
                    raise ConversionError(
                        f"{partial} cannot be resumed: its {key} were {earlier.get(key)}, and now "
                        f"are {value}. Repeat the command as it was, or start anew without "
                        "--resume."
                    )
            # Offsets follow from the sizes, so the journal need not hold them.
            cursor = replace(assembly.cursor)
            offsets = [
                -1 if record["action"] == SKIPPED else cursor.place(int(record["size"]))
                for record in records
            ]
            count = intact_rows(partial, records, offsets)
            place(assembly, records[:count], {at: why for at, why in reasons.items() if at < count})
    count = assembly.num_placed
    with _named_write_errors(partial):
        journal.start(identity)
        journal.add(assembly.records[:count], assembly.reasons)
        partial.touch()
        with partial.open("r+b") as file:
            # Zeros where the frame will be written, and nothing behind the last intact image.
            file.truncate(assembly.cursor.offset if count else 0)
            file.write(bytes(assembly.first_page))


def _fill(assembly: Assembly, pool: WorkerPool, journal: Journal, partial: Path) -> None:
    """Run the workers; name the image at which one failed."""
    total = len(assembly.listing)
    done = assembly.num_placed
    try:
        with _named_write_errors(partial):
            rows = (row for count in fill(assembly, pool, journal) for row in range(count))
            for _ in track(rows, description="convert", total=total - done, unit="images"):
                pass
    except WorkerError as error:
        if error.item is None:
            raise ConversionError(f"{error}.") from error
        where = assembly.listing.where(int(assembly.order[error.item]))
        raise ConversionError(f"{where}: {error}.") from error


def _finish(assembly: Assembly, partial: Path, path: Path, settings: dict[str, Any]) -> Manifest:
    """Frame the pages, write the manifest, and give both files their names, the beton last."""
    if not len(assembly.kept):
        where = assembly.listing.where(int(assembly.order[0]))
        raise ConversionError(
            f"none of the {len(assembly.listing):,} images could be read; the first is {where}: "
            f"{assembly.reasons[0]}."
        )
    with _named_write_errors(partial):
        fingerprint = frame_pages(assembly, partial)
    actions = np.bincount(assembly.records["action"], minlength=len(ACTIONS))
    manifest = Manifest(
        path=manifest_path(path),
        fingerprint=fingerprint,
        class_names=assembly.listing.class_names,
        counts={ACTIONS[action]: int(actions[action]) for action in _DONE},
        settings=settings,
    )
    unnamed = manifest_path(partial)
    kept = f" The images are kept in {partial}: repeat the command with --resume."
    with _named_write_errors(unnamed, kept):
        write_parquet(unnamed, manifest, manifest_lines(assembly))
        sync(unnamed)
    with _named_write_errors(manifest.path, kept):
        replace_pair(partial, unnamed, path)
    return manifest


@contextmanager
def _named_write_errors(path: Path, kept: str = "") -> Iterator[None]:
    """Turn an OSError into a ConversionError that names the file and the cure."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ConversionError(
            f"cannot write {path}: {reason}. Free some space, or name another folder, and run the "
            f"command again.{kept}"
        ) from error
