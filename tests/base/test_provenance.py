import hashlib

import numpy as np
import pytest

from fastprune import check_beton, convert, open_beton
from fastprune.base.errors import ArtifactMismatch, ContentNotComparedWarning
from fastprune.base.provenance import (
    Difference,
    Fingerprint,
    content_digest,
    differences,
    require_same_images,
    structure_digest,
)
from fastprune.beton.beton import rows_of
from fastprune.rows.subset import Subset
from tests.images import write_image_folder

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


def check(artifact: Fingerprint, beton: Fingerprint, labels=True) -> None:
    cure = "Select again."
    require_same_images(artifact, "subset.npy", beton, "train.beton", cure=cure, labels=labels)


SUBSET, BETON = Fingerprint(3, "a" * 32, "c" * 32), Fingerprint(3, "b" * 32, "c" * 32)


def test_content_decides_on_images_where_both_sides_have_it():
    check(SUBSET, SUBSET)
    with pytest.raises(
        ArtifactMismatch, match=r"subset\.npy was made from beton cccccccc \(3 rows"
    ):
        check(SUBSET, Fingerprint(3, "a" * 32, "d" * 32))


def test_other_labels_of_the_same_images_are_refused():
    with pytest.raises(ArtifactMismatch, match=r"with other labels or image sizes\.\nSelect again"):
        check(SUBSET, BETON)
    with pytest.raises(ArtifactMismatch, match=r"images of train\.beton, .*: 2 of 3 rows differ\."):
        check(SUBSET, BETON, (LABELS, LABELS[::-1]))


def test_other_sizes_of_the_same_images_are_accepted_where_the_labels_are_known_to_be_equal():
    check(SUBSET, BETON, (LABELS, LABELS.copy()))


def test_a_cache_that_holds_no_labels_is_of_the_images_alone():
    check(SUBSET, BETON, labels=False)
    with pytest.raises(ArtifactMismatch):
        check(SUBSET, Fingerprint(3, "b" * 32, "d" * 32), labels=False)


def test_differences_are_named_through_nested_records():
    ours = {"seed": 1, "view": {"size": 224, "mean": (0.5, 0.5)}, "new": 1, "none": None}
    theirs = {"seed": 1, "view": {"size": 160, "mean": [0.5, 0.5]}, "view2": {"old": [1]}}
    assert differences(ours, theirs) == [
        Difference("view.size", 224, 160),
        Difference("new", 1, None),
        Difference("view2.old", None, [1]),
    ]
    assert differences(ours, ours) == []


def test_structure_decides_with_a_warning_where_a_side_has_no_content():
    with pytest.warns(ContentNotComparedWarning, match="contents were not compared"):
        check(Fingerprint(3, "a" * 32), Fingerprint(3, "a" * 32, "d" * 32))
    with pytest.raises(ArtifactMismatch, match=r"train\.beton is bbbbbbbb \(3 rows\)\.\nSelect"):
        check(Fingerprint(3, "a" * 32, "c" * 32), Fingerprint(3, "b" * 32))


def test_fingerprint_survives_json():
    fingerprint = Fingerprint(3, "a" * 32, None)
    assert Fingerprint.from_dict(fingerprint.to_dict()) == fingerprint


def test_subset_of_relabeled_images_is_refused(tmp_path):
    write_image_folder(tmp_path / "images", classes=1, per_class=4)
    folder = next((tmp_path / "images").iterdir())
    for name, labels in [("a", "0\n0\n1\n1\n"), ("b", "0\n1\n0\n1\n")]:
        (tmp_path / "labels.txt").write_text(labels)
        convert(folder, tmp_path / f"{name}.beton", labels=tmp_path / "labels.txt")
    a, b = (open_beton(tmp_path / f"{name}.beton") for name in "ab")
    assert a.fingerprint.content == b.fingerprint.content
    Subset(np.array([0, 2]), a.fingerprint).save(tmp_path / "subset.npy")
    assert rows_of(a, tmp_path / "subset.npy").tolist() == [0, 2]
    with pytest.raises(
        ArtifactMismatch, match=r"subset\.npy was made from the images of .*b\.beton"
    ):
        rows_of(b, tmp_path / "subset.npy")
    (fault,) = check_beton(b.path, subset=tmp_path / "subset.npy")
    assert "but with other labels or image sizes" in fault.message
