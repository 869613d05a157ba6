"""Fill a teacher cache without a student: every row in every one of its recurring views."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fastprune.base.checks import require_at_least
from fastprune.base.errors import InvalidValueError
from fastprune.base.progress import track
from fastprune.base.ranks import Ranks, device_of_rank, join_ranks
from fastprune.beton.beton import RowsLike, rows_of
from fastprune.beton.opening import open_beton
from fastprune.difficulty.forward import Forward, ready_forward, run_network
from fastprune.difficulty.network import choose_view, make_teacher
from fastprune.difficulty.reading import Reading
from fastprune.loading.batch import choose_device
from fastprune.loading.loader import Loader
from fastprune.rows.teacher_cache import TeacherCache
from fastprune.settings import FillSettings, takes_settings


@takes_settings(FillSettings)
def fill_cache(
    beton_path: str | Path,
    teacher: str | nn.Module | None,
    cache_path: str | Path,
    *,
    subset: RowsLike = None,
    settings: FillSettings,
) -> TeacherCache:
    """Ask the teacher for every logit that a cache does not hold yet.

    Under torchrun, or in a process group of the caller's, the ranks share the work. A run that was
    killed is continued by the same call.

    Args:
        beton_path: the images.
        teacher: as for `score`.
        cache_path: the folder; made where it is missing.
        subset: the rows to fill, which a new cache has room for: a file, a `Subset`, an array of
            rows, or None for all.
        settings: the fields of `FillSettings`, as keywords.

    Returns:
        The cache, with these rows whole in these slots.

    Raises:
        InvalidValueError: an argument is outside its domain, or a logit cannot be kept.
        ArtifactMismatch: the cache is of something else; the difference is named.
        ArtifactError: the disk is full, or a file cannot be read or written.
    """
    num_views = recurring_views(cache_path, settings.num_views)
    slots = range(num_views) if settings.slots is None else settings.slots
    for slot in slots:
        if not 0 <= slot < num_views:
            raise InvalidValueError(
                f"slot ({slot}) must be in [0, {num_views}), the cache's number of views."
            )
    beton = open_beton(beton_path)
    rows = rows_of(beton, subset)
    # Images without labels say nothing of the teacher's classes, which are its own then.
    known = beton.num_classes if beton.has_labels else None
    made = make_teacher(
        teacher,
        num_classes=settings.num_classes or known,
        checkpoint=settings.checkpoint,
        weights=settings.weights,
    )
    if made.num_classes == 0:
        raise InvalidValueError(
            "a teacher cache keeps logits, but the teacher has no classifier that makes some. Say "
            "how many classes it has (--teacher-classes), or take another."
        )
    view = choose_view(
        beton,
        made,
        image_size=settings.image_size,
        mean=settings.mean,
        std=settings.std,
        views=1,
        seed=settings.seed,
        augment=settings.augment,
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
        loader = reading.open(rows, ranks)
        with ready_forward(
            made.network,
            num_classes=made.num_classes,
            feature_layer=None,
            image_size=view.image_size,
            device=rank_device,
            precision=settings.precision,
            compile_network=settings.compile_teacher,
        ) as forward:
            cache = open_cache(
                cache_path,
                loader,
                weights_digest=made.identity["weights_digest"],
                precision=forward.dtype,
                num_classes=made.num_classes,
                num_views=num_views,
                dtype=settings.dtype,
            )
            fill_missing(cache, loader, forward, ranks, slots=slots)
    return cache


def recurring_views(path: str | Path, num_views: int | None, *, scored: int = 1) -> int:
    """Return how many views recur: as is asked for, else as an existing cache has it.

    Args:
        path: of the cache.
        num_views: K, or None.
        scored: views that are put into it, the first ones; 0 for a center crop.

    Raises:
        InvalidValueError: there is no such number, it is below `scored`, or that is 0.
        ArtifactError: the cache is damaged.
    """
    if scored == 0:
        raise InvalidValueError(
            "a teacher cache keeps training views, not the center crop. Score with views=1 "
            "(--views train)."
        )
    if num_views is None and not (Path(path) / "cache.json").exists():
        raise InvalidValueError(
            f"how many views recur in the training that {path} is for? Give num_views "
            "(--num-views), as data.num_views of its recipe."
        )
    chosen = TeacherCache.open(path).num_views if num_views is None else num_views
    require_at_least("num_views", chosen, scored)
    return chosen


def open_cache(
    path: str | Path,
    loader: Loader,
    *,
    weights_digest: str,
    precision: torch.dtype,
    num_classes: int,
    num_views: int,
    dtype: str | None = None,
) -> TeacherCache:
    """Open a cache of what a loader shows a teacher, or make one with room for the loader's rows.

    Args:
        path: the folder.
        loader: of the views.
        weights_digest: of the teacher.
        precision: of the teacher's arithmetic, float32 or bfloat16.
        num_classes: C.
        num_views: K.
        dtype: that is stored; None for that of an existing cache, or float16.

    Raises:
        ArtifactMismatch: it is of something else; the difference is named.
        ArtifactError: it is damaged, or the folder cannot be written.
    """
    name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[precision]
    teacher = {"weights_digest": weights_digest, "precision": name}
    return TeacherCache.open_or_create(
        path,
        rows=loader.rows,
        num_classes=num_classes,
        num_views=num_views,
        identity=loader.view_identity() | {"teacher": teacher},
        dtype=dtype,
    )


def fill_missing(
    cache: TeacherCache, loader: Loader, forward: Forward, ranks: Ranks, *, slots: Iterable[int]
) -> int:
    """Ask the teacher for what a cache lacks of a loader's rows; a collective.

    Args:
        cache: opened by every rank.
        loader: of these views, in any order, every row once; its rows are changed.
        forward: the teacher.
        ranks: that share the work.
        slots: which views.

    Returns:
        Images that went through the teacher, on all ranks.

    Raises:
        InvalidValueError: a slot is out of range, the cache has no room for a row, or a logit
            cannot be kept.
        ArtifactError: the disk is full.
    """
    wanted, asked = loader.rows, 0
    if not cache.holds(wanted).all():
        row = wanted[np.argmin(cache.holds(wanted))]
        raise InvalidValueError(
            f"{cache.path} has no room for row {row:,}: it was made for other rows. Name another "
            "folder, or the subset that it was made for."
        )
    for slot in slots:
        # Other ranks write at this moment: what is missing must be the same on all of them.
        missing = ranks.from_first(
            np.intersect1d(cache.missing(slot), wanted) if ranks.is_first else None
        )
        if len(missing) == 0:
            continue
        loader.set_rows(missing)
        loader.set_epoch(slot)
        description = f"view {slot + 1} of {cache.num_views}"
        step = loader.batch_size * ranks.world
        shown = track(loader, description=description, total=len(missing), unit="images", step=step)
        for images, _, rows in shown if ranks.is_first else loader:
            _, logits = run_network(forward.network, images, forward.dtype)
            cache.put(rows.cpu().numpy(), slot, logits.float().cpu().numpy())
        cache.commit()
        ranks.all_gather(None)  # all have written
        if ranks.is_first:
            cache.commit(seal=True)
        asked += len(missing)
    return asked
