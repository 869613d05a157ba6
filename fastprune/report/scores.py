"""The page about a score table: easy, kept and hard rows."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastprune.base.checks import did_you_mean
from fastprune.base.errors import InvalidValueError
from fastprune.base.files import write_text
from fastprune.base.provenance import require_same_images
from fastprune.beton.beton import Beton
from fastprune.beton.opening import open_beton
from fastprune.report.page import Thumbnail, facts, heading, link, note, page, picture, strip
from fastprune.report.score_pictures import (
    class_counts_png,
    correlation_png,
    histogram_png,
    thumbnail_png,
)
from fastprune.rows.score_table import ScoreTable
from fastprune.rows.subset import Subset, checked_rows
from fastprune.settings.score import NOT_DIFFICULTIES

Rows = NDArray[np.int64]

# More than a person looks through; a longer list is a filter on the score table.
_LIST_ROWS = 1000


@dataclass(frozen=True)
class Subject:
    """The scores, rows and images of the page.

    Attributes:
        table: the scores.
        metric: the difficulty that is shown.
        kept: (K,) rows, or None.
        beton: the images, or None.
    """

    table: ScoreTable
    metric: str
    kept: Rows | None
    beton: Beton | None

    @property
    def scores(self) -> NDArray[np.float32]:
        """The difficulty that is shown, (N,)."""
        return self.table.metric(self.metric)

    @cached_property
    def files(self) -> Mapping[int, str]:
        """Row -> source file, where the beton's manifest knows."""
        if self.beton is None or self.beton.manifest is None:
            return {}
        lines = self.beton.manifest.table(["row", "source"]).to_pydict()
        pairs = zip(lines["row"], lines["source"], strict=True)
        return {row: file for row, file in pairs if row is not None and file is not None}

    def class_name(self, label: int) -> str:
        """Name a class, by its number where the beton has no names; or a cluster."""
        if self.table.clusters is not None:
            return f"cluster {label}"
        names = None if self.beton is None else self.beton.class_names
        known = names is not None and 0 <= label < len(names)
        return names[label] if names is not None and known else f"class {label}"


def report_scores(
    scores_path: str | Path,
    out_path: str | Path,
    *,
    subset_path: str | Path | None = None,
    beton_path: str | Path | None = None,
    metric: str | None = None,
    num_classes: int = 10,
    classes: Sequence[str] = (),
    per_strip: int = 8,
) -> None:
    """Write an HTML page, with its pictures in it, about a score table.

    It shows how the metric is spread and what of it is kept, what each class keeps, how alike the
    metrics rank, and, with the beton, contact sheets: the easiest, the medium and the hardest
    images of some classes. Beside it, `<out>-hardest.csv` lists the hardest rows, and
    `<out>-suspected.csv` those whose label the teacher contradicts, at most a thousand of each.

    Args:
        scores_path: the score table.
        out_path: the page to write.
        subset_path: the kept rows, to show what is kept.
        beton_path: the images, to show contact sheets.
        metric: the difficulty to show; by default the one that the subset was made by, else
            `centroid`, else the table's first.
        num_classes: classes with a contact sheet, spread over all classes.
        classes: these classes instead, by name or number.
        per_strip: images in each of a class's three strips.

    Raises:
        ArtifactError: a file cannot be read or written.
        ArtifactMismatch: scores, subset and beton are not of the same images.
        InvalidValueError: the metric is not in the table, the subset is not of the table's rows, or
            fewer than one class or image is asked for.
        BetonError: the beton cannot be read.
    """
    for name, count in (("num_classes", num_classes), ("per_strip", per_strip)):
        if count < 1:
            raise InvalidValueError(f"{name} ({count}) must be at least 1.")
    table = ScoreTable.load(scores_path)
    subset = None if subset_path is None else Subset.load(subset_path)
    beton = None if beton_path is None else open_beton(beton_path)
    kept = None if subset is None else _kept_rows(table, scores_path, subset, subset_path)
    if beton is not None:
        require_same_images(
            table.fingerprint,
            str(scores_path),
            beton.fingerprint,
            str(beton_path),
            cure=f"Score this beton: fastprune score {beton_path} -o {scores_path} ...",
            labels=(table.labels, beton.labels),
        )
    subject = Subject(table, _chosen_metric(table, subset, metric), kept, beton)
    labels = _chosen_labels(subject, classes, num_classes)
    parts = [*_summary(subject, subset), *_charts(subject), *_write_lists(subject, Path(out_path))]
    if beton is not None:
        parts += _contact_sheets(subject, beton, labels, per_strip)
    write_text(out_path, page(f"Scores: {Path(scores_path).name}", parts))


