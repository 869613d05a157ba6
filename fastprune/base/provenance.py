"""Fingerprints: they tie scores and subsets to the images that they were made from."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fastprune.base.errors import ArtifactMismatch, warn_user
from fastprune.base.untrusted import member

_DIGEST_BYTES = 16
_DIGEST = re.compile(r"[0-9a-f]{32}")


class ContentNotComparedWarning(UserWarning):
    """Two artifacts agree in structure, but one of them has no content fingerprint to compare."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """The identity of the images in a beton.

    Attributes:
        num_rows: rows in the beton.
        structure: 32 hex digits, BLAKE2b over N, labels, widths and heights in row order.
        content: 32 hex digits, BLAKE2b over the CRC-32C of every row's source bytes in row order;
            None where no manifest stands beside the beton.
    """

    num_rows: int
    structure: str
    content: str | None = None

    def __str__(self) -> str:
        return f"{(self.content or self.structure)[:8]} ({self.num_rows:,} rows)"

    def to_dict(self) -> dict[str, Any]:
        """Return the three attributes, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Any) -> Self:
        """Make a fingerprint of what `to_dict` returned.

        Raises:
            ValueError: it is something else.
        """
        num_rows = member(fields, "num_rows", int)
        # Rows are int64 in every array; more are damage.
        if not 0 < num_rows < 2**63:
            raise ValueError(f"its 'num_rows' is {num_rows}, but must be in [1, 2**63)")
        digests = member(fields, "structure", str), member(fields, "content", str, None)
        for digest in filter(None, digests):
            if not _DIGEST.fullmatch(digest):
                raise ValueError(
                    f"its digest {digest[:40]!r} is not {2 * _DIGEST_BYTES} hex digits"
                )
        return cls(num_rows, *digests)


def structure_digest(
    labels: NDArray[np.int64], widths: NDArray[np.uint16], heights: NDArray[np.uint16]
) -> str:
    """Digest labels and sizes, which any beton has without a pixel being read.

    Args:
        labels: (N,) integers, hashed as little-endian int64.
        widths: (N,) pixels, hashed as little-endian uint32.
        heights: (N,) pixels, hashed as little-endian uint32.

    Returns:
        32 hex digits of BLAKE2b-128 over N (little-endian uint64), labels, widths, heights.
    """
    digest = hashlib.blake2b(np.array(len(labels), "<u8").tobytes(), digest_size=_DIGEST_BYTES)
    # Fixed types and byte order: the digest is an interface between versions and machines.
    digest.update(labels.astype("<i8").tobytes())
    digest.update(widths.astype("<u4").tobytes())
    digest.update(heights.astype("<u4").tobytes())
    return digest.hexdigest()


def content_digest(source_crc32c: NDArray[np.uint32]) -> str:
    """Digest the images themselves; unchanged when JPEGs are rewritten losslessly.

    Args:
        source_crc32c: (N,) CRC-32C of every row's source bytes, hashed as little-endian uint32.

    Returns:
        32 hex digits of BLAKE2b-128.
    """
    data = source_crc32c.astype("<u4").tobytes()
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).hexdigest()


def with_digest(record: dict[str, Any]) -> dict[str, Any]:
    """Add the digest of a record of JSON values to it, by which `require_unchanged` knows it."""
    return record | {"digest": _record_digest(record)}


def require_unchanged(record: dict[str, Any]) -> None:
    """Refuse a record whose values are not those that `with_digest` saw; one without is taken.

    Raises:
        ValueError: a value was changed, by damage or by hand.
    """
    if "digest" in record and record["digest"] != _record_digest(record):
        raise ValueError(
            "it was changed since it was written; without its 'digest' it is taken as it is"
        )


def _record_digest(record: dict[str, Any]) -> str:
    """BLAKE2b-128 over the JSON of all entries but the digest, in their order."""
    entries = {name: value for name, value in record.items() if name != "digest"}
    return hashlib.blake2b(json.dumps(entries).encode(), digest_size=_DIGEST_BYTES).hexdigest()


def require_same_images(
    artifact: Fingerprint, artifact_name: str, beton: Fingerprint, beton_name: str, *, cure: str
) -> None:
    """Refuse an artifact that was made from other images than the beton's.

    Where both sides have a content digest, it decides. Else the structure decides, with a warning
    that the contents were not compared.

    Args:
        artifact: the fingerprint that the artifact carries.
        artifact_name: its file name, for the message.
        beton: the fingerprint of the beton at hand.
        beton_name: its file name, for the message.
        cure: what to run, for the message.

    Raises:
        ArtifactMismatch: the images differ.
    """
    # All CIFAR-like sets of equal classes have one structure, so the content decides if it can.
    contents_known = artifact.content is not None and beton.content is not None
    if contents_known:
        same = artifact.content == beton.content and artifact.num_rows == beton.num_rows
    else:
        same = artifact.structure == beton.structure
    if not same:
        raise ArtifactMismatch(
            f"{artifact_name} was made from beton {artifact}, but {beton_name} is {beton}.\n{cure}"
        )
    if not contents_known:
        warn_user(
            f"{artifact_name} and {beton_name} agree in rows, labels and image sizes; their "
            "contents were not compared, because one of them carries no content fingerprint. "
            f"`fastprune convert` writes one into the manifest beside {beton_name}.",
            ContentNotComparedWarning,
        )
