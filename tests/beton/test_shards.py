"""A sharded beton is the single beton of the same images, and says which shard is wrong."""

import json
import shutil

import numpy as np
import pytest

from fastprune import Loader, Subset, check_beton, compact, convert, open_beton
from fastprune.base.errors import BetonError, ConversionError, InvalidValueError, LoadingError
from fastprune.beton.dali_index import write_dali_index
from fastprune.beton.manifest import manifest_path
from fastprune.beton.shards import SET_NAME, shard_name
from fastprune.beton.summary import summarize
from tests.beton.damage import column_offset, patch
from tests.images import write_image_folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp("source") / "images", classes=5)


@pytest.fixture(scope="module")
def single(images, tmp_path_factory):
    path = tmp_path_factory.mktemp("single") / "train.beton"
    convert(images, path)
    return path


@pytest.fixture(scope="module")
def made(images, tmp_path_factory):
    """Three shards of 6, 7 and 7 rows, for tests that change nothing."""
    folder = tmp_path_factory.mktemp("sharded") / "train"
    convert(images, folder, shards=3)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    """A copy to damage."""
    return shutil.copytree(made, tmp_path / "train")


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_rows_columns_and_fingerprint_are_the_single_betons(made, single):
    one, many = open_beton(single), open_beton(made)
    assert [file.first_row for file in many.files] == [0, 6, 13]
    for name in ("labels", "widths", "heights", "sizes", "modes"):
        assert np.array_equal(getattr(one, name), getattr(many, name))
    assert many.fingerprint == one.fingerprint
    assert many.class_names == one.class_names
    for row in range(one.num_rows):
        assert np.array_equal(many.image_bytes(row), one.image_bytes(row))


def test_manifest_lines_are_the_single_betons(made, single):
    columns = ["row", "source_index", "source", "label", "stored_crc32c"]
    one, many = open_beton(single).manifest, open_beton(made).manifest
    assert many.table(columns).to_pylist() == one.table(columns).to_pylist()
    assert many.counts == one.counts


def test_shuffled_and_skipped_rows_are_the_single_betons(images, tmp_path):
    bad = shutil.copytree(images, tmp_path / "images") / "class_01" / "001.jpg"
    bad.write_bytes(b"no image")
    settings = {"shuffle_seed": 7, "on_error": "skip"}
    one = convert(tmp_path / "images", tmp_path / "one.beton", **settings)
    many = convert(tmp_path / "images", tmp_path / "many", shards=4, **settings)
    assert many.fingerprint == one.fingerprint
    columns = ["row", "source", "label", "reason"]
    assert many.table(columns).to_pylist() == one.table(columns).to_pylist()
    assert open_beton(tmp_path / "many").num_rows == 19


def test_batches_are_the_single_betons_to_the_bit(made, single, tmp_path):
    Subset(np.array([0, 3, 5, 6, 11, 12, 13, 19])).save(tmp_path / "half.npy")
    settings = {"batch_size": 3, "image_size": 16, "device": "cpu", "backend": "cpu"}

    def batches(path):
        loader = Loader(path, np.load(tmp_path / "half.npy"), seed=3, **settings)
        return [(images.tolist(), labels.tolist()) for _ in range(2) for images, labels in loader]

    assert batches(made) == batches(single)


def test_each_shard_is_a_beton_by_itself(made):
    for index, rows in enumerate((6, 7, 7)):
        assert open_beton(made / shard_name(index)).num_rows == rows
        assert check_beton(made / shard_name(index), deep=True) == []
    assert check_beton(made, deep=True) == []


def test_shards_made_one_by_one_give_the_same_bytes(images, made, tmp_path):
    for index in (2, 0):
        manifest = convert(images, tmp_path / "train", shards=3, shard=index)
        assert manifest.path == manifest_path(tmp_path / "train" / shard_name(index))
        with pytest.raises(BetonError, match=r"is unfinished: it holds . shards, but no manifest"):
            open_beton(tmp_path / "train")
    assert convert(images, tmp_path / "train", shards=3, shard=1).path.name == SET_NAME
    assert files_in(tmp_path / "train") == files_in(made)


def test_shard_whose_conversion_was_killed_is_resumed_to_the_same_bytes(images, made, folder):
    (folder / SET_NAME).unlink()
    whole = (folder / shard_name(1)).read_bytes()
    (folder / shard_name(1)).unlink()
    before = (folder / shard_name(0)).stat().st_ino
    convert(images, folder, shards=3, resume=True)
    assert (folder / shard_name(1)).read_bytes() == whole
    assert (folder / shard_name(0)).stat().st_ino == before, "a whole shard is kept"
    assert files_in(folder) == files_in(made)


def test_whole_folder_is_not_made_anew_by_accident(images, made):
    with pytest.raises(ConversionError, match=r"holds a sharded beton already\. Add --resume"):
        convert(images, made, shards=3)
    assert convert(images, made, shards=3, resume=True).fingerprint.num_rows == 20


def test_shard_of_another_conversion_is_not_resumed(images, folder):
    (folder / SET_NAME).unlink()
    with pytest.raises(BetonError, match=r"shard-00000\.beton was made from other images or with"):
        convert(images, folder, shards=3, resume=True, quality=80)


def test_compaction_dali_index_and_info_take_a_folder(made, single, tmp_path):
    rows = np.array([0, 6, 7, 19])
    for name, path in (("one", single), ("many", made)):
        compact(path, tmp_path / f"{name}.beton", subset=rows)
    assert (tmp_path / "many.beton").read_bytes() == (tmp_path / "one.beton").read_bytes()
    assert write_dali_index(made, tmp_path / "index", subset=rows) == 4
    lines = (tmp_path / "index" / "shard-00001.idx").read_text().splitlines()
    assert lines[0] == "v1.2 2"
    _, offset, size, row, *_ = lines[1].split()
    shard = (made / shard_name(1)).read_bytes()
    stored = shard[int(offset) : int(offset) + int(size)]
    assert stored == open_beton(single).image_bytes(int(row)).tobytes()
    summary = summarize(made)
    assert (summary["rows"], summary["files"]) == (20, 3)


