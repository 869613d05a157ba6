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
from fastprune.difficulty.teacher import Forward, make_teacher, ready_forward, run_network
from fastprune.difficulty.views import Reading, choose_view
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
        cache_path: the folder; made if it does not exist.
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
    num_views = recurring_views(cache_path, settings.num_views, at_least=1)
    slots = range(num_views) if settings.slots is None else settings.slots
    for slot in slots:
        if slot >= num_views:
            raise InvalidValueError(
                f"slot ({slot}) must be in [0, {num_views}), the cache's number of views."
            )
    beton = open_beton(beton_path)
    rows = rows_of(beton, subset)
    # Unlabeled images do not determine the classes, which are the teacher's own then.
    known = beton.num_classes if beton.has_labels else None
    made = make_teacher(
        teacher,
        num_classes=settings.num_classes or known,
        checkpoint=settings.checkpoint,
        weights=settings.weights,
    )
    if made.num_classes == 0:
        raise InvalidValueError(
            "a teacher cache keeps logits, but the teacher has no classifier. Tell how many "
            "classes it has (--teacher-classes), or take another."
        )
    view = choose_view(beton, made, settings, count=1)
    with join_ranks() as ranks:
        device = device_of_rank(choose_device(settings.device))
        loader = Reading(beton, view, settings, device).open(rows, ranks)
        with ready_forward(
            made,
            feature_layer=None,
            image_size=view.image_size,
            device=device,
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


def recurring_views(path: str | Path, num_views: int | None, *, at_least: int) -> int:
    """Return how many views recur: as asked for, else as an existing cache has it.

    Args:
        path: of the cache.
        num_views: K, or None.
        at_least: views that will be put into it, the first ones.

    Raises:
        InvalidValueError: there is no such number, or it is below `at_least`.
        ArtifactError: the cache is damaged.
    """
    if num_views is None and not (Path(path) / "cache.json").exists():
        raise InvalidValueError(
            f"how many views recur in the training that {path} is for? Give num_views "
            "(--num-views), as data.num_views of its recipe."
        )
    chosen = TeacherCache.open(path).num_views if num_views is None else num_views
    require_at_least("num_views", chosen, at_least)
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
) -> None:
    """Ask the teacher for what a cache lacks of a loader's rows; a collective.

    Args:
        cache: opened by every rank.
        loader: of these views, in any order, every row once; its rows are changed.
        forward: the teacher.
        ranks: that share the work.
        slots: which views.

    Raises:
        InvalidValueError: a slot is out of range, the cache has no room for a row, or a logit
            cannot be kept.
        ArtifactError: the disk is full.
    """
    wanted = loader.rows
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
