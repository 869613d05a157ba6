"""One beton, from a listing to its final name: a partial file, its journal, and the frame."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from fastprune import __version__
from fastprune.base.errors import ArtifactError, ConversionError
from fastprune.base.files import destination, sync
from fastprune.base.progress import track
from fastprune.beton import layout
from fastprune.beton.convert.assembly import (
    Assembly,
    frame_pages,
    manifest_lines,
    place,
    row_order,
    start_assembly,
)
from fastprune.beton.convert.journal import AtWork, Journal, crashed_at, intact_rows
from fastprune.beton.convert.listing import Listing, Source
from fastprune.beton.convert.stages import fill
from fastprune.beton.convert.transcode import (
    ACTIONS,
    COPIED,
    REWRITTEN,
    SKIPPED,
    TRANSCODED,
)
from fastprune.beton.manifest import Manifest, manifest_path, replace_pair, write_parquet
from fastprune.settings import ConvertSettings, ImageSettings

_log = logging.getLogger(__name__)

_DONE = (COPIED, REWRITTEN, TRANSCODED, SKIPPED)


@dataclass(frozen=True)
class Job:
    """What all betons of a conversion share."""

    source: Source
    settings: ConvertSettings
    num_threads: int

    @property
    def choices(self) -> dict[str, Any]:
        """The settings that determine a beton's bytes."""
        settings = self.settings
        own = {"on_error": settings.on_error, "shuffle_seed": settings.shuffle_seed}
        labels = {"labels": False} if settings.unlabeled else {}
        return {**settings.model_dump(include=set(ImageSettings.model_fields)), **own, **labels}


def build_beton(
    job: Job, path: Path, listing: Listing, *, shard: dict[str, Any] | None = None
) -> Manifest:
    """Write one beton and its manifest.

    Args:
        job: the settings.
        path: of the beton.
        listing: the images; of a shard, in the order of their rows.
        shard: the manifest's settings of a shard; None for a whole beton.

    Raises:
        ConversionError: as `convert`.
    """
    path, partial = _destinations(path)
    with Journal(_journal_path(partial)) as journal:
        order = row_order(len(listing), job.settings.shuffle_seed if shard is None else None)
        assembly = start_assembly(listing, order, layout.DEFAULT_PAGE_BYTES)
        choices = {**job.choices, **(shard or {})}
        # A later run can resume this one's partial file only if all of this is equal.
        identity = {
            "images": listing.identity,
            "settings": choices,
            "fastprune": __version__,
            "pillow": PIL.__version__,
        }
        try:
            _start_partial(assembly, partial, journal, identity, resume=job.settings.resume)
            _fill(assembly, job, partial, journal)
            manifest = _finish(assembly, partial, path, choices)
        except BaseException:
            manifest_path(partial).unlink(missing_ok=True)
            # A framed file is complete but for its name, and took a long time to make.
            if not (job.settings.keep_partial or job.settings.resume or assembly.is_framed):
                partial.unlink(missing_ok=True)
                journal.remove()
            raise
        journal.remove()
    return manifest


def _destinations(path: Path) -> tuple[Path, Path]:
    """Return where the beton and its partial file are written, links followed."""
    try:
        path = destination(path)
        partial = path.with_name(f"{path.name}.partial")
        for other in (partial, _journal_path(partial), _at_work_path(partial), manifest_path(path)):
            destination(other)
    except ArtifactError as error:
        raise ConversionError(str(error)) from None
    if path.is_dir():
        raise ConversionError(f"{path} is a folder. Name a file, such as {path / 'train.beton'}.")
    return path, partial


def discard_partial(path: Path) -> None:
    """Remove the files that a killed conversion left of a beton."""
    partial = path.with_name(f"{path.name}.partial")
    leftovers = (partial, manifest_path(partial), _at_work_path(partial), _journal_path(partial))
    if any(leftover.exists() for leftover in leftovers):
        with suppress(ConversionError), Journal(_journal_path(partial)):
            for leftover in leftovers:
                leftover.unlink(missing_ok=True)


def _journal_path(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.journal")


def _at_work_path(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.at_work")


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
                        f"are {value}. Repeat the command as it was, or start over without "
                        "--resume."
                    )
            _warn_of_crash(assembly, partial)
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
            # Zeros where the frame will be written, and nothing after the last intact image.
            file.truncate(assembly.cursor.offset if count else 0)
            file.write(bytes(assembly.first_page))


def _warn_of_crash(assembly: Assembly, partial: Path) -> None:
    """Name the images that the earlier run was working on when its process ended."""
    positions = sorted(set(crashed_at(_at_work_path(partial))))
    images = [int(assembly.order[at]) for at in positions if at < len(assembly.order)]
    if images:
        _log.warning(
            "the run before this one was killed or crashed while it was working on %s. If this one "
            "crashes there too, remove the image: a library cannot read it",
            " and ".join(assembly.listing.where(image) for image in images),
        )


def _fill(assembly: Assembly, job: Job, partial: Path, journal: Journal) -> None:
    """Prepare and write the images that are missing."""
    missing = len(assembly.order) - assembly.num_placed
    with _named_write_errors(partial), warnings.catch_warnings():
        # Pillow warns of large images and odd metadata; what it cannot read it refuses.
        warnings.simplefilter("ignore")
        with closing(AtWork(_at_work_path(partial), job.num_threads)) as at_work:
            counts = fill(
                assembly,
                job.source.reader,
                job.settings,
                partial,
                journal,
                num_threads=job.num_threads,
                skip_errors=job.settings.on_error == "skip",
                at_work=at_work,
            )
            # Closed before `at_work`, so that no thread is left to use it.
            with closing(counts):
                rows = (row for count in counts for row in range(count))
                for _ in track(rows, description="convert", total=missing, unit="images"):
                    pass


def _finish(assembly: Assembly, partial: Path, path: Path, settings: dict[str, Any]) -> Manifest:
    """Frame the pages, write the manifest, and give both files their names, the beton last."""
    if not len(assembly.kept):
        where = assembly.listing.where(int(assembly.order[0]))
        raise ConversionError(
            f"none of the {len(assembly.order):,} images could be read; the first is {where}: "
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
