"""One beton, from a listing to its name: a partial file, its journal, workers, and the frame."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
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
    fill,
    frame_pages,
    locations,
    manifest_lines,
    place,
    row_order,
    start_assembly,
)
from fastprune.beton.convert.journal import Journal, intact_rows
from fastprune.beton.convert.sources.bucket import fetched_ahead
from fastprune.beton.convert.sources.listing import FetchedSource, Listing, Source
from fastprune.beton.convert.transcode import (
    ACTIONS,
    COPIED,
    REWRITTEN,
    SKIPPED,
    TRANSCODED,
)
from fastprune.beton.convert.workers import Task, WorkerError, WorkerPool
from fastprune.beton.manifest import Manifest, manifest_path, replace_pair, write_parquet
from fastprune.settings import ImageSettings

_DONE = (COPIED, REWRITTEN, TRANSCODED, SKIPPED)


@dataclass(frozen=True)
class Job:
    """What all betons of a conversion have in common.

    Attributes:
        source: of the images.
        settings: what is done to them.
        on_error: "stop" or "skip".
        shuffle_seed: of the order; None for the listing's.
        num_workers: processes.
        resume: whether partial files are continued.
        keep_partial: whether a partial file is left when the conversion fails.
        unlabeled: whether the images have no classes; their labels are 0 then.
    """

    source: Source
    settings: ImageSettings
    on_error: str
    shuffle_seed: int | None
    num_workers: int
    resume: bool
    keep_partial: bool
    unlabeled: bool = False

    @property
    def choices(self) -> dict[str, Any]:
        """The settings that determine a beton's bytes."""
        own: dict[str, Any] = {"on_error": self.on_error, "shuffle_seed": self.shuffle_seed}
        if self.unlabeled:
            own["labels"] = False
        return {**self.settings.model_dump(include=set(ImageSettings.model_fields)), **own}


def build_beton(
    job: Job,
    path: Path,
    list_images: Callable[[], Listing],
    *,
    shard: dict[str, Any] | None = None,
) -> Manifest:
    """Write one beton and its manifest.

    Args:
        job: the settings.
        path: of the beton.
        list_images: lists the images, when the workers are started; those of a shard in the order
            of their rows.
        shard: what the manifest's settings say of the shard; None for a beton that is the whole.

    Returns:
        The manifest.

    Raises:
        ConversionError: as `convert`.
    """
    path, partial = _destinations(path)
    task = Task(job.source, job.settings, job.on_error == "skip", partial)
    with (
        Journal(_journal_path(partial)) as journal,
        # Forked before the images are listed: the list would be copied into every worker.
        WorkerPool(job.num_workers, task) as pool,
    ):
        listing = list_images()
        order = row_order(len(listing), job.shuffle_seed if shard is None else None)
        assembly = start_assembly(listing, order, layout.DEFAULT_PAGE_BYTES)
        choices = {**job.choices, **(shard or {})}
        # What must be the same for a later run to resume the partial file of this one.
        identity = {
            "images": listing.identity,
            "settings": choices,
            "fastprune": __version__,
            "pillow": PIL.__version__,
        }
        try:
            _start_partial(assembly, partial, journal, identity, resume=job.resume)
            _fill(assembly, job.source, pool, journal, partial)
            manifest = _finish(assembly, partial, path, choices)
        except BaseException:
            manifest_path(partial).unlink(missing_ok=True)
            # What is framed took its time and is whole: only its name is missing.
            if not (job.keep_partial or job.resume or assembly.is_framed):
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
        for other in (partial, _journal_path(partial), manifest_path(path)):
            destination(other)
    except ArtifactError as error:
        raise ConversionError(str(error)) from None
    if path.is_dir():
        raise ConversionError(f"{path} is a folder. Name a file, such as {path / 'train.beton'}.")
    return path, partial


def discard_partial(path: Path) -> None:
    """Remove what a killed conversion left of a beton; wait for its workers to see its end."""
    partial = path.with_name(f"{path.name}.partial")
    leftovers = (partial, manifest_path(partial), _journal_path(partial))
    if any(leftover.exists() for leftover in leftovers):
        with suppress(ConversionError), Journal(_journal_path(partial)):
            for leftover in leftovers:
                leftover.unlink(missing_ok=True)


def _journal_path(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.journal")


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


def _fill(
    assembly: Assembly, source: Source, pool: WorkerPool, journal: Journal, partial: Path
) -> None:
    """Run the workers; name the image at which one failed."""
    total = len(assembly.order)
    done = assembly.num_placed
    try:
        with _named_write_errors(partial), ExitStack() as stack:
            fetched = None
            if isinstance(source, FetchedSource):
                fetched = stack.enter_context(closing(fetched_ahead(source, locations(assembly))))
            counts = fill(assembly, pool, journal, fetched)
            rows = (row for count in counts for row in range(count))
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
