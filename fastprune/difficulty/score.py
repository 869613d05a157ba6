"""Score every row of a beton: one pass of a teacher, and the score table made of it."""

import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from fastprune.base.errors import ArtifactError, InvalidValueError
from fastprune.base.progress import track
from fastprune.base.ranks import Ranks, device_of_rank, join_ranks
from fastprune.beton.beton import Beton
from fastprune.beton.opening import open_beton
from fastprune.difficulty.clusters import spherical_kmeans
from fastprune.difficulty.fill_cache import fill_missing, open_cache, recurring_views
from fastprune.difficulty.kernels import centroid_distances, centroid_median_distances
from fastprune.difficulty.teacher import Forward, Teacher, make_teacher, ready_forward
from fastprune.difficulty.unfinished_pass import UnfinishedPass, open_pass
from fastprune.difficulty.views import Reading, View, choose_view
from fastprune.loading.batch import choose_device
from fastprune.loading.loader import Loader
from fastprune.rows.cache_filler import CacheFiller
from fastprune.rows.score_table import ScoreTable, require_parquet_name
from fastprune.settings import ScoreSettings, takes_settings
from fastprune.settings.score import CLUSTER_METRIC, LABEL_FREE_METRICS, LOGIT_METRICS

# Ranks that wait for the first one meet this often; see `_tabulate`.
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
    resumes it. Under torchrun, or in a process group of the caller's, the ranks share the work;
    all of them write into that folder, and the first one writes the table.

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
    made = make_teacher(
        teacher,
        num_classes=_checked_classes(beton, settings.num_classes, settings.num_clusters),
        checkpoint=settings.checkpoint,
        weights=settings.weights,
    )
    view = choose_view(beton, made, settings, count=settings.views)
    num_views = _checked_cache(settings, made)
    with join_ranks() as ranks, ExitStack() as stack:
        device = device_of_rank(choose_device(settings.device))
        reading = Reading(beton, view, settings, device)
        forward = stack.enter_context(
            ready_forward(
                made,
                feature_layer=settings.feature_layer,
                image_size=view.image_size,
                device=device,
                precision=settings.precision,
                compile_network=settings.compile_teacher,
                uses_labels=settings.num_clusters is None,
            )
        )
        # How the teacher is run decides its scores as much as its weights do.
        run_as = {"feature_layer": settings.feature_layer, "dtype": str(forward.dtype)}
        made = replace(made, identity=made.identity | run_as)
        identity = {
            "images": beton.fingerprint.to_dict(),
            "teacher": made.identity,
            "view": view.to_dict(),
            # Not the number of clusters: a killed pass may be resumed with another.
            **({} if settings.num_clusters is None else {"labels": False}),
        }
        unfinished = stack.enter_context(
            open_pass(
                out_path,
                num_rows=beton.num_rows,
                width=forward.width,
                identity=identity,
                resume=settings.resume,
                started=started,
                ranks=ranks,
            )
        )
        filler = None
        if settings.cache is not None:
            loader = reading.open(np.arange(beton.num_rows), ranks)
            cache = open_cache(
                settings.cache,
                loader,
                weights_digest=made.identity["weights_digest"],
                precision=forward.dtype,
                num_classes=forward.num_classes,
                num_views=num_views,
                dtype=settings.cache_dtype,
            )
            filler = stack.enter_context(CacheFiller(cache))
        _examine(reading, forward, unfinished, ranks, filler)
        table = _tabulate(unfinished, beton, made, view, ranks, settings)
        if table is not None:
            table.save(out_path)
            if settings.keep_features:
                unfinished.keep_features(out_path.with_suffix(".features.npy"))
            unfinished.remove()
        if filler is not None:
            _finish_cache(filler, loader, forward, ranks, slots=range(view.count))
        return ranks.from_first(table)


