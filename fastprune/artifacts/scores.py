"""The score table: one line per row of the beton, with every metric of the teacher's pass."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fastprune.artifacts.atomic import atomic_path
from fastprune.artifacts.fingerprint import Fingerprint
from fastprune.errors import ArtifactError, InvalidValueError

_METADATA_KEY = b"fastprune"
_FIXED_COLUMNS = ("row", "label", "prediction")


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """How hard the teacher finds every row of a beton.

    Attributes:
        labels: (N,) int64, label of every row, in row order.
        metrics: name -> (N,) float32; larger is harder, except `logit_std`, which is no difficulty.
        predictions: (N,) int64, the teacher's top-1 class.
        class_std: (C,) float64, mean over all rows of a class of the unbiased standard deviation
            of the teacher's logits; NaN for a class without rows.
        class_counts: (C,) int64, rows per class.
        fingerprint: the images that were scored.
        teacher: what identifies the teacher: network name, checkpoint, weights hash.
        view: what identifies the view that was scored: image size, augmentation, mean, std.
        seconds: that the pass took, start-up included; None where nobody measured it.
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

    @property
    def num_rows(self) -> int:
        """Rows in the beton, N."""
        return len(self.labels)

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
            ArtifactError: the file cannot be written.
        """
        columns: dict[str, Any] = {
            "row": np.arange(self.num_rows, dtype=np.int64),
            "label": self.labels,
            "prediction": self.predictions,
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
        table = pa.table(columns).replace_schema_metadata({_METADATA_KEY: json.dumps(metadata)})
        with atomic_path(path) as temporary:
            pq.write_table(table, temporary, compression="zstd")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a table that `save` wrote.

        Raises:
            ArtifactError: the file is missing, no Parquet, not a score table, or its lines are not
                the beton's rows in their order.
        """
        try:
            table = pq.read_table(path)
            metadata = json.loads((table.schema.metadata or {})[_METADATA_KEY])
            columns = {name: table[name].to_numpy() for name in table.column_names}
            fingerprint = Fingerprint.from_dict(metadata["fingerprint"])
            # Arrays are indexed by row: a table that was sorted or filtered would be misread.
            if not np.array_equal(columns["row"], np.arange(fingerprint.num_rows)):
                raise ArtifactError(
                    f"{path} must have one line for each of the {fingerprint.num_rows:,} rows in "
                    "their order, but it was sorted or filtered. Sort it by the column row, or "
                    "score again."
                )
            return cls(
                labels=columns["label"],
                metrics={n: c for n, c in columns.items() if n not in _FIXED_COLUMNS},
                predictions=columns["prediction"],
                class_std=np.array(metadata["class_std"], dtype=np.float64),
                class_counts=np.array(metadata["class_counts"], dtype=np.int64),
                fingerprint=fingerprint,
                teacher=metadata["teacher"],
                view=metadata["view"],
                seconds=metadata.get("seconds"),
            )
        except FileNotFoundError as error:
            raise ArtifactError(
                f"{path} does not exist. Make it with: fastprune score train.beton -o {path} ..."
            ) from error
        except (OSError, pa.ArrowException, KeyError, ValueError) as error:
            raise ArtifactError(
                f"{path} is no score table of fastprune ({error}). "
                f"Make it with: fastprune score train.beton -o {path} ..."
            ) from error


def is_score_table(path: str | Path) -> bool:
    """Say whether a file is a Parquet file that `ScoreTable.save` wrote; no file is refused."""
    try:
        return _METADATA_KEY in (pq.read_schema(path).metadata or {})
    except (OSError, pa.ArrowException):
        return False
