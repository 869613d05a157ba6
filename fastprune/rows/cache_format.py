"""The files of a teacher cache: header, rows, and how logits are stored; see docs/formats.md."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from fastprune.base.errors import ArtifactError, ArtifactMismatch, InvalidValueError
from fastprune.base.files import atomic_path, write_text
from fastprune.base.headers import read_header, read_npy
from fastprune.base.provenance import Fingerprint, differences, require_same_images
from fastprune.rows.store import RowStore, StoreHeader
from fastprune.rows.subset import checked_rows, rows_digest

HEADER_NAME = "cache.json"
ROWS_NAME = "rows.npy"
DTYPES = ("float16", "float32", "uint8")

# What the entries of an identity are called, and how to make a run's equal to the cache's.
_DIFFERENCES = {
    "num_views": ("number of recurring views", "Set data.num_views = {have} (--num-views)"),
    "num_classes": ("number of classes", "Take the teacher of these classes"),
    "view.augment": ("crop policy", "Set data.augment as it was (--augment)"),
    "view.image_size": (
        "image size seen by the teacher",
        "Set data.image_size = {have} (--image-size)",
    ),
    "view.seed": ("seed of the views", "Set data.seed = {have} (--seed)"),
    "view.mean": ("mean", "Set data.mean = {have} (--mean)"),
    "view.std": ("std", "Set data.std = {have} (--std)"),
    "view.transform": ("transform", "Use the same transform"),
    "decoder": ("decoder", "Use the backend and the version that filled it"),
    "teacher.precision": ("teacher's precision", "Set run.precision as it was (--precision)"),
    "teacher": ("teacher", "Name the teacher that filled it"),
}

_Count = Annotated[int, Field(ge=1)]


class CacheHeader(StoreHeader):
    """What cache.json holds.

    Attributes:
        format: of the folder.
        rows_digest: of rows.npy, as in a subset's sidecar.
        num_classes: C.
        num_views: K.
        dtype: that the slots store.
    """

    format: Literal[1] = 1
    rows_digest: str
    num_classes: _Count
    num_views: _Count
    dtype: Literal["float16", "float32", "uint8"]

    @field_validator("identity")
    @classmethod
    def _images_are_a_fingerprint(cls, identity: dict[str, Any]) -> dict[str, Any]:
        try:
            if "images" in identity:
                Fingerprint.from_dict(identity["images"])
        except ValueError as error:
            raise ValueError(f"has no fingerprint of images ({error})") from None
        return identity


def write_cache_header(path: Path, rows: NDArray[np.int64], **settings: Any) -> CacheHeader:
    """Write rows.npy and then cache.json, with which the cache exists.

    Args:
        path: the folder.
        rows: (R,) int64, sorted and unique.
        settings: num_classes, num_views, dtype and identity.

    Returns:
        The header, as `read_cache_header` will return it.
    """
    text = json.dumps(
        {"format": 1, "num_rows": len(rows), "rows_digest": rows_digest(rows), **settings}, indent=2
    )
    header = CacheHeader.model_validate_json(text)
    with atomic_path(path / ROWS_NAME) as temporary, temporary.open("wb") as file:
        np.save(file, rows, allow_pickle=False)
    write_text(path / HEADER_NAME, text + "\n")
    return header


def read_cache_header(path: Path) -> CacheHeader:
    """Read cache.json of a folder.

    Raises:
        ArtifactError: it is missing, cannot be read, or does not describe a teacher cache.
    """
    try:
        return read_header(
            path / HEADER_NAME,
            CacheHeader,
            cure="Use the version of fastprune that made the cache, or remove the folder: it will "
            "be filled again.",
        )
    except ArtifactError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise ArtifactError(
                f"{path} holds no teacher cache (cache.json is missing). Make one with: "
                "fastprune cache fill, or by training with teacher.cache."
            ) from error
        if isinstance(error.__cause__, OSError):
            # Nothing to remove here: a file of another kind, or a folder that others may read.
            raise ArtifactError(
                f"{path / HEADER_NAME} cannot be read: {error.__cause__.strerror}. Name the folder "
                "of a teacher cache that you may read."
            ) from error
        raise


def read_cache_rows(path: Path, header: CacheHeader) -> NDArray[np.int64]:
    """Read rows.npy, and refuse other rows than the cache was made with."""
    try:
        rows = checked_rows(read_npy(path / ROWS_NAME), name=str(path / ROWS_NAME))
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{path / ROWS_NAME} cannot be read ({error}). Remove the folder {path}: it will be "
            "filled again."
        ) from error
    if len(rows) != header.num_rows or rows_digest(rows) != header.rows_digest:
        raise ArtifactError(
            f"{path / ROWS_NAME} holds other rows than {path} was made with. Put the file back, "
            "or remove the folder: it will be filled again."
        )
    return rows


def require_identity(path: Path, have: Mapping[str, Any], want: Mapping[str, Any]) -> None:
    """Compare what a cache holds the logits of with what is wanted.

    Args:
        path: the cache, for the message.
        have: the cache's entries; `images` holds a fingerprint's fields.
        want: the sections to compare; others are not looked at.

    Raises:
        ArtifactMismatch: one differs; it is named, with both values and the cure.
    """
    if "images" in have and "images" in want:
        require_same_images(
            Fingerprint.from_dict(have["images"]),
            str(path),
            Fingerprint.from_dict(want["images"]),
            "the beton at hand",
            cure="Name another folder for the teacher cache of this beton.",
            labels=False,  # logits do not depend on them
        )
    sections = want.keys() - {"images"}
    found = differences(
        *({name: side[name] for name in sections & side.keys()} for side in (want, have))
    )
    if not found:
        return
    # The image size decides some entries of a crop policy, so it is named before them.
    first = min(found, key=lambda one: (one.name.startswith("view.augment"), one.name))
    known = [key for key in _DIFFERENCES if first.name == key or first.name.startswith(f"{key}.")]
    what, cure = _DIFFERENCES[max(known, key=len)] if known else (first.name, "Use the same")
    if known and first.name not in known:
        what = f"{what} ({first.name.rpartition('.')[2]})"
    raise ArtifactMismatch(
        f"{path} was filled with another {what}: {first.theirs}, and not {first.ours}. "
        f"{cure.format(have=first.theirs)}, or name another folder for the teacher cache, which "
        "will be filled from the start."
    )


def slot_store(folder: Path, slot: int, header: CacheHeader) -> RowStore:
    """The store of one slot, whose field is `slot_field(slot)`."""
    return RowStore(
        folder,
        header.num_rows,
        {slot_field(slot): stored_dtype(header.dtype, header.num_classes)},
        marks=f"filled-{slot:03d}",
        checksums=f"crc32c-{slot:03d}",
    )


def slot_field(slot: int) -> str:
    """The field of a slot's logits, and the name of its file without .npy."""
    return f"slot-{slot:03d}"


