"""Ties artifacts to what they were made from: fingerprints of images, and named differences."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from fastprune.base.errors import ArtifactMismatch, ContentNotComparedWarning, warn_user
from fastprune.base.headers import STRICT, describe

_DIGEST_BYTES = 16
_Digest = Annotated[str, Field(pattern=f"^[0-9a-f]{{{2 * _DIGEST_BYTES}}}$")]


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
        """Make a fingerprint from `to_dict`'s record; raise ValueError for anything else."""
        try:
            return TypeAdapter(cls).validate_json(json.dumps(fields))
        except ValidationError as error:
            raise ValueError(describe(error)) from None


def structure_digest(
    labels: NDArray[np.int64], widths: NDArray[np.uint16], heights: NDArray[np.uint16]
) -> str:
    """Digest labels and sizes (N,), which any beton has without a pixel being read.

    Returns:
        32 hex digits of BLAKE2b-128 over N (little-endian uint64), labels (int64), widths and
        heights (uint32).
    """
    digest = hashlib.blake2b(np.array(len(labels), "<u8").tobytes(), digest_size=_DIGEST_BYTES)
    # Fixed types and byte order: the digest is an interface between versions and machines.
    digest.update(labels.astype("<i8").tobytes())
    digest.update(widths.astype("<u4").tobytes())
    digest.update(heights.astype("<u4").tobytes())
    return digest.hexdigest()


def content_digest(source_crc32c: NDArray[np.uint32]) -> str:
    """Digest the images themselves; unchanged when JPEGs are rewritten losslessly.

    Returns:
        32 hex digits of BLAKE2b-128 over the (N,) CRC-32C of the rows' source bytes, little-endian.
    """
    data = source_crc32c.astype("<u4").tobytes()
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).hexdigest()


def require_same_images(
    artifact: Fingerprint,
    artifact_name: str,
    beton: Fingerprint,
    beton_name: str,
    *,
    cure: str,
    labels: bool | tuple[NDArray[np.int64], NDArray[np.int64]] = True,
) -> None:
    """Refuse an artifact that was made from other images or other labels than the beton's.

    Images are compared by `content` where both sides have it, else by `structure`, with a warning.
    Labels are compared by `structure`, which holds the stored sizes as well: where labels cannot be
    compared one by one, an artifact of the same images in other sizes is refused, too.

    Names and `cure` (what to run) are for the message. `labels` is False for artifacts without
    labels, such as a teacher cache: images alone are compared. It is (N,) arrays of both sides'
    labels where they are known: the message counts the rows that differ, and other sizes of the
    same images are accepted.

    Raises:
        ArtifactMismatch: images or labels differ.
    """
    contents_known = artifact.content is not None and beton.content is not None
    # Content first: all sets of CIFAR's kind with equal classes have one structure.
    same_images = (
        (artifact.content, artifact.num_rows) == (beton.content, beton.num_rows)
        if contents_known
        else artifact.structure == beton.structure
    )
    if not same_images:
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
    if labels is False or artifact.structure == beton.structure:
        return
    what = "other labels or image sizes"
    if labels is not True:
        num_differing = np.count_nonzero(labels[0] != labels[1])
        if not num_differing:
            return
        what = f"other labels: {num_differing:,} of {beton.num_rows:,} rows differ"
    raise ArtifactMismatch(
        f"{artifact_name} was made from the images of {beton_name}, but with {what}.\n{cure}"
    )


@dataclass(frozen=True, slots=True)
class Difference:
    """One entry in which two records differ.

    Attributes:
        name: of the entry; dots lead into nested ones, as in "view.seed".
        ours: the value here; None where it is missing.
        theirs: the value there; None where it is missing.
    """

    name: str
    ours: Any
    theirs: Any

    def __str__(self) -> str:
        return f"{self.name} ({self.theirs!r} there, {self.ours!r} here)"


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[Difference]:
    """Compare two records of what something was made from; every check of that kind calls this.

    A caller raises one error with the first difference, or all of them, and the cure. Fingerprints
    with and without content compare as different here; see `require_same_images`.

    Values are JSON's, possibly nested; tuples count as lists, missing entries as None.

    >>> [str(d) for d in differences({"view": {"seed": 1}}, {"view": {"seed": 0}})]
    ['view.seed (0 there, 1 here)']
    """
    here, there = _flat(ours), _flat(theirs)
    pairs = ((name, here.get(name), there.get(name)) for name in here | there)
    return [Difference(*pair) for pair in pairs if pair[1] != pair[2]]


def _flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"view": {"seed": 0}} -> {"view.seed": 0}; tuples become lists."""
    flat: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = _with_lists(value)
    return flat


def _with_lists(value: Any) -> Any:
    return [_with_lists(part) for part in value] if isinstance(value, list | tuple) else value
