"""Compaction copies rows byte for byte, with all their fields and their history."""

import errno
import socket
from pathlib import Path

import numpy as np
import pytest

from fastprune import Subset, check_beton, compact, convert, open_beton
from fastprune.base.errors import ArtifactError, ArtifactMismatch, BetonError, InvalidValueError
from fastprune.base.provenance import content_digest
from fastprune.beton import compact as module
from fastprune.beton.dali_index import write_dali_index
from fastprune.beton.manifest import manifest_path
from fastprune.beton.structure import read_tables
from tests.beton.damage import patch, write_plain_beton
from tests.images import write_image_folder

ROWS = np.array([1, 4, 5, 11])


@pytest.fixture
def ours(tmp_path):
    convert(write_image_folder(tmp_path / "images"), tmp_path / "a.beton")
    return tmp_path / "a.beton"


def test_kept_rows_have_the_same_bytes_labels_and_sizes(ours, tmp_path):
    compact(ours, tmp_path / "b.beton", subset=ROWS)
    parent, child = open_beton(ours), open_beton(tmp_path / "b.beton")
    assert check_beton(tmp_path / "b.beton", deep=True) == []
    assert child.num_rows == 4
    assert np.array_equal(child.labels, parent.labels[ROWS])
    assert np.array_equal(child.widths, parent.widths[ROWS])
    for row, original in enumerate(ROWS):
        assert np.array_equal(child.image_bytes(row), parent.image_bytes(original))


def test_the_manifest_is_carried_over_with_the_original_rows(ours, tmp_path):
    manifest = compact(ours, tmp_path / "b.beton", subset=ROWS)
    table = manifest.table()
    assert table["row"].to_pylist() == [0, 1, 2, 3]
    assert table["original_row"].to_pylist() == ROWS.tolist()
    parent = open_beton(ours).manifest.table()
    assert table["source"].to_pylist() == parent["source"].take(ROWS).to_pylist()
    crcs = parent["source_crc32c"].to_numpy()[ROWS]
    assert manifest.fingerprint.content == content_digest(crcs)
    assert manifest.settings["compacted_from"] == open_beton(ours).fingerprint.to_dict()
    child = open_beton(tmp_path / "b.beton")
    assert child.class_names == ("class_00", "class_01", "class_02")
    assert child.fingerprint == manifest.fingerprint


def test_compacting_twice_keeps_the_rows_of_the_first_beton(ours, tmp_path):
    compact(ours, tmp_path / "b.beton", subset=ROWS)
    manifest = compact(tmp_path / "b.beton", tmp_path / "c.beton", subset=np.array([0, 3]))
    assert manifest.table()["original_row"].to_pylist() == [1, 11]


def test_skipped_images_are_no_rows_of_the_child(tmp_path):
    root = write_image_folder(tmp_path / "images")
    (root / "class_00" / "000.jpg").write_bytes(b"bad")
    convert(root, tmp_path / "a.beton", on_error="skip")
    manifest = compact(tmp_path / "a.beton", tmp_path / "b.beton")
    assert manifest.counts == {"copied": 11}
    assert manifest.table()["source"][0].as_py() == "class_00/001.jpg"


def test_the_original_rows_can_be_a_field(ours, tmp_path):
    compact(ours, tmp_path / "b.beton", subset=ROWS, row_field=True)
    tables = read_tables(tmp_path / "b.beton")
    assert [(field.name, field.kind) for field in tables.fields] == [
        ("image", "image"),
        ("label", "int"),
        ("row", "int"),
    ]
    assert tables.metadata["f2"].tolist() == ROWS.tolist()
    assert check_beton(tmp_path / "b.beton", deep=True) == []
    with pytest.raises(InvalidValueError, match=r"b\.beton has a field 'row' already"):
        compact(tmp_path / "b.beton", tmp_path / "c.beton", row_field=True)


def test_every_field_of_another_writers_beton_is_copied_and_aligned(tmp_path):
    plain = write_plain_beton(tmp_path / "plain.beton")
    manifest = compact(plain, tmp_path / "b.beton", subset=np.array([1, 2, 5]))
    assert check_beton(tmp_path / "b.beton", deep=True) == []
    assert manifest.counts == {"found": 3}
    assert manifest.table()["original_row"].to_pylist() == [1, 2, 5]
    before, after = read_tables(plain), read_tables(tmp_path / "b.beton")
    assert after.fields == before.fields
    assert (after.allocations["ptr"] % 512 == 0).all()
    assert after.metadata["f4"].tolist() == [0.5] * 3
    for row, original in enumerate([1, 2, 5]):
        for index, old in ((2, before), (3, before)):
            was, now = old.metadata[f"f{index}"][original], after.metadata[f"f{index}"][row]
            size = int(was["size"]) if index == 2 else 12
            start, end = (int(one["ptr"] if index == 2 else one) for one in (was, now))
            assert np.array_equal(
                before.content[start : start + size], after.content[end : end + size]
            )


