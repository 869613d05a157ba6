"""One pass of a teacher over a beton, and the score table made of it."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastprune.base.errors import InvalidValueError
from fastprune.base.progress import track
from fastprune.base.ranks import Ranks, device_of_rank, join_ranks
from fastprune.beton.beton import Beton
from fastprune.beton.opening import open_beton
from fastprune.difficulty.cache import fill_missing, open_cache, recurring_views
from fastprune.difficulty.clusters import spherical_kmeans
from fastprune.difficulty.forward import COLUMNS, Forward, ready_forward
from fastprune.difficulty.journal import ROW_DTYPE, PassJournal
from fastprune.difficulty.kernels import centroid_distances, centroid_median_distances
from fastprune.difficulty.network import Teacher, ViewSpec, choose_view, make_teacher
from fastprune.difficulty.reading import Reading
from fastprune.loading.batch import choose_device
from fastprune.loading.loader import Loader
from fastprune.rows.cache_filler import CacheFiller
from fastprune.rows.score_table import ScoreTable, require_parquet_name
from fastprune.settings import ScoreSettings, takes_settings
from fastprune.settings.score import CLUSTER_METRIC, LABEL_FREE_METRICS, LOGIT_METRICS

# A killed pass loses at most this much; a commit flushes the whole map, so not every step.
_COMMIT_SECONDS = 10.0
_SIGN_OF_LIFE_SECONDS = 5.0


@takes_settings(ScoreSettings)
def score(
    beton_path: str | Path,
    teacher: str | nn.Module | None,
    out_path: str | Path,
    *,
    settings: ScoreSettings,
) -> ScoreTable:
    """Score every row of a beton by one pass of a teacher.

    The pass keeps its state in the folder `<out_path>.partial`. When it is killed, the same call
    resumes it. Under torchrun, or in a process group of the caller's, the ranks share the work and
    the first one writes.

    Args:
        beton_path: the images.
        teacher: a network, which is moved to the device and left in the mode it was in; or a name
            (see `fastprune.networks.build_network`); or None for the one that the checkpoint names.
        out_path: the score table to write.
        settings: the fields of `ScoreSettings`, as keywords.

    Returns:
        The table as written, on every rank.

    Raises:
        InvalidValueError: an argument is outside its domain, the teacher's classes are not the
            beton's, it returned a value that is not finite (the row is named), or the beton has no
            labels and num_clusters is not given.
        ArtifactMismatch: the cache is of something else; the difference is named.
        ArtifactError: the checkpoint does not fit, or a file cannot be written.
        BetonError: the beton cannot be read.
        LoadingError: an image cannot be decoded.
    """
    started = time.monotonic()
    require_parquet_name(out_path)  # now, and not when the pass is done
    out_path, beton = Path(out_path), open_beton(beton_path)
    classes = _checked_classes(beton, settings.num_classes, settings.num_clusters)
    made = make_teacher(
        teacher, num_classes=classes, checkpoint=settings.checkpoint, weights=settings.weights
    )
    cache = settings.cache
    view = choose_view(
        beton,
        made,
        image_size=settings.image_size,
        mean=settings.mean,
        std=settings.std,
        views=settings.views,
        seed=settings.seed,
        augment=settings.augment,
    )
    recurring = (
        0 if cache is None else recurring_views(cache, settings.num_views, scored=view.count)
    )
    if cache is not None and made.num_classes == 0:
        raise InvalidValueError(
            f"cache ({cache}) keeps logits, but the teacher has no classifier that makes some. "
            "Leave it out, or take a teacher with classes (--teacher-classes)."
        )
    with join_ranks() as ranks:
        rank_device = device_of_rank(choose_device(settings.device))
        reading = Reading(
            beton,
            view,
            settings.batch_size,
            rank_device,
            settings.backend,
            settings.num_workers,
        )
        with ready_forward(
            made.network,
            num_classes=made.num_classes,
            feature_layer=settings.feature_layer,
            image_size=view.image_size,
            device=rank_device,
            precision=settings.precision,
            compile_network=settings.compile_teacher,
            uses_labels=settings.num_clusters is None,
        ) as forward:
            # How the teacher is run decides its scores as much as its weights do.
            run_as = {"feature_layer": settings.feature_layer, "dtype": str(forward.dtype)}
            made = replace(made, identity=made.identity | run_as)
            identity: dict[str, Any] = {
                "images": beton.fingerprint.to_dict(),
                "teacher": made.identity,
                "view": view.to_dict(),
            }
            if settings.num_clusters is not None:
                # Not their number: a killed pass may go on with another.
                identity["labels"] = False
            with ExitStack() as stack:
                journal = filler = None
                if ranks.is_first:
                    files = PassJournal(
                        out_path,
                        num_rows=beton.num_rows,
                        identity=identity,
                        resume=settings.resume,
                        started=started,
                    )
                    journal = stack.enter_context(files)
                if cache is not None:
                    loader = reading.open(np.arange(beton.num_rows), ranks)
                    opened = open_cache(
                        cache,
                        loader,
                        weights_digest=made.identity["weights_digest"],
                        precision=forward.dtype,
                        num_classes=forward.num_classes,
                        num_views=recurring,
                        dtype=settings.cache_dtype,
                    )
                    filler = stack.enter_context(CacheFiller(opened))
                _run(reading, forward, journal, ranks, filler)
                table = _tabulate(
                    journal, beton, made, view, ranks, settings.num_clusters, settings.seed
                )
                if journal is not None and table is not None:
                    table.save(out_path)
                    if settings.keep_features:
                        journal.keep_features(out_path.with_suffix(".features.npy"))
                    journal.remove()
                if filler is not None:
                    _finish_cache(filler, loader, forward, ranks, num_slots=view.count)
        return ranks.from_first(table)


def _checked_classes(beton: Beton, asked: int | None, num_clusters: int | None) -> int | None:
    """Return the teacher's classes, None for its own; refuse labels that it does not know."""
    if num_clusters is not None:
        if 1 <= num_clusters <= beton.num_rows:
            return asked
        raise InvalidValueError(
            f"num_clusters ({num_clusters:,}) must be from 1 to the number of rows of "
            f"{beton.path}, {beton.num_rows:,}."
        )
    num_classes = beton.num_classes if asked is None else asked
    if not beton.has_labels:
        raise InvalidValueError(
            f"{beton.path} was converted without labels, so no row has a class to be judged by. "
            "Score it by clusters of the teacher's features: --unsupervised K (num_clusters)."
        )
    outside = (beton.labels < 0) | (beton.labels >= num_classes)
    if outside.any():
        row = int(np.argmax(outside))
        raise InvalidValueError(
            f"row {row:,} of {beton.path} has label {beton.labels[row]}, but the teacher's "
            f"{num_classes:,} classes are 0 to {num_classes - 1:,}. Take a teacher that was "
            "trained on these labels."
        )
    return num_classes


