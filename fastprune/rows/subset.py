"""Subsets: the rows of a beton that are kept, as a bare index file with a sidecar."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastprune.base.checks import MAX_CLASSES
from fastprune.base.errors import ArtifactError, InvalidValueError
from fastprune.base.files import atomic_path, write_text
from fastprune.base.headers import require_unchanged, with_digest
from fastprune.base.provenance import Fingerprint
from fastprune.base.untrusted import member, numbers, read_json, read_npy


@dataclass(frozen=True, eq=False)
class Subset:
    """The kept rows of a beton and how they were chosen.

    Attributes:
        rows: (K,) int64, sorted and unique.
        fingerprint: the images the subset was made for; None for a bare index file.
        keep_ratio: the share that was asked for, in (0, 1]; None for a bare index file.
        metric: what the rows were ranked by.
        strategy: the rule that chose them.
        parameters: the rule's other settings, such as quota and quantile.
        seed: for the strategies that draw.
        class_counts: kept rows per class, C entries; per cluster of images without classes.
        class_std: (C,) float64, as in `ScoreTable.class_std`; None for a bare index file.
        command: the command that made it.
        score_seconds: that the scoring pass behind it took; None where nobody measured it.
    """

    rows: NDArray[np.int64]
    fingerprint: Fingerprint | None = None
    keep_ratio: float | None = None
    metric: str | None = None
    strategy: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    class_counts: list[int] | None = None
    class_std: NDArray[np.float64] | None = None
    command: str | None = None
    score_seconds: float | None = None

    def save(self, path: str | Path) -> None:
        """Write `path` (the bare rows) and, beside it, the sidecar with the suffix .json.

        The sidecar holds a digest of the rows, so that a pair that does not belong together is
        noticed when it is read.

        Raises:
            InvalidValueError: the path does not end in .npy.
            ArtifactError: a file cannot be written.
        """
        final = Path(path)
        if final.suffix != ".npy":
            raise InvalidValueError(f"a subset is a .npy file, but {final} is not named so.")
        with atomic_path(final) as temporary:
            with temporary.open("wb") as file:
                np.save(file, self.rows, allow_pickle=False)
            # Rows that do not fit on the disk leave no sidecar either.
            write_text(
                final.with_suffix(".json"),
                json.dumps(with_digest(self._sidecar()), indent=2) + "\n",
            )

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read the rows and, where it is there, the sidecar.

        Raises:
            ArtifactError: no such file, no .npy file, or the sidecar is of other rows.
            InvalidValueError: the rows are not a one-dimensional, sorted, unique integer array.
        """
        path = Path(path)
        try:
            rows = read_npy(path)
        except FileNotFoundError as error:
            raise ArtifactError(
                f"{path} does not exist. Make it with: fastprune select scores.parquet -o {path}"
            ) from error
        except (OSError, ValueError) as error:
            raise ArtifactError(
                f"{path} is no numpy index file: {error}. Make it with: fastprune select "
                f"scores.parquet -o {path}"
            ) from error
        sidecar_path = path.with_suffix(".json")
        if not sidecar_path.exists():
            # Other code writes rows by class or by score. What matters is the set.
            is_plain = rows.ndim == 1 and rows.dtype.kind in "iu"
            return cls(checked_rows(np.sort(rows) if is_plain else rows, name=str(path)))
        rows = checked_rows(rows, name=str(path))
        try:
            return cls._from_sidecar(rows, read_json(sidecar_path), path)
        except (OSError, ValueError) as error:
            raise ArtifactError(
                f"{sidecar_path} is no sidecar of a subset ({error}). Remove it to use the bare "
                "rows, or make the subset again with `fastprune select`."
            ) from error

    def _sidecar(self) -> dict[str, Any]:
        """Return everything but the rows, for JSON."""
        num_rows = self.fingerprint.num_rows if self.fingerprint else None
        return {
            "num_rows": num_rows,
            "kept_rows": len(self.rows),
            "keep_ratio": self.keep_ratio,
            "keep_ratio_reached": len(self.rows) / num_rows if num_rows else None,
            "metric": self.metric,
            "strategy": self.strategy,
            "parameters": self.parameters,
            "seed": self.seed,
            "command": self.command,
            "score_seconds": self.score_seconds,
            "fingerprint": self.fingerprint.to_dict() if self.fingerprint else None,
            "rows_digest": rows_digest(self.rows),
            "class_counts": self.class_counts,
            "class_std": None
            if self.class_std is None
            else [None if np.isnan(std) else float(std) for std in self.class_std],
        }

    @classmethod
    def _from_sidecar(cls, rows: NDArray[np.int64], sidecar: Any, path: Path) -> Self:
        """Make a subset of its rows and what `_sidecar` returned."""
        if member(sidecar, "rows_digest", str) != rows_digest(rows):
            raise ArtifactError(
                f"{path.with_suffix('.json')} describes other rows than {path} holds: one of them "
                "was replaced. Make both again with `fastprune select`."
            )
        fingerprint = member(sidecar, "fingerprint", dict, None)
        class_counts = member(sidecar, "class_counts", list, None)
        class_std = member(sidecar, "class_std", list, None)
        keep_ratio = member(sidecar, "keep_ratio", float, None)
        if keep_ratio is not None and not 0 < keep_ratio <= 1:
            raise ValueError(f"its 'keep_ratio' is {keep_ratio}, but must be in (0, 1]")
        if class_counts is not None:
            counts = numbers(sidecar, "class_counts", max_count=MAX_CLASSES)
            if class_std is not None and len(class_std) != len(counts):
                raise ValueError(
                    f"its 'class_std' has {len(class_std):,} numbers, but {len(counts):,} classes "
                    "have counts"
                )
        require_unchanged(sidecar)
        return cls(
            rows=rows,
            fingerprint=None if fingerprint is None else Fingerprint.from_dict(fingerprint),
            keep_ratio=keep_ratio,
            metric=member(sidecar, "metric", str, None),
            strategy=member(sidecar, "strategy", str, None),
            parameters=member(sidecar, "parameters", dict),
            seed=member(sidecar, "seed", int, None),
            class_counts=class_counts,
            class_std=None
            if class_std is None
            else numbers(sidecar, "class_std", max_count=MAX_CLASSES),
            command=member(sidecar, "command", str, None),
            score_seconds=member(sidecar, "score_seconds", float, None),
        )


