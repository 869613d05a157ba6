"""The score table: one line per row of the beton, with every metric of the teacher's pass."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field

from fastprune.base.checks import MAX_CLASSES
from fastprune.base.errors import ArtifactError, InvalidValueError
from fastprune.base.files import atomic_path
from fastprune.base.headers import (
    Header,
    NumberPerClass,
    SealedHeader,
    parquet_metadata,
    read_parquet_header,
    with_digest,
)
from fastprune.base.provenance import Fingerprint

_METADATA_KEY = b"fastprune"
_FIXED_COLUMNS = ("row", "label", "prediction", "cluster")


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """How hard the teacher finds every row of a beton.

    Attributes:
        labels: (N,) int64, label of every row, in row order.
        metrics: name -> (N,) float32; larger is harder (`logit_std` does not measure difficulty).
        predictions: (N,) int64, the teacher's top-1 class; -1 if unknown.
        class_std: (C,) float64, mean over all rows of a class of the unbiased standard deviation
            of the teacher's logits; NaN for a class without rows.
        class_counts: (C,) int64, rows per class.
        fingerprint: the images that were scored.
        teacher: what identifies the teacher: network name, checkpoint, weights hash.
        view: what identifies the view that was scored: image size, augmentation, mean, std.
        seconds: that the pass took, start-up included; None if not measured.
        clusters: (N,) int64 in [0, K), the cluster of every row scored without labels; else None.
        clustering: how the clusters were made: their number, seed, iterations, mean distance.
    """

    labels: NDArray[np.int64]
    metrics: dict[str, NDArray[np.float32]]
    predictions: NDArray[np.int64]
    class_std: NDArray[np.float64]
    class_counts: NDArray[np.int64]
    fingerprint: Fingerprint
    teacher: dict[str, Any] = field(default_factory=dict)
    view: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    clusters: NDArray[np.int64] | None = None
    clustering: dict[str, Any] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        """Rows in the beton, N."""
        return len(self.labels)

    @property
    def groups(self) -> NDArray[np.int64]:
        """The group of each row, (N,) int64, within which rows are ranked: cluster, else label."""
        return self.labels if self.clusters is None else self.clusters

    @property
    def group_counts(self) -> NDArray[np.int64]:
        """Rows per group, (C,) or (K,) int64."""
        if self.clusters is None:
            return self.class_counts
        return np.bincount(self.clusters, minlength=self.clustering.get("num_clusters", 0))

    def metric(self, name: str) -> NDArray[np.float32]:
        """Return one metric of every row, (N,) float32.

        Raises:
            InvalidValueError: the table has no such metric.
        """
        if name not in self.metrics:
            known = ", ".join(sorted(self.metrics))
            raise InvalidValueError(f"metric {name!r} is not in the score table; it has {known}.")
        return self.metrics[name]

    def save(self, path: str | Path) -> None:
        """Write the table as Parquet, whole or not at all.

        Raises:
            InvalidValueError: the path does not end in .parquet.
            ArtifactError: the file cannot be written.
        """
        require_parquet_name(path)
        columns: dict[str, Any] = {
            "row": np.arange(self.num_rows, dtype=np.int64),
            "label": self.labels,
            "prediction": self.predictions,
            **({} if self.clusters is None else {"cluster": self.clusters}),
            **self.metrics,
        }
        metadata = {
            "fingerprint": self.fingerprint.to_dict(),
            "teacher": self.teacher,
            "view": self.view,
            # JSON has no NaN.
            "class_std": [None if np.isnan(std) else float(std) for std in self.class_std],
            "class_counts": self.class_counts.tolist(),
            "seconds": self.seconds,
        }
        if self.clusters is not None:
            metadata["clustering"] = self.clustering
        text = json.dumps(with_digest(metadata))
        table = pa.table(columns).replace_schema_metadata({_METADATA_KEY: text})
        with atomic_path(path) as temporary:
            # Without checksums most flipped bits would come back as other scores.
            pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a table that `save` wrote.

        Raises:
            ArtifactError: the file is missing, not a score table, or damaged, or its lines are not
                the beton's rows in their order.
        """
        cure = f"Make it with: fastprune score train.beton -o {path} ..."
        # First, so that other tables are not read whole.
        header = read_parquet_header(path, _METADATA_KEY, _TableHeader, cure=cure)
        try:
            table = pq.read_table(path, page_checksum_verification=True)
            return cls._checked(table, header, path)
        except (OSError, pa.ArrowException, KeyError, ValueError) as error:
            raise ArtifactError(f"{path} cannot be read: {error}. {cure}") from error

    @classmethod
    def _checked(cls, table: pa.Table, header: "_TableHeader", path: str | Path) -> Self:
        """Make a table of a file's columns, each checked for type and range, and its header."""
        columns = {name: table[name].to_numpy() for name in table.column_names}
        # Arrays are indexed by row: a table that was sorted or filtered would be misread.
        if not np.array_equal(columns["row"], np.arange(table.num_rows)) or (
            table.num_rows != header.fingerprint.num_rows
        ):
            raise ArtifactError(
                f"{path} must have one line for each of the {header.fingerprint.num_rows:,} rows "
                "in their order, but it was sorted or filtered. Sort it by the column row, or "
                "score again."
            )
        for name, values in columns.items():
            kinds = "iu" if name in _FIXED_COLUMNS else "f"
            if values.dtype.kind not in kinds:
                raise ValueError(f"its column {name!r} holds {values.dtype}")
        labels, class_counts = columns["label"], np.array(header.class_counts, np.int64)
        counts = np.bincount(labels.clip(0, MAX_CLASSES), minlength=len(class_counts))
        if labels.min() < 0 or not np.array_equal(counts, class_counts):
            raise ValueError("its 'class_counts' are not the numbers of its labels")
        if len(header.class_std) != len(class_counts):
            raise ValueError(
                f"its 'class_std' has {len(header.class_std):,} numbers, but it has "
                f"{len(class_counts):,} classes"
            )
        clusters = columns.get("cluster")
        if clusters is not None:
            num_clusters = header.clustering.num_clusters if header.clustering else 0
            # Counts are made for each: a number from a file must not choose how many.
            if not 0 <= clusters.min() <= clusters.max() < num_clusters:
                raise ValueError(f"its 'cluster' numbers are not in [0, {num_clusters:,})")
        return cls(
            labels=labels,
            metrics={n: c for n, c in columns.items() if n not in _FIXED_COLUMNS},
            predictions=columns["prediction"],
            class_std=np.array(header.class_std, np.float64),
            class_counts=class_counts,
            fingerprint=header.fingerprint,
            teacher=header.teacher,
            view=header.view,
            seconds=header.seconds,
            clusters=clusters,
            clustering=header.clustering.model_dump() if header.clustering else {},
        )


class _Clustering(Header):
    """How the clusters of a table were made."""

    num_clusters: Annotated[int, Field(ge=1, le=MAX_CLASSES)]
    seed: int
    iterations: int
    converged: bool
    mean_distance: float


class _TableHeader(SealedHeader):
    """The JSON in the file's metadata; as the attributes of `ScoreTable`."""

    fingerprint: Fingerprint
    teacher: dict[str, Any]
    view: dict[str, Any]
    class_std: NumberPerClass
    class_counts: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MAX_CLASSES)]
    seconds: float | None = None
    clustering: _Clustering | None = None


def require_parquet_name(path: str | Path) -> None:
    """Refuse a name for a score table with another suffix.

    Raises:
        InvalidValueError: the path does not end in .parquet.
    """
    if Path(path).suffix != ".parquet":
        raise InvalidValueError(
            f"a score table is a .parquet file, but {path} has another suffix. Name it "
            f"{Path(path).with_suffix('.parquet')}; pyarrow and pandas make it a .csv."
        )


def is_score_table(path: str | Path) -> bool:
    """Whether a file is a Parquet file that `ScoreTable.save` wrote; False for any other file."""
    try:
        parquet_metadata(path, _METADATA_KEY)
    except (OSError, ValueError):
        return False
    return True