def test_missing_shard_is_named(folder):
    (folder / shard_name(1)).unlink()
    with pytest.raises(BetonError, match=r"shard-00001\.beton is missing .*--shards 3 --resume"):
        open_beton(folder)
    assert [fault.kind for fault in check_beton(folder)] == ["shards"]


def test_foreign_shard_beside_the_others_is_named(folder, single):
    shutil.copy(single, folder / shard_name(3))
    with pytest.raises(BetonError, match=r"shard-00003\.beton is not among the 3 shards"):
        open_beton(folder)


@pytest.mark.parametrize("with_manifest", [False, True])
def test_shard_in_the_place_of_another_is_named(folder, with_manifest):
    shutil.copy(folder / shard_name(2), folder / shard_name(1))
    manifest_path(folder / shard_name(1)).unlink()
    if with_manifest:
        shutil.copy(manifest_path(folder / shard_name(2)), manifest_path(folder / shard_name(1)))
    with pytest.raises(BetonError, match=r"shard-00001\.beton is not the shard .* others"):
        open_beton(folder)
    assert [fault.kind for fault in check_beton(folder)] == ["shards"]


def test_shards_of_equal_structure_are_told_apart_by_their_manifests(tmp_path):
    images = write_image_folder(tmp_path / "images", classes=1, per_class=4, same_size=True)
    folder = tmp_path / "train"
    convert(images, folder, shards=2)
    for name in (str, manifest_path):
        shutil.copy(name(folder / shard_name(1)), name(folder / shard_name(0)))
    with pytest.raises(BetonError, match=r"shard-00000\.beton is not the shard .*: it is"):
        open_beton(folder)


def test_shards_listed_in_another_order_are_refused(folder):
    record = json.loads((folder / SET_NAME).read_text())
    record["shards"].reverse()
    (folder / SET_NAME).write_text(json.dumps(record))
    with pytest.raises(BetonError, match="does not list the shards in the order of their rows"):
        open_beton(folder)


def test_shard_listed_twice_is_named(folder):
    record = json.loads((folder / SET_NAME).read_text())
    record["shards"][1] = record["shards"][2]
    (folder / SET_NAME).write_text(json.dumps(record))
    with pytest.raises(BetonError, match=r"lists shard-00002\.beton 2 times"):
        open_beton(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"shards": []},
        {"shards": [{"file": "../a.beton"}]},
        {"shards": [3]},
        {"format": 2},
        {"fingerprint": None},
    ],
)
def test_damaged_manifest_of_the_set_is_refused(folder, change):
    record = json.loads((folder / SET_NAME).read_text())
    (folder / SET_NAME).write_text(json.dumps(record | change))
    with pytest.raises(BetonError, match=r"manifest\.json .*--shards N --resume"):
        open_beton(folder)


def test_damage_in_a_shard_is_named_by_file_and_row(folder):
    shard = folder / shard_name(1)
    patch(shard, column_offset(shard, 2, 1), (4).to_bytes(8, "little"))
    with pytest.raises(BetonError, match=r"shard-00001\.beton is damaged: label: row 2: its label"):
        open_beton(folder)
    [fault] = check_beton(folder)
    assert (fault.kind, fault.row) == ("label", 8)
    assert fault.message.startswith("shard-00001.beton: its label is 4")


def test_cut_shard_is_named(folder):
    shard = folder / shard_name(2)
    shard.write_bytes(shard.read_bytes()[:-24])
    with pytest.raises(BetonError, match=r"shard-00002\.beton cannot be used: table"):
        open_beton(folder)


def test_folder_without_shards_is_named(tmp_path):
    with pytest.raises(BetonError, match="is a folder without shards"):
        open_beton(tmp_path)


def test_loader_notices_a_shard_that_was_removed(folder):
    loader = Loader(folder, batch_size=4, image_size=16, device="cpu", backend="cpu")
    (folder / shard_name(1)).unlink()
    with pytest.raises(LoadingError, match=r"shard-00001\.beton cannot be found any more"):
        list(loader)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"shards": 0}, "shards must be an integer from 1 to 100,000"),
        ({"shards": 21}, "shards must be at most the number of images, 20"),
        ({"shards": 3, "shard": 3}, r"shard must lie in \[0, 3\)"),
        ({"shard": 0}, "shard must lie in"),
    ],
)
def test_numbers_of_shards_outside_their_domain_are_refused(images, tmp_path, settings, match):
    with pytest.raises(InvalidValueError, match=match):
        convert(images, tmp_path / "train", **settings)


def test_rows_of_the_second_gigabyte_of_addresses_are_reached(tmp_path):
    """Offsets beyond 2**31 stay whole: five shards lie apart by pages of a gigabyte."""
    root = write_image_folder(tmp_path / "images", classes=1, per_class=5)
    convert(root, tmp_path / "train", shards=5)
    convert(root, tmp_path / "one.beton")
    for index in range(5):
        # A larger page size is as true: no allocation crosses its boundaries.
        patch(tmp_path / "train" / shard_name(index), 4, (1 << 30).to_bytes(4, "little"))
    one, many = open_beton(tmp_path / "one.beton"), open_beton(tmp_path / "train")
    assert many.offsets[-1] > 1 << 32
    assert np.array_equal(many.image_bytes(4), one.image_bytes(4))
