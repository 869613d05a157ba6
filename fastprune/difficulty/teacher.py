"""One pass of a teacher over a beton, and the score table made of it."""

import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastprune.artifacts.scores import ScoreTable
from fastprune.beton.reader import Beton, open_beton
from fastprune.checks import require_at_least
from fastprune.difficulty.forward import COLUMNS, Forward, ready_forward
from fastprune.difficulty.journal import ROW_DTYPE, PassJournal
from fastprune.difficulty.kernels import centroid_distances, centroid_median_distances
from fastprune.difficulty.metrics import LOGIT_METRICS
from fastprune.difficulty.network import Channels, Teacher, ViewSpec, choose_view, make_teacher
from fastprune.distributed import Ranks, device_of_rank, join_ranks
from fastprune.errors import InvalidValueError
from fastprune.loading.batch import choose_device
from fastprune.loading.loader import Loader
from fastprune.progress import track

# A killed pass loses at most this much; a commit flushes the whole map, so not every step.
_COMMIT_SECONDS = 10.0


@dataclass(frozen=True)
class _Reading:
    """How the pass reads the beton.

    Attributes:
        beton: the images.
        view: size, normalization and number of views.
        batch_size: rows per step and rank.
        device: that batches are delivered to.
        backend: the loader's engine.
        num_workers: decoding threads; None for one per usable CPU.
    """

    beton: Beton
    view: ViewSpec
    batch_size: int
    device: torch.device
    backend: str
    num_workers: int | None

    def batches(self, start: int, ranks: Ranks) -> Iterator[Iterable[tuple[Tensor, ...]]]:
        """Yield this rank's batches from row `start` on, each in all of its views."""
        loader = Loader(
            self.beton.path,
            np.arange(start, self.beton.num_rows),
            batch_size=self.batch_size,
            train=self.view.count > 0,
            backend=self.backend,
            device=self.device,
            image_size=self.view.image_size,
            mean=self.view.mean,
            std=self.view.std,
            order="sequential",
            seed=self.view.seed,
            tail="exact",
            layout="xyi",
            num_workers=self.num_workers,
            distributed=(ranks.rank, ranks.world),
        )

        def epoch(number: int) -> Iterator[tuple[Tensor, ...]]:
            # A generator, so that every epoch begins under its own number.
            loader.set_epoch(number)
            yield from loader

        # View k of a row is its view in epoch k: the epochs run side by side, a batch at a time.
        first, *others = map(epoch, range(max(1, self.view.count)))
        for batch in first:
            # A view is made when it is asked for: all views of a batch at once take much memory.
            yield chain([batch], map(next, others))


