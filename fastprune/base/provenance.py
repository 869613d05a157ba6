"""Fingerprints: they tie scores and subsets to the images that they were made from."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from fastprune.base.errors import ArtifactMismatch, warn_user
from fastprune.base.headers import STRICT, describe

_DIGEST_BYTES = 16
_Digest = Annotated[str, Field(pattern=f"^[0-9a-f]{{{2 * _DIGEST_BYTES}}}$")]


class ContentNotComparedWarning(UserWarning):
    """Two artifacts agree in structure, but one of them has no content fingerprint to compare."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """The identity of the images in a beton; also a field of a `Header`, checked as one.

    Attributes:
        num_rows: rows in the beton.
        structure: 32 hex digits, BLAKE2b over N, labels, widths and heights in row order.
        content: 32 hex digits, BLAKE2b over the CRC-32C of every row's source bytes in row order;
            None where no manifest stands beside the beton.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    # Rows are int64 in every array; more are damage.
    num_rows: Annotated[int, Field(gt=0, lt=2**63)]
    structure: _Digest
    content: _Digest | None = None

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
        try:
            return TypeAdapter(cls).validate_json(json.dumps(fields))
        except ValidationError as error:
            raise ValueError(describe(error)) from None


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