def _run(
    reading: Reading,
    forward: Forward,
    journal: PassJournal | None,
    ranks: Ranks,
    filler: CacheFiller | None,
) -> None:
    """Examine the remaining rows; the first rank collects and writes."""
    num_rows, batch_size = reading.beton.num_rows, reading.batch_size
    start = ranks.from_first(None if journal is None else journal.rows_done)
    if start == num_rows:
        return
    batches = reading.batches(start, ranks)
    keep = None if filler is None else partial(_keep, filler)
    step_rows = batch_size * ranks.world
    steps: range | Iterator[int] = range(-(-(num_rows - start) // step_rows))
    if journal is not None:
        steps = track(
            steps, description="scoring", total=num_rows - start, unit="images", step=step_rows
        )
    for _ in steps:
        views = next(batches, None)
        if views is None:  # gather is collective: a rank without rows takes part too
            features = torch.zeros(0, forward.width)
            columns = torch.zeros(0, len(COLUMNS), dtype=torch.float64)
        else:
            features, columns = forward.examine(views, keep=keep)
        all_features = ranks.gather(features, batch_size)
        all_columns = ranks.gather(columns, batch_size)
        if journal is not None:
            _append(journal, torch.cat(all_features), torch.cat(all_columns))


def _keep(filler: CacheFiller, rows: Tensor, slot: int, logits: Tensor) -> None:
    """Put a view's logits into the cache, copied to the host on its thread."""
    filler.put(rows.cpu().numpy(), slot, lambda: logits.cpu().numpy())


def _finish_cache(
    filler: CacheFiller, loader: Loader, forward: Forward, ranks: Ranks, *, num_slots: int
) -> None:
    """Put the last logits on the disk, and ask again for those that a killed pass lost."""
    filler.flush()
    # A disk that is full on one rank costs the cache, but not the scores.
    if not any(ranks.all_gather(filler.has_failed)):
        fill_missing(filler.cache, loader, forward, ranks, slots=range(num_slots))
        if ranks.is_first:
            filler.flush(seal=True)


def _append(journal: PassJournal, features: Tensor, columns: Tensor) -> None:
    """Write a step's rows in row order."""
    # The sampler deals rows out to ranks in turn, so together they interleave.
    order = columns[:, COLUMNS.index("row")].argsort()
    features, columns = features[order], columns[order]
    expected = torch.arange(journal.rows_done, journal.rows_done + len(columns))
    assert torch.equal(columns[:, COLUMNS.index("row")].long(), expected)
    records = np.zeros(len(columns), ROW_DTYPE)
    for name in ROW_DTYPE.names or ():
        records[name] = columns[:, COLUMNS.index(name)].numpy()
    journal.append(features.numpy(), records)
    journal.commit(older_than_seconds=_COMMIT_SECONDS)


def _tabulate(
    journal: PassJournal | None,
    beton: Beton,
    teacher: Teacher,
    view: ViewSpec,
    ranks: Ranks,
    num_clusters: int | None,
    seed: int,
) -> ScoreTable | None:
    """Make the table of the pass on the first rank, which has the journal."""
    if num_clusters is None:
        return None if journal is None else _make_table(journal, beton, teacher, view)
    make = partial(_make_clustered_table, journal, beton, teacher, view, num_clusters, seed)
    if ranks.world == 1:
        return make()
    # Clusters of millions of rows can take longer than a collective waits: there are several.
    with ThreadPoolExecutor(1) as pool:
        made = None if journal is None else pool.submit(make)
        is_done = False
        while not is_done:
            if made is not None:
                wait([made], timeout=_SIGN_OF_LIFE_SECONDS)
            is_done = ranks.from_first(None if made is None else made.done())
        return None if made is None else made.result()


def _make_table(journal: PassJournal, beton: Beton, teacher: Teacher, view: ViewSpec) -> ScoreTable:
    labels, rows, classes = beton.labels, journal.rows, teacher.num_classes
    metrics = {
        "centroid": centroid_distances(journal.features, labels, num_classes=classes),
        "centroid_median": centroid_median_distances(journal.features, labels, num_classes=classes),
        **{
            name: np.array(rows[name], np.float32)
            for name in LOGIT_METRICS
            # The gradient of the last layer needs that layer's own input.
            if name != "grand_last" or teacher.identity["feature_layer"] is None
        },
    }
    counts = np.bincount(labels, minlength=classes)
    std_sums = np.bincount(labels, weights=rows["logit_std"], minlength=classes)
    with np.errstate(invalid="ignore"):  # a class without rows has no std: 0 / 0 is NaN
        class_std = std_sums / counts
    return ScoreTable(
        labels=np.array(labels, np.int64),
        metrics=metrics,
        predictions=np.array(rows["prediction"], np.int64),
        class_std=class_std,
        class_counts=counts.astype(np.int64),
        fingerprint=beton.fingerprint,
        teacher=teacher.identity,
        view=view.to_dict(),
        seconds=journal.seconds,
    )


def _make_clustered_table(
    journal: PassJournal | None,
    beton: Beton,
    teacher: Teacher,
    view: ViewSpec,
    num_clusters: int,
    seed: int,
) -> ScoreTable:
    """Group the rows by their features; labels, where the beton has some, are not looked at."""
    assert journal is not None, "the first rank has one"
    clusters = spherical_kmeans(journal.features, num_clusters, seed=seed)
    has_logits = teacher.num_classes > 0
    metrics = {name: np.array(journal.rows[name], np.float32) for name in LABEL_FREE_METRICS}
    counts = np.bincount(beton.labels, minlength=beton.num_classes)
    return ScoreTable(
        labels=np.array(beton.labels, np.int64),
        metrics={CLUSTER_METRIC: clusters.distances, **(metrics if has_logits else {})},
        predictions=np.array(journal.rows["prediction"], np.int64),
        class_std=np.full(len(counts), np.nan),
        class_counts=counts.astype(np.int64),
        fingerprint=beton.fingerprint,
        teacher=teacher.identity,
        view=view.to_dict(),
        seconds=journal.seconds,
        clusters=clusters.assignments,
        clustering={
            "num_clusters": num_clusters,
            "seed": seed,
            "iterations": clusters.iterations,
            "converged": clusters.converged,
            "mean_distance": clusters.inertia / beton.num_rows,
        },
    )
