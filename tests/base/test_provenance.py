import hashlib

import numpy as np
import pytest

from fastprune.base.errors import ArtifactMismatch
from fastprune.base.provenance import (
    ContentNotComparedWarning,
    Fingerprint,
    content_digest,
    require_same_images,
    structure_digest,
)

LABELS = np.array([0, 2, 1], dtype=np.int64)
WIDTHS = np.array([500, 32, 65_500], dtype=np.uint16)
HEIGHTS = np.array([375, 32, 1], dtype=np.uint16)


def test_structure_digest_is_blake2b_over_the_documented_bytes():
    data = b"".join(
        [
            (3).to_bytes(8, "little"),
            *(int(v).to_bytes(8, "little") for v in LABELS),
            *(int(v).to_bytes(4, "little") for v in WIDTHS),
            *(int(v).to_bytes(4, "little") for v in HEIGHTS),
        ]
    )
    expected = hashlib.blake2b(data, digest_size=16).hexdigest()
    assert structure_digest(LABELS, WIDTHS, HEIGHTS) == expected


@pytest.mark.parametrize("changed", ["labels", "widths", "heights"])
def test_structure_digest_changes_with_every_part(changed):
    parts = {"labels": LABELS, "widths": WIDTHS, "heights": HEIGHTS}
    other = parts | {changed: parts[changed][::-1]}
    assert structure_digest(**parts) != structure_digest(**other)


def test_content_digest_depends_on_the_order_of_rows():
    crcs = np.array([1, 2, 3], dtype=np.uint32)
    assert content_digest(crcs) != content_digest(crcs[::-1])


def check(artifact: Fingerprint, beton: Fingerprint) -> None:
    require_same_images(artifact, "subset.npy", beton, "train.beton", cure="Select again.")


def test_content_decides_where_both_sides_have_it():
    check(Fingerprint(3, "a" * 32, "c" * 32), Fingerprint(3, "b" * 32, "c" * 32))
    with pytest.raises(
        ArtifactMismatch, match=r"subset\.npy was made from beton cccccccc \(3 rows"
    ):
        check(Fingerprint(3, "a" * 32, "c" * 32), Fingerprint(3, "a" * 32, "d" * 32))


def test_structure_decides_with_a_warning_where_a_side_has_no_content():
    with pytest.warns(ContentNotComparedWarning, match="contents were not compared"):
        check(Fingerprint(3, "a" * 32), Fingerprint(3, "a" * 32, "d" * 32))
    with pytest.raises(ArtifactMismatch, match=r"train\.beton is bbbbbbbb \(3 rows\)\.\nSelect"):
        check(Fingerprint(3, "a" * 32, "c" * 32), Fingerprint(3, "b" * 32))


def test_fingerprint_survives_json():
    fingerprint = Fingerprint(3, "a" * 32, None)
    assert Fingerprint.from_dict(fingerprint.to_dict()) == fingerprint