def _kept_rows(table: ScoreTable, scores_path: Any, subset: Subset, subset_path: Any) -> Rows:
    """Check that the subset is of the table's images, and return its rows."""
    if subset.fingerprint is not None:
        require_same_images(
            subset.fingerprint,
            str(subset_path),
            table.fingerprint,
            str(scores_path),
            cure=f"Make a subset from these scores: fastprune select {scores_path} ...",
        )
    return checked_rows(subset.rows, name=str(subset_path), num_rows=table.num_rows)


def _chosen_metric(table: ScoreTable, subset: Subset | None, metric: str | None) -> str:
    """Choose the metric that is asked for, the subset's, or the default."""
    if metric is not None:
        table.metric(metric)
        return metric
    difficulties = _difficulties(table)
    if not difficulties:
        raise InvalidValueError("the score table has no difficulty to show. Score the beton again.")
    wanted = [None if subset is None else subset.metric, "centroid"]
    return next((name for name in wanted if name in difficulties), difficulties[0])


def _difficulties(table: ScoreTable) -> list[str]:
    return [name for name in table.metrics if name not in NOT_DIFFICULTIES]


def _summary(subject: Subject, subset: Subset | None) -> list[str]:
    table = subject.table
    pairs = {
        "images": str(table.fingerprint),
        "teacher": _joined(table.teacher),
        "view": _joined(table.view),
        "metric": subject.metric,
    }
    if (table.predictions >= 0).any():
        pairs["teacher's top-1"] = f"{(table.predictions == table.labels).mean():.2%}"
    if subset is not None:
        share = len(subset.rows) / table.num_rows
        pairs["kept"] = f"{len(subset.rows):,} of {table.num_rows:,} rows ({share:.2%})"
        pairs["chosen by"] = f"{subset.strategy}, {subset.metric}; {_joined(subset.parameters)}"
    return [facts(pairs)]


def _joined(settings: dict[str, Any]) -> str:
    """Join settings as `network resnet32x4, num_classes 100`."""
    return ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)


def _charts(subject: Subject) -> list[str]:
    table, kept = subject.table, subject.kept
    parts = [
        heading(f"How {subject.metric} is spread"),
        picture(
            histogram_png(subject.scores, kept, subject.metric),
            f"Histogram of {subject.metric} over all rows, and over the kept ones",
            may_scroll=True,
        ),
    ]
    if kept is not None:
        kept_counts = np.bincount(table.groups[kept], minlength=len(table.group_counts))
        names = [subject.class_name(label) for label in range(len(table.group_counts))]
        parts += [
            heading("What each class keeps"),
            picture(
                class_counts_png(table.group_counts, kept_counts, names),
                "Rows and kept rows of every class",
                may_scroll=True,
            ),
        ]
    names = _difficulties(table)
    return [
        *parts,
        heading("How alike the metrics rank the rows"),
        note("Spearman's rank correlation over all rows; 1 is the same order."),
        picture(correlation_png(table, names), f"Rank correlations between {', '.join(names)}"),
    ]


def _contact_sheets(
    subject: Subject, beton: Beton, labels: Sequence[int], per_strip: int
) -> list[str]:
    framed = "" if subject.kept is None else " A blue frame: kept."
    parts = [
        heading("What the images look like"),
        note(
            f"Under each image its row, its file and its {subject.metric}; in red what the teacher "
            f"takes it for, where it is wrong.{framed}"
        ),
    ]
    for label in labels:
        for title, rows in class_strips(subject, label, per_strip).items():
            parts += [
                heading(f"{subject.class_name(label)}, {title}", level=3),
                strip(_thumbnail(subject, beton, int(row)) for row in rows),
            ]
    return parts