def stored_dtype(dtype: str, num_classes: int) -> np.dtype[Any]:
    """One row of a slot: C numbers, or an offset, a scale and C codes."""
    if dtype == "uint8":
        return np.dtype([("offset", "<f2"), ("scale", "<f2"), ("codes", "u1", (num_classes,))])
    return np.dtype((np.dtype(dtype).newbyteorder("<"), (num_classes,)))


def encode(logits: NDArray[np.float32], rows: NDArray[np.int64], dtype: str) -> NDArray[np.generic]:
    """Turn logits into what a slot stores.

    Args:
        logits: (n, C) float32.
        rows: (n,) int64, their rows, for the message.
        dtype: one of `DTYPES`.

    Returns:
        (n, C) float16 or float32; or (n,) records of an offset, a scale and C uint8 codes, whose
        logits are offset + scale * code.

    Raises:
        InvalidValueError: a logit is NaN or infinite, or too large for the dtype.
    """
    _require_finite(logits, rows, "is NaN or infinite", "Check the teacher's weights and input.")
    too_large = f"is too large for {dtype} (largest {np.abs(logits).max(initial=0):g})"
    wider = 'Make the cache with dtype "float32".'
    if dtype != "uint8":
        with np.errstate(over="ignore"):
            stored = logits.astype(dtype)
        _require_finite(stored, rows, too_large, wider)
        return stored
    records: NDArray[Any] = np.empty(len(logits), stored_dtype(dtype, logits.shape[1]))
    low, high = logits.min(axis=1), logits.max(axis=1)
    # Offset rounds down and scale up, so that 0 to 255 reaches every logit of the row.
    with np.errstate(over="ignore", invalid="ignore"):
        offset = low.astype(np.float16)
        offset = np.where(offset > low, np.nextafter(offset, np.float16(-np.inf)), offset)
        span = high - offset.astype(np.float32)
        scale = (span / 255).astype(np.float16)
        scale = np.where(
            scale.astype(np.float32) * 255 < span, np.nextafter(scale, np.float16(np.inf)), scale
        )
    _require_finite(np.stack([offset, scale], axis=1), rows, too_large, wider)
    step = np.where(scale > 0, scale, 1).astype(np.float32)[:, None]
    codes = np.rint((logits - offset.astype(np.float32)[:, None]) / step)
    records["offset"], records["scale"] = offset, scale
    records["codes"] = codes.clip(0, 255).astype(np.uint8)
    return records


def decode(stored: NDArray[Any]) -> NDArray[np.float32]:
    """Invert `encode`, up to its rounding: (n, C) float32."""
    if stored.dtype.names is None:
        return stored.astype(np.float32)
    scale = stored["scale"].astype(np.float32)[:, None]
    offset = stored["offset"].astype(np.float32)[:, None]
    decoded: NDArray[np.float32] = stored["codes"].astype(np.float32) * scale + offset
    return decoded


def _require_finite(
    values: NDArray[np.floating], rows: NDArray[np.int64], fault: str, cure: str
) -> None:
    """Name the first row with a value that is not finite."""
    is_bad = ~np.isfinite(values).all(axis=1)
    if is_bad.any():
        row = int(rows[np.argmax(is_bad)])
        raise InvalidValueError(f"a logit of the teacher for row {row:,} {fault}. {cure}")