def checked_rows(rows: ArrayLike, *, name: str, num_rows: int | None = None) -> NDArray[np.int64]:
    """Return the rows as int64 if they can index a beton, else say what is wrong with them.

    Args:
        rows: what should be a one-dimensional, sorted, unique, non-empty integer array.
        name: the file or argument, for the message.
        num_rows: rows in the beton, where it is known.

    Returns:
        (K,) int64.

    Raises:
        InvalidValueError: wrong dtype or shape, empty, unsorted, duplicate, or out of range.
    """
    array = np.asarray(rows)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InvalidValueError(
            f"{name} must hold a one-dimensional array of integer rows, but it holds "
            f"{array.dtype} of shape {array.shape}. For a mask, use np.flatnonzero(mask)."
        )
    if len(array) == 0:
        raise InvalidValueError(f"{name} holds no rows; a subset must keep at least one.")
    array = array.astype(np.int64)
    steps = np.diff(array)
    if (steps <= 0).any():
        where = int(np.argmax(steps <= 0)) + 1
        raise InvalidValueError(
            f"{name} must be sorted and unique, but entry {where} ({array[where]}) follows "
            f"{array[where - 1]}. Use np.unique(rows)."
        )
    if array[0] < 0 or (num_rows is not None and array[-1] >= num_rows):
        wrong = array[0] if array[0] < 0 else array[-1]
        limit = "" if num_rows is None else f" in [0, {num_rows:,})"
        raise InvalidValueError(f"{name} holds row {wrong:,}, but rows must be{limit or ' >= 0'}.")
    return array


def rows_digest(rows: NDArray[np.int64]) -> str:
    """Return BLAKE2b-128 over the rows as little-endian int64."""
    return hashlib.blake2b(rows.astype("<i8").tobytes(), digest_size=16).hexdigest()