def _chosen_labels(subject: Subject, classes: Sequence[str], count: int) -> list[int]:
    """Look up the classes that are asked for, else spread some evenly over all that have rows."""
    present = np.flatnonzero(subject.table.group_counts)
    if not classes:
        spread = np.linspace(0, len(present) - 1, min(count, len(present)))
        return [int(label) for label in present[np.unique(spread.round().astype(int))]]
    numbers = {subject.class_name(int(label)): int(label) for label in present}
    # A number is understood too: not every beton has names.
    numbers |= {str(int(label)): int(label) for label in present}
    for name in classes:
        if name not in numbers:
            hint = did_you_mean(name, numbers, list_known=False)
            raise InvalidValueError(f"class {name!r} is not in the scores.{hint}")
    return [numbers[name] for name in classes]


def _write_lists(subject: Subject, out_path: Path) -> list[str]:
    """Write the hardest rows, and rows whose label the teacher contradicts, beside the page."""
    table = subject.table
    hardest = np.argsort(-subject.scores, kind="stable")[:_LIST_ROWS]
    parts = [heading("Lists to work with")]
    parts += _write_list(subject, out_path, "hardest", hardest, "the hardest rows")
    contradicted = np.flatnonzero((table.predictions >= 0) & (table.predictions != table.labels))
    if len(contradicted):
        # The margin is how much surer the teacher is of its class than of the label.
        metric = "margin" if "margin" in table.metrics else subject.metric
        order = np.argsort(-table.metric(metric)[contradicted], kind="stable")
        suspected = contradicted[order][:_LIST_ROWS]
        text = f"rows whose label may be wrong: the teacher contradicts it, by {metric}"
        parts += _write_list(subject, out_path, "suspected", suspected, text)
    return parts


def _write_list(
    subject: Subject, out_path: Path, name: str, rows: Rows, description: str
) -> list[str]:
    path = out_path.with_name(f"{out_path.stem}-{name}.csv")
    is_kept = np.zeros(subject.table.num_rows, bool)
    is_kept[[] if subject.kept is None else subject.kept] = True
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["row", "file", "label", "class", subject.metric, "prediction", "predicted", "kept"]
    )
    for row in rows.tolist():
        label, prediction = (int(a[row]) for a in (subject.table.groups, subject.table.predictions))
        writer.writerow(
            [
                *(row, subject.files.get(row, ""), label, subject.class_name(label)),
                f"{subject.scores[row]:.6g}",
                *((prediction, subject.class_name(prediction)) if prediction >= 0 else ("", "")),
                "" if subject.kept is None else int(is_kept[row]),
            ]
        )
    write_text(path, text.getvalue())
    return [link(path.name, f"{path.name}: {description} ({len(rows):,})")]


def class_strips(subject: Subject, label: int, count: int) -> dict[str, Rows]:
    """Choose the easiest, the medium and the hardest rows of a class, ascending by score.

    Medium are the rows around the median of the class's kept rows, or of all of its rows where
    nothing, or none of the class, is kept.
    """
    members = np.flatnonzero(subject.table.groups == label)
    ascending = members[np.argsort(subject.scores[members], kind="stable")]
    kept = ascending if subject.kept is None else ascending[np.isin(ascending, subject.kept)]
    is_kept = subject.kept is not None and len(kept) > 0
    middle = kept if is_kept else ascending
    start = max(0, len(middle) // 2 - count // 2)
    return {
        "easiest": ascending[:count],
        "kept, medium" if is_kept else "medium": middle[start : start + count],
        "hardest": ascending[-count:],
    }


def _thumbnail(subject: Subject, beton: Beton, row: int) -> Thumbnail:
    prediction, label = (int(a[row]) for a in (subject.table.predictions, subject.table.groups))
    is_wrong = prediction >= 0 and prediction != label
    file = subject.files.get(row)
    return Thumbnail(
        thumbnail_png(beton, row),
        f"row {row}, {subject.class_name(label)}",
        [f"row {row:,}", *([Path(file).name] if file else []), f"{subject.scores[row]:.4g}"],
        remark=subject.class_name(prediction) if is_wrong else "",
        is_framed=subject.kept is not None and bool(np.isin(row, subject.kept)),
    )
