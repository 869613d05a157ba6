"""Every fault is found and named by its row and file."""

import struct

import numpy as np
import pytest

from fastprune import Subset, check_beton, convert, open_beton
from fastprune.base.errors import (
    ArtifactError,
    BetonError,
    ForeignManifestWarning,
    InvalidValueError,
)
from fastprune.base.provenance import Fingerprint
from fastprune.beton import layout
from fastprune.beton.check import write_missing_manifest
from fastprune.beton.compact import compact
from fastprune.beton.dali_index import write_dali_index
from fastprune.beton.manifest import manifest_path
from tests.beton.damage import (
    array_arguments,
    column_offset,
    entry_offset,
    patch,
    write_plain_beton,
)
from tests.images import write_image_folder


@pytest.fixture
def plain(tmp_path):
    """A beton of another writer: several fields, no manifest."""
    return write_plain_beton(tmp_path / "plain.beton")


@pytest.fixture
def ours(tmp_path):
    """A converted beton with its manifest."""
    convert(write_image_folder(tmp_path / "images"), tmp_path / "a.beton")
    return tmp_path / "a.beton"


def u64(value):
    return struct.pack("<Q", value)


def test_whole_betons_have_no_faults(plain, ours):
    assert check_beton(plain, deep=True) == []
    assert check_beton(ours, deep=True) == []


