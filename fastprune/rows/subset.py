"""Subsets: the rows of a beton that are kept, as a bare index file with a sidecar."""

import hashlib
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, model_validator

from fastprune.base.checks import MAX_CLASSES
from fastprune.base.errors import ArtifactError, InvalidValueError
from fastprune.base.files import atomic_path, write_text
from fastprune.base.headers import (
    NumberPerClass,
    SealedHeader,
    read_header,
    read_npy,
    with_digest,
)
from fastprune.base.provenance import Fingerprint


@dataclass(frozen=True, eq=False)
class Subset:
    """The kept rows of a beton and how they were chosen.

    Attributes:
        rows: (K,) int64, sorted and unique.
        fingerprint: the images the subset was made for; None for a bare index file.
        keep_ratio: the share that was asked for, in (0, 1]; None for a bare index file.
        metric: by which the rows were ranked.
        strategy: the rule that chose them.
        parameters: the rule's other settings, such as quota and quantile.
        seed: for the strategies that draw.
        class_counts: kept rows per class, C entries; per cluster of images without classes.
        class_std: (C,) float64, as in `ScoreTable.class_std`; None for a bare index file.
        command: the command that made it.
        score_seconds: of the scoring pass behind it; None if not measured.
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

        The sidecar holds a digest of the rows, so that `load` detects a pair of different subsets.

        Raises:
            InvalidValueError: the path does not end in .npy.
            ArtifactError: a file cannot be written.
        """
        final = Path(path)
        if final.suffix != ".npy":
            raise InvalidValueError(f"a subset is a .npy file, but {final} has another suffix.")
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
        """Read the rows and the sidecar, if there is one.

        Raises:
            ArtifactError: the file is missing, not a .npy file, or the sidecar is of other rows.
            InvalidValueError: the rows are not a one-dimensional, sorted, unique integer array.
        """
        path = Path(path)
        make = f"Make it with: fastprune select scores.parquet -o {path}"
        try:
            rows = read_npy(path)
        except FileNotFoundError as error:
            raise ArtifactError(f"{path} does not exist. {make}") from error
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{path} is not a numpy index file: {error}. {make}") from error
        sidecar_path = path.with_suffix(".json")
        if not sidecar_path.exists():
            # Other code writes rows by class or by score. Their order does not matter.
            is_plain = rows.ndim == 1 and rows.dtype.kind in "iu"
            return cls(checked_rows(np.sort(rows) if is_plain else rows, name=str(path)))
        rows = checked_rows(rows, name=str(path))
        sidecar = read_header(
            sidecar_path,
            _Sidecar,
            cure="Remove it to use the bare rows, or make the subset again with `fastprune "
            "select`.",
        )
        if sidecar.rows_digest != rows_digest(rows):
            raise ArtifactError(
                f"{sidecar_path} describes other rows than {path} holds: one of them was replaced. "
                "Make both again with `fastprune select`."
            )
        known = {name: getattr(sidecar, name) for name in _SIDECAR_FIELDS}
        if sidecar.class_std is not None:
            known["class_std"] = np.array(sidecar.class_std, np.float64)
        return cls(rows, **known)

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


class _Sidecar(SealedHeader):
    """subset.json; most keys are the attributes of `Subset`."""

    num_rows: int | None = None
    kept_rows: int | None = None
    keep_ratio: Annotated[float, Field(gt=0, le=1)] | None = None
    keep_ratio_reached: float | None = None
    metric: str | None = None
    strategy: str | None = None
    parameters: dict[str, Any]
    seed: int | None = None
    command: str | None = None
    score_seconds: float | None = None
    fingerprint: Fingerprint | None = None
    rows_digest: str
    class_counts: (
        Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MAX_CLASSES)] | None
    ) = None
    class_std: NumberPerClass | None = None

    @model_validator(mode="after")
    def _counts_and_std_are_of_the_same_classes(self) -> Self:
        counts, std = self.class_counts, self.class_std
        if counts is not None and std is not None and len(counts) != len(std):
            raise ValueError(
                f"its 'class_std' has {len(std):,} numbers, but {len(counts):,} classes have counts"
            )
        return self


_SIDECAR_FIELDS = [f.name for f in fields(Subset) if f.name != "rows"]


def checked_rows(rows: ArrayLike, *, name: str, num_rows: int | None = None) -> NDArray[np.int64]:
    """Return the rows as int64 if they can index a beton, else raise what is wrong with them.

    Args:
        rows: must be a one-dimensional, sorted, unique, non-empty integer array.
        name: the file or argument, for the message.
        num_rows: rows in the beton, if known.

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
