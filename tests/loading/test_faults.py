"""Damaged rows, found by checksum and named by source file; rows that were cut or changed."""

import io

import google_crc32c
import numpy as np
import pytest

from fastprune.base.errors import InvalidValueError, LoadingError
from fastprune.beton.convert.writer import convert
from fastprune.beton.opening import open_beton
from fastprune.loading.loader import Loader
from tests.images import picture, write_image_folder
from tests.jpeg.samples import with_hidden_frame


@pytest.fixture
def beton(tmp_path):
    """Twelve pictures with a manifest."""
    path = tmp_path / "small.beton"
    convert(write_image_folder(tmp_path / "images"), path, workers=1)
    return path


def _loader(path, **settings):
    defaults = {
        "batch_size": 4,
        "image_size": 16,
        "fields": ("images", "labels", "rows"),
        "train": False,
    }
    return Loader(path, **{**defaults, **settings})


def test_an_undecodable_row_is_named_with_its_source_file(beton, damage_row):
    damage_row(beton, 5, b"\0\0\0\0")
    with pytest.raises(LoadingError, match=r"row 5 of .*\(from .*class_01/001\.jpg\).*on_error="):
        list(_loader(beton))


def test_undecodable_rows_are_left_out_and_counted_where_asked(beton, damage_row):
    damage_row(beton, 5, b"\0\0\0\0")
    loader = _loader(beton, on_error="skip")
    rows = [rows.tolist() for _, _, rows in loader]
    assert rows == [[0, 1, 2, 3], [4, 6, 7], [8, 9, 10, 11]]
    assert loader.num_skipped == 1


def test_a_changed_byte_that_decodes_is_found_by_its_checksum(beton, damage_row):
    opened = open_beton(beton)
    comment = opened.image_bytes(5).tobytes().index(b"\xff\xc4") + 30
    damage_row(beton, 5, bytes([opened.image_bytes(5)[comment] ^ 1]), comment)
    assert sum(len(rows) for _, _, rows in _loader(beton, verify_crc=False)) == 12
    for settings in ({}, {"verify_crc": True}):
        with pytest.raises(LoadingError, match=r"row 5 of .* those that were written \(CRC-32C\)"):
            list(_loader(beton, **settings))
    loader = _loader(beton, on_error="skip")
    assert [sum(len(rows) for _, _, rows in loader) for _ in range(2)] == [11, 11]


@pytest.mark.parametrize(("verify_crc", "times"), [(False, 0), (None, 1), (True, 3)])
def test_checksums_are_computed_once_unless_asked_for_always(beton, monkeypatch, verify_crc, times):
    computed, value = [], google_crc32c.value
    monkeypatch.setattr(google_crc32c, "value", lambda data: computed.append(1) or value(data))
    loader = _loader(beton, verify_crc=verify_crc)
    for _ in range(3):
        list(loader)
    assert len(computed) == times * 12


def test_warming_up_on_rows_that_are_all_left_out_does_nothing(beton, damage_row):
    for row in range(4):
        damage_row(beton, row, b"\0\0\0\0")
    loader = _loader(
        beton,
        on_error="skip",
        fields=("images", "labels", "rows", "contrast_rows"),
        num_negatives=5,
    )
    loader.warm_up()
    assert [rows.tolist() for _, _, rows, _ in loader] == [[4, 5, 6, 7], [8, 9, 10, 11]]


def test_whole_rows_pass_the_checksums(beton):
    assert sum(len(rows) for _, _, rows in _loader(beton, verify_crc=True)) == 12


def test_checksums_need_a_manifest(bare_beton):
    with pytest.raises(InvalidValueError, match=r"bare\.beton has none.* --write-manifest"):
        _loader(bare_beton, verify_crc=True)


def test_a_jpeg_of_another_size_than_the_beton_says_is_refused(beton, damage_row):
    opened = open_beton(beton)
    jpeg = opened.image_bytes(5).tobytes()
    height_at = jpeg.index(b"\xff\xc0") + 5
    height = int(opened.heights[5]) - 8
    damage_row(beton, 5, height.to_bytes(2, "big"), height_at)
    with pytest.raises(LoadingError, match=r"row 5 of .* not of the size in the beton"):
        list(_loader(beton))


def test_a_jpeg_whose_size_pillow_takes_from_elsewhere_is_refused(tmp_path):
    root = write_image_folder(tmp_path / "images")
    images = sorted(root.rglob("*.jpg"))
    progressive = io.BytesIO()
    picture(1).save(progressive, "JPEG", progressive=True)
    images[5].write_bytes(with_hidden_frame(progressive.getvalue()))
    convert(root, tmp_path / "a.beton", workers=1)
    with pytest.raises(LoadingError, match=r"row 5 of .* not of the size in the beton"):
        list(_loader(tmp_path / "a.beton"))


def test_a_batch_larger_than_the_subset_holds_all_of_it(beton):
    ((images, _, rows),) = _loader(beton, batch_size=1000)
    assert len(images) == len(rows) == 12


def test_a_batch_whose_rows_are_all_left_out_is_missing(beton, damage_row):
    for row in range(4, 8):
        damage_row(beton, row, b"\0\0\0\0")
    batches = list(_loader(beton, on_error="skip"))
    assert [len(rows) for _, _, rows in batches] == [4, 4]
    assert np.concatenate([rows for _, _, rows in batches]).tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