def score(
    beton_path: str | Path,
    teacher: str | nn.Module | None,
    out_path: str | Path,
    *,
    checkpoint: str | Path | None = None,
    weights: str | None = None,
    num_classes: int | None = None,
    feature_layer: str | None = None,
    image_size: int | None = None,
    mean: Channels | None = None,
    std: Channels | None = None,
    views: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
    device: str | torch.device = "auto",
    precision: str = "auto",
    compile_teacher: bool = False,
    backend: str = "auto",
    num_workers: int | None = None,
    resume: bool = True,
    keep_features: bool = False,
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
        checkpoint: weights of the named teacher: safetensors or a PyTorch checkpoint.
        weights: published weights of the named teacher, such as IMAGENET1K_V2; by default, where
            no checkpoint is given, the best ones.
        num_classes: C, logits of the teacher; by default the beton's number of classes.
        feature_layer: the layer whose output is the feature vector; by default the input of the
            teacher's classifier.
        image_size: side of the images in pixels; by default as `choose_view` finds it.
        mean: per channel, of pixel values in [0, 1]; by default that of the published weights,
            else of ImageNet.
        std: as mean.
        views: augmented views per row, whose metrics and features are averaged; None for one
            center crop.
        seed: of the augmented views.
        batch_size: images per step and rank.
        device: of the teacher; "auto" takes CUDA where it is there, one device per rank.
        precision: of the teacher: "bf16" (autocast), "fp32", or "auto" for bf16 on CUDA devices
            that have it.
        compile_teacher: run the teacher through torch.compile.
        backend: the loader's engine.
        num_workers: decoding threads; None for one per usable CPU.
        resume: False to start anew even where an unfinished pass could be resumed.
        keep_features: leave the features beside the table: `scores.parquet` is joined by
            `scores.features.npy`, (N, D) float16 or float32.

    Returns:
        The table as written, on every rank.

    Raises:
        InvalidValueError: an argument is outside its domain, the teacher's classes are not the
            beton's, or it returned a value that is not finite (the row is named).
        ArtifactError: the checkpoint does not fit, or a file cannot be written.
        BetonError: the beton cannot be read.
        LoadingError: an image cannot be decoded.
    """
    started = time.monotonic()
    require_at_least("batch_size", batch_size, 1)
    out_path, beton = Path(out_path), open_beton(beton_path)
    classes = beton.num_classes if num_classes is None else num_classes
    outside = (beton.labels < 0) | (beton.labels >= classes)
    if outside.any():
        row = int(np.argmax(outside))
        raise InvalidValueError(
            f"row {row:,} of {beton.path} has label {beton.labels[row]}, but the teacher's "
            f"{classes:,} classes are 0 to {classes - 1:,}. Take a teacher that was trained on "
            "these labels."
        )
    made = make_teacher(teacher, num_classes=classes, checkpoint=checkpoint, weights=weights)
    view = choose_view(
        beton, made, image_size=image_size, mean=mean, std=std, views=views, seed=seed
    )
    with join_ranks() as ranks:
        rank_device = device_of_rank(choose_device(device))
        reading = _Reading(beton, view, batch_size, rank_device, backend, num_workers)
        with ready_forward(
            made.network,
            num_classes=classes,
            feature_layer=feature_layer,
            image_size=view.image_size,
            device=rank_device,
            precision=precision,
            compile_network=compile_teacher,
        ) as forward:
            # How the teacher is run decides its scores as much as its weights do.
            run_as = {"feature_layer": feature_layer, "dtype": str(forward.dtype)}
            made = replace(made, identity=made.identity | run_as)
            identity = {
                "images": beton.fingerprint.to_dict(),
                "teacher": made.identity,
                "view": view.to_dict(),
            }
            with (
                PassJournal(
                    out_path,
                    num_rows=beton.num_rows,
                    identity=identity,
                    resume=resume,
                    started=started,
                )
                if ranks.is_first
                else nullcontext()
            ) as journal:
                _run(reading, forward, journal, ranks)
                table = None
                if journal is not None:
                    table = _make_table(journal, beton, made, view)
                    table.save(out_path)
                    if keep_features:
                        journal.keep_features(out_path.with_suffix(".features.npy"))
                    journal.remove()
        return ranks.from_first(table)


def _run(reading: _Reading, forward: Forward, journal: PassJournal | None, ranks: Ranks) -> None:
    """Examine the remaining rows; the first rank collects and writes."""
    num_rows, batch_size = reading.beton.num_rows, reading.batch_size
    start = ranks.from_first(None if journal is None else journal.rows_done)
    if start == num_rows:
        return
    batches = reading.batches(start, ranks)
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
            features, columns = forward.examine(views)
        all_features = ranks.gather(features, batch_size)
        all_columns = ranks.gather(columns, batch_size)
        if journal is not None:
            _append(journal, torch.cat(all_features), torch.cat(all_columns))


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


def _make_table(journal: PassJournal, beton: Beton, teacher: Teacher, view: ViewSpec) -> ScoreTable:
    labels, rows, classes = beton.labels, journal.rows, teacher.num_classes
    metrics = {
        "centroid": centroid_distances(journal.features, labels, num_classes=classes),
        "centroid_median": centroid_median_distances(journal.features, labels, num_classes=classes),
        **{name: np.array(rows[name], np.float32) for name in LOGIT_METRICS},
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