def _checked_classes(beton: Beton, asked: int | None, num_clusters: int | None) -> int | None:
    """Return the teacher's classes, None for its own; refuse labels that it does not know."""
    if num_clusters is not None:
        if num_clusters <= beton.num_rows:
            return asked
        raise InvalidValueError(
            f"num_clusters ({num_clusters:,}) must be from 1 to the number of rows of "
            f"{beton.path}, {beton.num_rows:,}."
        )
    num_classes = beton.num_classes if asked is None else asked
    if not beton.has_labels:
        raise InvalidValueError(
            f"{beton.path} was converted without labels, so its rows have no classes. Score it by "
            "clusters of the teacher's features: --unsupervised K (num_clusters)."
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


def _checked_cache(settings: ScoreSettings, teacher: Teacher) -> int:
    """Return K of the cache, 0 without one; refuse what it cannot keep."""
    if settings.cache is None:
        return 0
    if settings.views == 0:
        raise InvalidValueError(
            "a teacher cache keeps training views, not the center crop. Score with views=1 "
            "(--views 1)."
        )
    if teacher.num_classes == 0:
        raise InvalidValueError(
            f"cache ({settings.cache}) keeps logits, but the teacher has no classifier. Leave the "
            "cache out, or take a teacher with classes (--teacher-classes)."
        )
    return recurring_views(settings.cache, settings.num_views, at_least=settings.views)


def _examine(
    reading: Reading,
    forward: Forward,
    unfinished: UnfinishedPass,
    ranks: Ranks,
    filler: CacheFiller | None,
) -> None:
    """Examine the missing rows; every rank writes its own."""
    # By the first rank's list: the others may look while it already writes.
    missing = ranks.from_first(unfinished.missing() if ranks.is_first else None)
    batches = reading.batches(missing, ranks) if len(missing) else iter(())
    step_rows = reading.settings.batch_size * ranks.world
    steps: Iterable[int] = range(-(-len(missing) // step_rows))
    if ranks.is_first and len(missing):
        steps = track(
            steps, description="scoring", total=len(missing), unit="images", step=step_rows
        )
    keep = None if filler is None else partial(_keep, filler)
    for _ in steps:
        views = next(batches, None)  # in the last step a rank may have none
        if views is not None:
            unfinished.put(*forward.examine(views, keep=keep))
        # Ranks advance together: one that fails stops all at once, and none waits for a slower
        # one longer than a collective may take.
        ranks.all_gather(None)
    unfinished.commit()
    ranks.all_gather(None)
    if ranks.is_first and len(rest := unfinished.missing()):
        raise ArtifactError(
            f"{unfinished.folder} lacks {len(rest):,} rows of other ranks, the first of them row "
            f"{rest[0]:,}. Name an output on a disk that all ranks share."
        )


def _keep(filler: CacheFiller, rows: Tensor, slot: int, logits: Tensor) -> None:
    """Put a view's logits into the cache, copied to the host on its thread."""
    filler.put(rows.cpu().numpy(), slot, lambda: logits.cpu().numpy())


def _finish_cache(
    filler: CacheFiller, loader: Loader, forward: Forward, ranks: Ranks, *, slots: range
) -> None:
    """Put the last logits on the disk, and ask again for those that a killed pass lost."""
    filler.flush()
    # A disk that is full on one rank costs the cache, but not the scores.
    if not any(ranks.all_gather(filler.has_failed)):
        fill_missing(filler.cache, loader, forward, ranks, slots=slots)
        if ranks.is_first:
            filler.flush(seal=True)


def _tabulate(
    unfinished: UnfinishedPass,
    beton: Beton,
    teacher: Teacher,
    view: View,
    ranks: Ranks,
    settings: ScoreSettings,
) -> ScoreTable | None:
    """Make the table on the first rank; None on the others."""
    make = partial(_make_table, unfinished, beton, teacher, view, settings)
    if ranks.world == 1:
        return make()
    # Clusters of millions of rows can take longer than a collective waits: there are several.
    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(make) if ranks.is_first else None
        is_done = False
        while not is_done:
            if made is not None:
                wait([made], timeout=_SIGN_OF_LIFE_SECONDS)
            is_done = ranks.from_first(None if made is None else made.done())
        return None if made is None else made.result()


def _make_table(
    unfinished: UnfinishedPass,
    beton: Beton,
    teacher: Teacher,
    view: View,
    settings: ScoreSettings,
) -> ScoreTable:
    """Make the table of a whole pass: difficulty by classes, or by clusters."""
    labels, records = beton.labels, unfinished.records
    own: dict[str, Any]
    if settings.num_clusters is None:
        own = _by_class(unfinished, labels, teacher)
    else:
        own = _by_cluster(unfinished, beton, settings.num_clusters, settings.seed)
        names = LABEL_FREE_METRICS if teacher.num_classes else ()
        own["metrics"] |= {name: np.array(records[name], np.float32) for name in names}
    return ScoreTable(
        labels=np.array(labels, np.int64),
        predictions=np.array(records["prediction"], np.int64),
        fingerprint=beton.fingerprint,
        teacher=teacher.identity,
        view=view.to_dict(),
        seconds=unfinished.seconds,
        **own,
    )


def _by_class(unfinished: UnfinishedPass, labels: Any, teacher: Teacher) -> dict[str, Any]:
    """The table's metrics, and statistics of classes."""
    features, records, classes = unfinished.features(), unfinished.records, teacher.num_classes
    metrics = {
        "centroid": centroid_distances(features, labels, num_classes=classes),
        "centroid_median": centroid_median_distances(features, labels, num_classes=classes),
        **{
            name: np.array(records[name], np.float32)
            for name in LOGIT_METRICS
            # The gradient of the last layer needs that layer's own input.
            if name != "grand_last" or teacher.identity["feature_layer"] is None
        },
    }
    counts = np.bincount(labels, minlength=classes)
    std_sums = np.bincount(labels, weights=records["logit_std"], minlength=classes)
    with np.errstate(invalid="ignore"):  # a class without rows has no std: 0 / 0 is NaN
        class_std = std_sums / counts
    return {"metrics": metrics, "class_std": class_std, "class_counts": counts.astype(np.int64)}


def _by_cluster(
    unfinished: UnfinishedPass, beton: Beton, num_clusters: int, seed: int
) -> dict[str, Any]:
    """The table's metric of clusters, which are found without looking at labels."""
    clusters = spherical_kmeans(unfinished.features(), num_clusters, seed=seed)
    counts = np.bincount(beton.labels, minlength=beton.num_classes)
    return {
        "metrics": {CLUSTER_METRIC: clusters.distances},
        "class_std": np.full(len(counts), np.nan),
        "class_counts": counts.astype(np.int64),
        "clusters": clusters.assignments,
        "clustering": {
            "num_clusters": num_clusters,
            "seed": seed,
            "iterations": clusters.iterations,
            "converged": clusters.converged,
            "mean_distance": clusters.inertia / beton.num_rows,
        },
    }
