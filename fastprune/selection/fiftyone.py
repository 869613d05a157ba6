"""Scores as fields of FiftyOne's samples, and a view of them back as a subset.

Samples are matched with rows by their files: `images` is the folder that was converted.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fastprune.base.errors import ArtifactError, InvalidValueError
from fastprune.base.files import write_text
from fastprune.base.untrusted import read_json
from fastprune.beton.beton import Beton
from fastprune.rows.score_table import ScoreTable
from fastprune.rows.subset import Subset


class Samples(Protocol):
    """What is used of `fiftyone.Dataset` and `fiftyone.DatasetView`."""

    def values(self, field: str, /) -> Sequence[Any]:
        """Return a field of every sample."""
        ...

    def set_values(self, field: str, values: Sequence[Any], /) -> None:
        """Set a field of every sample."""
        ...


class ExportedSamples:
    """A dataset that FiftyOne exported (`FiftyOneDataset`): for machines without its database."""

    def __init__(self, folder: str | Path) -> None:
        """Read samples.json and metadata.json.

        Raises:
            ArtifactError: a file is missing or is not what FiftyOne writes.
        """
        self.folder = Path(folder)
        try:
            self._content = read_json(self.folder / "samples.json")
            self._metadata = read_json(self.folder / "metadata.json")
            self._samples: list[dict[str, Any]] = self._content["samples"]
            self._declared: list[dict[str, Any]] = self._metadata["sample_fields"]
            for sample in self._samples:
                sample["filepath"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"{folder} is no dataset as FiftyOne exports it ({error!r}). Export it with "
                "dataset_type=fiftyone.types.FiftyOneDataset."
            ) from error

    def values(self, field: str, /) -> list[Any]:
        """Return a field of every sample, None where it has none; file paths are absolute."""
        if field == "filepath":
            return [str(self.folder.absolute() / s["filepath"]) for s in self._samples]
        return [sample.get(field) for sample in self._samples]

    def set_values(self, field: str, values: Sequence[Any], /) -> None:
        """Set a field of every sample, and declare it."""
        for sample, value in zip(self._samples, values, strict=True):
            sample[field] = value
        if any(declared["name"] == field for declared in self._declared):
            return
        known = next((value for value in values if value is not None), None)
        # bool before int: True is one to Python.
        kinds = {bool: "BooleanField", int: "IntField", float: "FloatField"}
        # As the other fields are declared, whatever a version of FiftyOne says of a field.
        blank = dict.fromkeys(self._declared[0]) if self._declared else {}
        kind = f"fiftyone.core.fields.{kinds[type(known)]}" if known is not None else None
        self._declared.append(blank | {"name": field, "ftype": kind, "db_field": field})

    def save(self) -> None:
        """Write both files; FiftyOne imports the folder with the new fields."""
        write_text(self.folder / "metadata.json", json.dumps(self._metadata))
        write_text(self.folder / "samples.json", json.dumps(self._content))


def add_scores(
    samples: Samples,
    scores: ScoreTable,
    beton: Beton,
    images: str | Path,
    *,
    subset: Subset | None = None,
) -> int:
    """Add the row, every metric, the cluster, and whether a row is kept, as fields of samples.

    Args:
        samples: a FiftyOne dataset or view, or `ExportedSamples`; None is set where a sample is no
            row of the beton.
        scores: of the beton.
        beton: the images, with their manifest.
        images: the folder that was converted.
        subset: the kept rows, for the field `kept`.

    Returns:
        How many samples are rows.

    Raises:
        InvalidValueError: the beton has no file names, or none of the samples is one of its files.
    """
    rows = _rows_of(samples, beton, images)
    if all(row is None for row in rows):
        example = next(iter(samples.values("filepath")), "there are none")
        raise InvalidValueError(
            f"no sample is a file of {beton.path} in {images} (the first is {example}). Name the "
            "folder that was converted."
        )
    fields: dict[str, list[Any]] = {"row": list(range(beton.num_rows))}
    fields |= {name: values.tolist() for name, values in scores.metrics.items()}
    if scores.clusters is not None:
        fields["cluster"] = scores.clusters.tolist()
    if subset is not None:
        fields["kept"] = np.isin(np.arange(beton.num_rows), subset.rows).tolist()
    for name, values in fields.items():
        samples.set_values(name, [None if row is None else values[row] for row in rows])
    return sum(row is not None for row in rows)


def subset_of_view(
    view: Samples, beton: Beton, images: str | Path, *, scores: ScoreTable | None = None
) -> Subset:
    """Make a subset of the rows that a view shows, such as one that was filtered by hand.

    Args:
        view: a FiftyOne view or dataset, or `ExportedSamples`.
        beton: the images, with their manifest.
        images: the folder that was converted.
        scores: of the beton, for the class std that logit reshaping needs; or None.

    Raises:
        InvalidValueError: a sample is no file of the beton, or there are none.
    """
    rows = _rows_of(view, beton, images)
    if None in rows or not rows:
        files = list(view.values("filepath"))
        shown = f"{files[rows.index(None)]} is no file" if rows else "it shows no sample"
        raise InvalidValueError(
            f"the view is no subset of {beton.path} in {images}: {shown}. Name the folder that "
            "was converted, and show its images alone."
        )
    kept = np.unique(np.array(rows, np.int64))
    has_std = scores is not None and not np.isnan(scores.class_std).all()
    return Subset(
        rows=kept,
        fingerprint=beton.fingerprint,
        keep_ratio=len(kept) / beton.num_rows,
        strategy="imported",
        parameters={"imported_from": "FiftyOne"},
        class_counts=np.bincount(beton.labels[kept], minlength=beton.num_classes).tolist(),
        class_std=scores.class_std if scores is not None and has_std else None,
        score_seconds=None if scores is None else scores.seconds,
    )


def _rows_of(samples: Samples, beton: Beton, images: str | Path) -> list[int | None]:
    """Look up the row of every sample; None where its file is not the beton's."""
    if beton.manifest is None:
        raise InvalidValueError(
            f"{beton.path} has no manifest, which knows the files' names. Convert the images with "
            "fastprune."
        )
    lines = beton.manifest.table(["row", "source"]).to_pydict()
    # Without "..", but with links as they are: they are what both sides were named by.
    root = os.path.abspath(images)  # noqa: PTH100
    row_of = {
        os.path.normpath(f"{root}/{source}"): row
        for row, source in zip(lines["row"], lines["source"], strict=True)
        if row is not None and source is not None
    }
    paths = samples.values("filepath")
    return [row_of.get(os.path.abspath(path)) for path in paths]  # noqa: PTH100
