"""The score table: one line per row of the beton, with every metric of the teacher's pass."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fastprune.base.checks import MAX_CLASSES
from fastprune.base.errors import ArtifactError, InvalidValueError
from fastprune.base.files import atomic_path
from fastprune.base.headers import require_unchanged, with_digest
from fastprune.base.provenance import Fingerprint
from fastprune.base.untrusted import member, numbers, parquet_metadata

_METADATA_KEY = b"fastprune"
_FIXED_COLUMNS = ("row", "label", "prediction", "cluster")


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """How hard the teacher finds every row of a beton.

    Attributes:
        labels: (N,) int64, label of every row, in row order.
        metrics: name -> (N,) float32; larger is harder, except `logit_std`, which is no difficulty.
        predictions: (N,) int64, the teacher's top-1 class; -1 where it is not known.
        class_std: (C,) float64, mean over all rows of a class of the unbiased standard deviation
            of the teacher's logits; NaN for a class without rows.
        class_counts: (C,) int64, rows per class.
        fingerprint: the images that were scored.
        teacher: what identifies the teacher: network name, checkpoint, weights hash.
        view: what identifies the view that was scored: image size, augmentation, mean, std.
        seconds: that the pass took, start-up included; None where nobody measured it.
        clusters: (N,) int64 in [0, K), the cluster of every row, where rows were scored without
            labels; else None.
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
        """What rows are shared out among, (N,) int64: clusters where known, else labels."""
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
            ArtifactError: the file is missing, no Parquet, not a score table, or its lines are not
                the beton's rows in their order.
        """
        try:
            # The metadata first: a file that is no score table is not read whole.
            metadata = parquet_metadata(path, _METADATA_KEY)
            table = pq.read_table(path, page_checksum_verification=True)
            return cls._from_file(table, metadata, path)
        except FileNotFoundError as error:
            raise ArtifactError(
                f"{path} does not exist. Make it with: fastprune score train.beton -o {path} ..."
            ) from error
        except (OSError, pa.ArrowException, KeyError, ValueError) as error:
            raise ArtifactError(
                f"{path} is no score table of fastprune ({error}). "
                f"Make it with: fastprune score train.beton -o {path} ..."
            ) from error

    @classmethod
    def _from_file(cls, table: pa.Table, metadata: Any, path: str | Path) -> Self:
        """Make a table of a file's columns and metadata, each checked for type and size."""
        fingerprint = Fingerprint.from_dict(member(metadata, "fingerprint", dict))
        class_std = numbers(metadata, "class_std", max_count=MAX_CLASSES)
        class_counts = numbers(metadata, "class_counts", max_count=MAX_CLASSES)
        columns = {name: table[name].to_numpy() for name in table.column_names}
        # Arrays are indexed by row: a table that was sorted or filtered would be misread.
        if not np.array_equal(columns["row"], np.arange(table.num_rows)) or (
            table.num_rows != fingerprint.num_rows
        ):
            raise ArtifactError(
                f"{path} must have one line for each of the {fingerprint.num_rows:,} rows in "
                "their order, but it was sorted or filtered. Sort it by the column row, or "
                "score again."
            )
        labels = columns["label"]
        for name, values in columns.items():
            kinds = "iu" if name in _FIXED_COLUMNS else "f"
            if values.dtype.kind not in kinds:
                raise ValueError(f"its column {name!r} holds {values.dtype}")
        counts = np.bincount(labels.clip(0, MAX_CLASSES), minlength=len(class_counts))
        if labels.min() < 0 or not np.array_equal(counts, class_counts):
            raise ValueError("its 'class_counts' are not the numbers of its labels")
        if len(class_std) != len(class_counts):
            raise ValueError(
                f"its 'class_std' has {len(class_std):,} numbers, but it has "
                f"{len(class_counts):,} classes"
            )
        clusters = columns.get("cluster")
        clustering = member(metadata, "clustering", dict, None) or {}
        if clusters is not None:
            num_clusters = member(clustering, "num_clusters", int)
            # Counts are made for each: a number from a file must not choose how many.
            if not 0 <= clusters.min() <= clusters.max() < num_clusters <= MAX_CLASSES:
                raise ValueError(f"its 'cluster' numbers are not in [0, {num_clusters:,})")
        require_unchanged(metadata)
        return cls(
            labels=labels,
            metrics={n: c for n, c in columns.items() if n not in _FIXED_COLUMNS},
            predictions=columns["prediction"],
            class_std=class_std,
            class_counts=class_counts.astype(np.int64),
            fingerprint=fingerprint,
            teacher=member(metadata, "teacher", dict),
            view=member(metadata, "view", dict),
            seconds=member(metadata, "seconds", float, None),
            clusters=clusters,
            clustering=clustering,
        )


def require_parquet_name(path: str | Path) -> None:
    """Refuse a name for a score table that its content would belie.

    Raises:
        InvalidValueError: the path does not end in .parquet.
    """
    if Path(path).suffix != ".parquet":
        raise InvalidValueError(
            f"a score table is a .parquet file, but {path} is not named so. Name it "
            f"{Path(path).with_suffix('.parquet')}; pyarrow and pandas make it a .csv."
        )


def is_score_table(path: str | Path) -> bool:
    """Say whether a file is a Parquet file that `ScoreTable.save` wrote; no file is refused."""
    try:
        parquet_metadata(path, _METADATA_KEY)
    except (OSError, ValueError):
        return False
    return True