def expect(path, kind, message, row=None):
    """The first fault is this one, and opening the beton says the same."""
    faults = check_beton(path)
    assert (faults[0].kind, faults[0].row) == (kind, row)
    assert message in faults[0].message
    with pytest.raises(BetonError) as error:
        open_beton(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "onvert the images again" in str(error.value)


# The file as a whole


@pytest.mark.parametrize(
    ("offset", "content", "kind", "message"),
    [
        (0, b"\x03\x00", "version", "format version 3, but must be 2"),
        (2, b"\x00\x00", "fields", "0 fields, but the file has"),
        (2, b"\xff\xff", "fields", "65,535 fields, but the file has"),
        (4, struct.pack("<I", 12345), "page size", "page size 12,345, but must be a power of two"),
        (4, struct.pack("<I", 1 << 20), "page size", "page size 1,048,576"),
        (4, struct.pack("<I", 0), "page size", "page size 0"),
        (8, u64(0), "rows", "it has no rows"),
        (8, u64(1 << 60), "metadata", "the header claims 1,152,921,504,606,846,976 rows"),
        (16, u64(0), "unfinished", "the write was interrupted"),
        (16, u64(1 << 60), "cut", "should start at byte 1,152,921,504,606,846,976, but the file"),
        (16, u64(1), "cut", "should start at byte 1, but"),
        (24, b"\xff", "fields", "field 0 has type 255, whose layout the file does not describe"),
        (25, b"\xe9", "fields", "is not ASCII"),
        (25, b"label\0", "fields", "two fields have the name 'label'"),
        (24 + 3 * 1041 + 17, array_arguments("<f4;", (3,)), "fields", "'vector' has a damaged"),
        (24 + 3 * 1041 + 17, array_arguments('"', (3,)), "fields", "'vector' has a damaged"),
    ],
)
def test_a_header_that_makes_no_sense(plain, offset, content, kind, message):
    patch(plain, offset, content)
    expect(plain, kind, message)


@pytest.mark.parametrize("size", [0, 23])
def test_a_file_shorter_than_a_header(plain, size):
    plain.write_bytes(plain.read_bytes()[:size])
    expect(plain, "header", f"{size} bytes are too few for a beton")


def test_a_file_cut_before_the_table(plain):
    plain.write_bytes(plain.read_bytes()[:3_000_000])
    expect(plain, "cut", "but the file has 3,000,000 bytes")


def test_a_file_cut_inside_an_entry_of_the_table(plain):
    plain.write_bytes(plain.read_bytes()[:-10])
    expect(plain, "table", "not a multiple of 24: the file was cut, or something was appended")


def test_a_file_cut_between_entries_of_the_table(plain):
    plain.write_bytes(plain.read_bytes()[:-48])
    expect(plain, "table", "has 16 entries, but 6 rows need 18: the file was cut", row=5)


def test_bytes_appended_to_the_file(plain):
    with plain.open("ab") as file:
        file.write(b"x" * 10)
    expect(plain, "table", "something was appended")


def test_an_entry_appended_to_the_file(plain):
    with plain.open("ab") as file:
        file.write(np.array([(2, layout.MIN_PAGE_BYTES + 99_840, 7)], layout.ALLOCATION).tobytes())
    expect(plain, "table", "has 19 entries, but 6 rows need 18: something was appended")


def test_a_file_that_does_not_exist_is_an_error_and_no_fault(tmp_path):
    for function in (check_beton, open_beton):
        with pytest.raises(BetonError, match=r"nowhere does not exist. Make it with"):
            function(tmp_path / "nowhere")


def test_a_folder_is_no_beton(tmp_path):
    with pytest.raises(BetonError, match="is a folder without shards"):
        open_beton(tmp_path)


def test_an_entry_without_a_row(plain):
    beton = open_beton(plain)
    # Row 1 takes row 0's note twice, so that nothing refers to its own.
    patch(plain, column_offset(plain, 1, 2, "ptr"), u64(int(beton.offsets[1] - 1024)))
    found = [(fault.kind, fault.row) for fault in check_beton(plain)]
    assert found == [("owner", 1), ("size", 1), ("orphan", 1)]


# Rows


def test_a_pointer_to_a_byte_that_the_table_does_not_list(plain):
    patch(plain, column_offset(plain, 4, 0, "data_ptr"), u64(layout.MIN_PAGE_BYTES + 1))
    expect(plain, "pointer", "its image points to byte 2,097,153, which the allocation", row=4)


def test_a_pointer_far_outside_the_file(plain):
    patch(plain, column_offset(plain, 0, 3), u64((1 << 64) - 1))
    expect(plain, "pointer", "its vector points to byte 18,446,744,073,709,551,615", row=0)


def test_a_pointer_to_another_rows_data(plain):
    other = open_beton(plain).offsets[1]
    patch(plain, column_offset(plain, 4, 0, "data_ptr"), u64(int(other)))
    expect(plain, "owner", "which the allocation table gives to row 1", row=4)


@pytest.mark.parametrize("size", [1 << 40, (1 << 64) - 1])
def test_an_allocation_beyond_the_table(plain, size):
    patch(plain, entry_offset(plain, 9, "size"), u64(size))
    expect(plain, "outside", f"of {size:,} bytes", row=3)


def test_an_allocation_inside_the_metadata(plain):
    patch(plain, entry_offset(plain, 9, "ptr"), u64(100))
    expect(plain, "outside", "at byte 100 lies outside the data", row=3)


def test_an_allocation_that_crosses_a_page(plain):
    # The last vector moves to where its last byte lies on the second page; the table moves, too.
    patch(plain, entry_offset(plain, 17, "ptr"), u64(2 * layout.MIN_PAGE_BYTES - 11))
    patch(plain, column_offset(plain, 5, 3), u64(2 * layout.MIN_PAGE_BYTES - 11))
    content = plain.read_bytes()
    table = content[2 * layout.MIN_PAGE_BYTES :]
    plain.write_bytes(content[: 2 * layout.MIN_PAGE_BYTES] + bytes(512) + table)
    patch(plain, 16, u64(2 * layout.MIN_PAGE_BYTES + 512))
    expect(plain, "page", "crosses a boundary of the 2,097,152-byte pages", row=5)


def test_allocations_that_overlap(plain):
    patch(plain, entry_offset(plain, 9, "size"), u64(5000))
    expect(plain, "overlap", "overlaps the allocation behind it", row=3)


@pytest.mark.parametrize(
    ("row", "name", "content", "kind", "message"),
    [
        (1, "mode", b"\x07", "mode", "its image has mode 7, but must be 0 (jpg) or 1 (raw)"),
        (1, "width", b"\0\0", "extent", "its image is 0 x 12 pixels"),
        (1, "height", b"\0\0", "extent", "its image is 16 x 0 pixels"),
        (2, "width", b"\x05\0", "size", "its image of 5 x 4 pixels takes 48 bytes"),
    ],
)
def test_image_metadata_that_makes_no_sense(plain, row, name, content, kind, message):
    patch(plain, column_offset(plain, row, 0, name), content)
    expect(plain, kind, message, row=row)


def test_an_array_of_the_wrong_size(plain):
    patch(plain, 24 + 3 * 1041 + 17, array_arguments("<f4", (7,)))
    expect(
        plain, "size", "its vector should take 28 bytes, but the allocation table gives 12", row=0
    )


def test_bytes_of_the_wrong_size(plain):
    patch(plain, column_offset(plain, 3, 2, "size"), u64(17))
    expect(plain, "size", "its note should take 17 bytes", row=3)


def test_a_beton_without_an_image_or_label_field_says_which_it_has(plain):
    patch(plain, 24 + 1041, b"\x00")  # int becomes float, of the same size
    faults = check_beton(plain)
    assert "has no int field for the label; its fields are image (image), label (float)" in str(
        faults[0]
    )
    with pytest.raises(BetonError, match="has no int field for the label"):
        open_beton(plain)


def test_of_very_many_faults_the_first_are_named_and_the_rest_counted(tmp_path):
    path = write_plain_beton(tmp_path / "many.beton", rows=1500)
    for row in range(1500):
        patch(path, column_offset(path, row, 0, "mode"), b"\x09")
    faults = check_beton(path)
    assert len(faults) == 1001
    assert str(faults[-1]) == "mode: and 500 more rows with this fault"


# Images


def test_a_flipped_bit_is_found_by_the_manifests_crc(ours):
    beton = open_beton(ours)
    middle = int(beton.offsets[7] + beton.sizes[7] // 2)
    patch(ours, middle, bytes([beton.content[middle] ^ 1]))
    assert check_beton(ours) == []
    [fault] = check_beton(ours, deep=True)
    assert (fault.kind, fault.row, fault.source) == ("crc", 7, "class_01/003.jpg")
    assert str(fault) == (
        "crc: row 7: its bytes are not the ones that were written (CRC-32C) (from class_01/003.jpg)"
    )


def test_damaged_images_are_found_without_a_manifest(plain):
    beton = open_beton(plain)
    patch(plain, int(beton.offsets[1]), b"garbage")
    patch(plain, int(beton.offsets[3] + beton.sizes[3]) - 2, b"\0\0")
    patch(plain, column_offset(plain, 4, 0, "width"), b"\x09\0")
    faults = check_beton(plain, deep=True)
    assert [(fault.kind, fault.row) for fault in faults] == [
        ("image", 1),
        ("image", 3),
        ("extent", 4),
    ]
    assert "its image is damaged: it does not start with a JPEG's marker" in faults[0].message
    assert "its JPEG has 16 x 12 pixels, but in the metadata 9 x 12" in faults[2].message


def test_the_other_rows_are_decoded_even_when_one_has_a_broken_pointer(plain):
    patch(plain, int(open_beton(plain).offsets[3]), b"garbage")
    patch(plain, column_offset(plain, 0, 0, "data_ptr"), u64(1 << 50))
    kinds = [(fault.kind, fault.row) for fault in check_beton(plain, deep=True)]
    assert ("pointer", 0) in kinds
    assert ("image", 3) in kinds


# The manifest


def test_a_manifest_of_another_beton_is_named_and_not_used(ours, plain):
    manifest_path(ours).rename(manifest_path(plain))
    [fault] = check_beton(plain)
    assert fault.kind == "manifest"
    assert "was made for another beton" in fault.message
    with pytest.warns(ForeignManifestWarning, match=r"made for another beton.*--write-manifest"):
        beton = open_beton(plain)
    assert beton.fingerprint.content is None
    assert beton.class_names is None


@pytest.mark.parametrize(
    ("field", "name", "content", "kind", "message"),
    [
        (1, None, u64(5), "label", "its label is 5, but in the manifest it is 1"),
        (0, "width", b"\xff\x01", "extent", "its width is 511, but in the manifest it is 47"),
        (0, "height", b"\xff\x01", "extent", "its height is 511, but in the manifest it is 41"),
    ],
)
def test_a_value_that_differs_from_the_manifest_is_named_and_refused(
    ours, tmp_path, field, name, content, kind, message
):
    patch(ours, column_offset(ours, 5, field, name), content)
    [fault] = check_beton(ours)
    assert (fault.kind, fault.row) == (kind, 5)
    assert message in fault.message
    for use in (
        open_beton,
        write_missing_manifest,
        lambda path: compact(path, tmp_path / "b.beton"),
    ):
        with pytest.raises(BetonError, match=f"is damaged: {kind}: row 5: {message}") as error:
            use(ours)
        assert "--write-manifest" not in str(error.value)
    with pytest.raises(BetonError, match=message):
        write_dali_index(ours, tmp_path / "a.idx")
    assert not (tmp_path / "b.beton").exists()


def test_a_label_beyond_all_classes_is_refused_before_anything_is_made_of_it(plain):
    patch(plain, column_offset(plain, 3, 1), u64(1 << 40))
    [fault] = check_beton(plain)
    assert (fault.kind, fault.row) == ("label", 3)
    with pytest.raises(BetonError, match="row 3: its label is 1,099,511,627,776, but labels must"):
        open_beton(plain)


def test_a_manifest_is_found_through_a_link_to_the_beton(ours, tmp_path):
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "b.beton"
    link.symlink_to(ours)
    assert open_beton(link).class_names == ("class_00", "class_01", "class_02")


def test_a_manifest_that_is_a_link_beside_a_link_is_found(ours, tmp_path):
    (tmp_path / "blobs").mkdir()
    for number, path in enumerate((ours, manifest_path(ours))):
        path.rename(tmp_path / "blobs" / str(number))
        path.symlink_to(tmp_path / "blobs" / str(number))
    assert open_beton(ours).class_names == ("class_00", "class_01", "class_02")


def test_a_damaged_manifest_is_named_and_not_used(ours):
    manifest_path(ours).write_bytes(b"PAR1")
    [fault] = check_beton(ours)
    assert fault.kind == "manifest"
    assert "cannot be read: it is not a Parquet file" in fault.message
    with pytest.warns(ForeignManifestWarning, match="cannot be read: it is not a Parquet"):
        assert open_beton(ours).class_names is None


def test_a_manifest_whose_lines_are_damaged_is_named(ours):
    content = bytearray(manifest_path(ours).read_bytes())
    content[4:600] = bytes(596)
    manifest_path(ours).write_bytes(content)
    [fault] = check_beton(ours, deep=True)
    assert fault.kind == "manifest"
    assert "cannot be read" in fault.message


def test_a_beton_of_another_writer_gets_a_manifest_and_a_content_fingerprint(plain):
    manifest = write_missing_manifest(plain)
    beton = open_beton(plain)
    assert beton.fingerprint == manifest.fingerprint
    assert beton.fingerprint.content is not None
    assert manifest.counts == {"found": 6}
    assert manifest.table()["action"].to_pylist() == ["found"] * 6
    assert check_beton(plain, deep=True) == []
    patch(plain, int(beton.offsets[2]), b"\x99")  # raw pixels: only the CRC can tell
    assert [fault.kind for fault in check_beton(plain, deep=True)] == ["crc"]


def test_a_manifest_that_knows_the_sources_is_not_overwritten(ours):
    with pytest.raises(ArtifactError, match=r"belongs to .*a\.beton already.*Remove it first"):
        write_missing_manifest(ours)


# Subsets


def test_a_subset_that_fits_has_no_faults(ours, tmp_path):
    Subset(np.array([0, 3]), fingerprint=open_beton(ours).fingerprint).save(tmp_path / "s.npy")
    assert check_beton(ours, subset=tmp_path / "s.npy") == []
    np.save(tmp_path / "bare.npy", np.array([0, 11]))
    assert check_beton(ours, subset=tmp_path / "bare.npy") == []


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.array([0, 12]), "holds row 12, but rows must be in [0, 12)"),
        (np.array([0, 1 << 60]), "holds row 1,152,921,504,606,846,976"),
        (np.array([0.0, 1.0]), "must hold a one-dimensional array of integer rows"),
        (np.array([True, False]), "For a mask, use np.flatnonzero(mask)"),
        (np.array([3, 3]), "must be sorted and unique, but entry 1 (3) follows 3"),
    ],
)
def test_rows_that_stock_ffcv_would_crash_on_are_named(ours, tmp_path, rows, message):
    np.save(tmp_path / "s.npy", rows)
    [fault] = check_beton(ours, subset=tmp_path / "s.npy")
    assert fault.kind == "subset"
    assert message in fault.message


def test_a_subset_of_other_images_is_named(ours, tmp_path):
    Subset(np.array([0]), fingerprint=Fingerprint(12, "0" * 32, "1" * 32)).save(tmp_path / "s.npy")
    [fault] = check_beton(ours, subset=tmp_path / "s.npy")
    assert "was made from beton 11111111 (12 rows), but" in fault.message


# The open beton


def test_image_bytes_are_views_that_cannot_be_written(ours):
    beton = open_beton(ours)
    stored = beton.image_bytes(3)
    assert np.shares_memory(stored, beton.content)
    assert not stored.flags.writeable


@pytest.mark.parametrize("row", [-1, 12])
def test_a_row_outside_the_beton_is_named(ours, row):
    with pytest.raises(InvalidValueError, match=rf"row {row} is outside .*\[0, 12\)"):
        open_beton(ours).image_bytes(row)


def test_labels_count_the_classes_where_no_manifest_names_them(plain, ours):
    assert open_beton(plain).num_classes == 4
    assert open_beton(ours).num_classes == 3