def test_without_a_subset_all_rows_are_copied(ours, tmp_path):
    compact(ours, tmp_path / "b.beton")
    child = open_beton(tmp_path / "b.beton")
    assert child.num_rows == 12
    assert child.fingerprint == open_beton(ours).fingerprint


def test_a_subset_file_is_checked_against_the_beton(ours, tmp_path):
    fingerprint = open_beton(ours).fingerprint
    Subset(ROWS, fingerprint=fingerprint).save(tmp_path / "s.npy")
    assert compact(ours, tmp_path / "b.beton", subset=tmp_path / "s.npy").fingerprint.num_rows == 4
    convert(write_image_folder(tmp_path / "others", per_class=5), tmp_path / "other.beton")
    with pytest.raises(ArtifactMismatch, match=r"(?s)s\.npy was made from .*fastprune select"):
        compact(tmp_path / "other.beton", tmp_path / "c.beton", subset=tmp_path / "s.npy")
    with pytest.raises(ArtifactMismatch, match="subset was made from beton"):
        compact(
            tmp_path / "other.beton", tmp_path / "c.beton", subset=Subset.load(tmp_path / "s.npy")
        )
    assert not (tmp_path / "c.beton").exists()


def test_rows_that_are_not_there_are_refused(ours, tmp_path):
    with pytest.raises(
        InvalidValueError, match=r"subset holds row 12, but rows must be in \[0, 12"
    ):
        compact(ours, tmp_path / "b.beton", subset=np.array([0, 12]))


def test_damaged_bytes_are_not_passed_on(ours, tmp_path):
    beton = open_beton(ours)
    patch(ours, int(beton.offsets[4]) + 300, bytes([beton.image_bytes(4)[300] ^ 1]))
    with pytest.raises(BetonError, match=r"row 4 \(from class_01/000\.jpg\).*CRC-32C.*--deep"):
        compact(ours, tmp_path / "b.beton", subset=ROWS)
    assert sorted(path.name for path in tmp_path.glob("*b.beton*")) == []


def test_a_beton_is_not_compacted_into_itself(ours):
    with pytest.raises(InvalidValueError, match=r"cannot be compacted into itself. Name another"):
        compact(ours, ours.parent / "." / ours.name)


def test_a_folder_that_does_not_exist_is_named(ours, tmp_path):
    with pytest.raises(ArtifactError, match=r"the folder .*nowhere does not exist"):
        compact(ours, tmp_path / "nowhere" / "b.beton")


def test_an_older_beton_stands_until_the_new_manifest_is_written(ours, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    compact(ours, tmp_path / "b.beton", subset=ROWS)
    monkeypatch.setattr(module, "write_parquet", full)
    with pytest.raises(
        ArtifactError, match=r"cannot write .*b\.beton\.manifest\.parquet: No space"
    ):
        compact(ours, tmp_path / "b.beton")
    child = open_beton(tmp_path / "b.beton")
    assert (child.num_rows, child.fingerprint.content is None) == (4, False)
    assert not list(tmp_path.glob(".*"))


def test_older_pair_comes_back_when_the_new_one_cannot_get_its_name(ours, tmp_path, monkeypatch):
    path = tmp_path / "b.beton"
    compact(ours, path, subset=ROWS)
    before = (path.read_bytes(), manifest_path(path).read_bytes())
    replace = Path.replace

    def interrupted(self, target):
        if target == path and self.name.endswith(".tmp"):
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compact(ours, path)
    assert (path.read_bytes(), manifest_path(path).read_bytes()) == before
    assert not [*tmp_path.glob(".*"), *tmp_path.glob("*.replaced*")]


def test_socket_is_not_replaced_by_a_beton(ours, tmp_path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        with pytest.raises(ArtifactError, match=r"cannot write .*: it is a socket"):
            compact(ours, tmp_path / "s")


def test_raw_images_cannot_be_indexed_for_dali(tmp_path):
    plain = write_plain_beton(tmp_path / "plain.beton")
    with pytest.raises(BetonError, match=r"row 2 is stored raw. Convert the images again"):
        write_dali_index(plain, tmp_path / "a.idx")
