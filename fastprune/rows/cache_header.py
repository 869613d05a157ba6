"""What a teacher cache is of: cache.json and rows.npy, read with care and compared by name."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastprune.base.checks import require_at_least, require_one_of
from fastprune.base.errors import ArtifactError, ArtifactMismatch
from fastprune.base.files import atomic_path, write_text
from fastprune.base.provenance import Fingerprint, require_same_images
from fastprune.base.untrusted import read_json, read_npy
from fastprune.rows.cache_slot import DTYPES
from fastprune.rows.subset import checked_rows, rows_digest

_FORMAT = 1

# What an identity's entries are called, and how to make a run's equal to the cache's.
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


class CacheExistsError(ArtifactError):
    """There is a cache already where one was to be made."""


def write_header(path: Path, rows: NDArray[np.int64], settings: dict[str, Any]) -> dict[str, Any]:
    """Write rows.npy and, last, cache.json, which says that there is a cache.

    Args:
        path: the folder.
        rows: (R,) int64, sorted and unique.
        settings: num_classes, num_views, dtype and identity.

    Returns:
        The header, as `read_header` will give it.
    """
    header = {
        "format": _FORMAT,
        "num_rows": len(rows),
        "rows_digest": rows_digest(rows),
        **json.loads(json.dumps(settings)),
    }
    with atomic_path(path / "rows.npy") as temporary, temporary.open("wb") as file:
        np.save(file, rows, allow_pickle=False)
    write_text(path / "cache.json", json.dumps(header, indent=2) + "\n")
    return header


def read_header(path: Path) -> dict[str, Any]:
    """cache.json, with every entry of its kind."""
    try:
        header: dict[str, Any] = read_json(path / "cache.json")
        if header["format"] != _FORMAT:
            raise ArtifactError(
                f"{path} has format {header['format']}, but this version reads {_FORMAT}. Use the "
                "version that made it, or name another folder."
            )
        require_one_of("dtype", header["dtype"], DTYPES)
        for name in ("num_rows", "num_classes", "num_views"):
            require_at_least(name, header[name], 1)
        if not isinstance(header["identity"], dict):
            raise TypeError("identity is no object")
        if "images" in header["identity"]:
            Fingerprint.from_dict(header["identity"]["images"])
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{path} holds no teacher cache (cache.json is missing). Make one with: "
            "fastprune cache fill, or by training with teacher.cache."
        ) from error
    except OSError as error:
        # Nothing to remove here: it may be somebody's file, or a folder that others may read.
        raise ArtifactError(
            f"{path / 'cache.json'} cannot be read: {error.strerror}. Name the folder of a teacher "
            "cache that you may read."
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{path / 'cache.json'} does not describe a teacher cache ({error!r}). Remove the "
            "folder: it will be filled again."
        ) from error
    return header


def read_rows(path: Path, header: dict[str, Any]) -> NDArray[np.int64]:
    """rows.npy, if it is the one that the cache was made with."""
    try:
        rows = checked_rows(read_npy(path / "rows.npy"), name=str(path / "rows.npy"))
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{path / 'rows.npy'} cannot be read ({error}). Remove the folder {path}: it will be "
            "filled again."
        ) from error
    if len(rows) != header["num_rows"] or rows_digest(rows) != header["rows_digest"]:
        raise ArtifactError(
            f"{path / 'rows.npy'} holds other rows than {path} was made with. Put the file back, "
            "or remove the folder: it will be filled again."
        )
    return rows


def require_identity(path: Path, have: Mapping[str, Any], want: Mapping[str, Any]) -> None:
    """Compare what a cache is of with what is wanted, entry by entry.

    Args:
        path: the cache, for the message.
        have: the cache's entries; `images` holds a fingerprint's fields.
        want: the sections to compare; others are not looked at.

    Raises:
        ArtifactMismatch: one differs; it is named, with both values and the cure.
    """
    _require_same_images(path, have, want)
    for section in want.keys() - {"images"}:
        sides = ({section: side.get(section)} for side in (have, want))
        there, wanted = map(_flat, sides)
        # Of a crop policy's entries some follow from the image size, which is then what differs.
        for name in sorted(there | wanted, key=lambda name: name.startswith("view.augment")):
            _require_equal(path, name, there.get(name), wanted.get(name))


def _require_same_images(path: Path, have: Mapping[str, Any], want: Mapping[str, Any]) -> None:
    """Compare the fingerprints, where both sides have one."""
    if "images" in have and "images" in want:
        require_same_images(
            Fingerprint.from_dict(have["images"]),
            str(path),
            Fingerprint.from_dict(want["images"]),
            "the beton at hand",
            cure="Name another folder for the teacher cache of this beton.",
            labels=False,  # logits do not depend on them
        )


def _flat(identity: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"view": {"seed": 0}} -> {"view.seed": 0}; tuples become lists, as in JSON."""
    flat: dict[str, Any] = {}
    for name, value in json.loads(json.dumps(dict(identity))).items():
        is_nested = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{name}.") if is_nested else {prefix + name: value}
    return flat


def _require_equal(path: Path, name: str, have: Any, want: Any) -> None:
    """Refuse one difference by its name."""
    if have == want:
        return
    known = [key for key in _DIFFERENCES if name == key or name.startswith(f"{key}.")]
    what, cure = _DIFFERENCES[max(known, key=len)] if known else (name, "Use the same")
    detail = name.rpartition(".")[2]
    what = what if name in known else f"{what} ({detail})"
    raise ArtifactMismatch(
        f"{path} was filled with another {what}: {have}, and not {want}. "
        f"{cure.format(have=have)}, or name another folder for the teacher cache, which is filled "
        "anew."
    )
