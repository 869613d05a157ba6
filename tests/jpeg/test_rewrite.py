"""The lossless rewrite to restart rows."""

import io
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastprune.base.errors import JpegError
from fastprune.jpeg import rewrite
from fastprune.jpeg.best_table import best_table
from fastprune.jpeg.decode import decode_view
from fastprune.jpeg.headers import read_header
from fastprune.jpeg.rewrite import to_restart_rows
from tests.images import picture
from tests.jpeg.samples import encode, known_kinds

KINDS = known_kinds()


def pixels(jpeg):
    """The whole picture, decoded by Pillow: another decoder, accurate to the coefficient."""
    image = Image.open(io.BytesIO(jpeg))
    image.load()
    return np.asarray(image)


@pytest.mark.parametrize("kind", KINDS)
def test_rewritten_file_has_the_same_picture_in_another_decoder(kind):
    rewritten = to_restart_rows(KINDS[kind])
    np.testing.assert_array_equal(pixels(rewritten), pixels(KINDS[kind]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("box", [(0, 0, 61, 48), (9, 11, 40, 30), (50, 30, 11, 18)])
def test_views_of_rewritten_and_original_file_are_the_same(kind, box):
    views = [
        decode_view(j, box=box, size=(32, 32)) for j in (KINDS[kind], to_restart_rows(KINDS[kind]))
    ]
    np.testing.assert_array_equal(*views)


def test_rewriting_twice_gives_the_same_bytes():
    once = to_restart_rows(KINDS["4:2:0"])
    assert to_restart_rows(once) == once


@pytest.mark.parametrize("kind", ["4:2:0", "gray", "restart blocks"])
def test_a_rewrite_with_any_wrong_bit_is_not_handed_out(kind, monkeypatch):
    honest = rewrite._scan
    bits = 8 * len(honest_scan(KINDS[kind], monkeypatch))
    for bit in np.random.default_rng(1).integers(0, bits, 400).tolist():

        def wrong(*arguments, bit=bit):
            scan = bytearray(honest(*arguments))
            scan[bit // 8] ^= 1 << bit % 8
            return scan

        monkeypatch.setattr(rewrite, "_scan", wrong)
        rewritten = to_restart_rows(KINDS[kind])
        # A bit of what fills up a row's last byte is of no account.
        if rewritten is not None:
            np.testing.assert_array_equal(pixels(rewritten), pixels(KINDS[kind]))


def honest_scan(jpeg, monkeypatch):
    """What the scan is before anything is done to it."""
    scans = []
    honest = rewrite._scan
    with monkeypatch.context() as patch:
        patch.setattr(
            rewrite, "_scan", lambda *arguments: scans.append(bytes(honest(*arguments))) or scans[0]
        )
        to_restart_rows(jpeg)
    return scans[0]


@pytest.mark.parametrize("marker", [b"\xff\xdb", b"\xff\xc0"])
def test_a_rewrite_with_another_table_or_size_is_not_handed_out(marker, monkeypatch):
    honest = rewrite._header

    def wrong(*arguments):
        header = bytearray(honest(*arguments))
        header[header.index(marker) + 6] ^= 1
        return bytes(header)

    monkeypatch.setattr(rewrite, "_header", wrong)
    assert to_restart_rows(KINDS["4:2:0"]) is None


def test_there_is_a_restart_marker_after_each_row_of_units():
    rewritten = to_restart_rows(encode(picture(2, width=83, height=200), subsampling=2))
    interval = rewritten.index(b"\xff\xdd\x00\x04") + 4
    assert int.from_bytes(rewritten[interval : interval + 2]) == 6  # ceil(83 / 16)
    scan = rewritten[rewritten.index(b"\xff\xda") :]
    markers = [b for a, b in itertools.pairwise(scan) if a == 0xFF and 0xD0 <= b <= 0xD7]
    assert markers == [0xD0 + n % 8 for n in range(12)]  # ceil(200 / 16) rows


def test_own_dc_tables_pay_for_the_markers():
    jpeg = encode(picture(2, width=400, height=300))
    assert len(to_restart_rows(jpeg)) < len(jpeg)


def test_each_component_keeps_its_ac_table():
    jpeg = KINDS["4:2:0"]
    scan = jpeg.index(b"\xff\xda")
    table = jpeg.index(b"\x11", jpeg.index(b"\xff\xc4", jpeg.index(b"\xff\xc4") + 30))
    while jpeg[table + 1 : table + 4] != b"\x00\x02\x01":  # the standard's table for chroma
        table = jpeg.index(b"\x11", table + 1)
    spec = jpeg[table + 1 : table + 17 + sum(jpeg[table + 1 : table + 17])]
    third = b"\xff\xc4" + (len(spec) + 3).to_bytes(2) + b"\x12" + spec
    cr = scan + 5 + 2 * 2 + 1
    other = jpeg[:scan] + third + jpeg[scan:cr] + b"\x12" + jpeg[cr + 1 :]
    rewritten = to_restart_rows(other)
    assert rewritten[rewritten.index(b"\xff\xda") + 5 :][:6] == b"\x01\x00\x02\x11\x03\x12"
    np.testing.assert_array_equal(pixels(rewritten), pixels(jpeg))


def test_rows_of_another_restart_interval_are_cut_anew():
    source = encode(picture(3, width=90, height=70), restart_marker_blocks=4)
    rewritten = to_restart_rows(source)
    assert b"\xff\xdd\x00\x04\x00\x06" in rewritten  # ceil(90 / 16)
    np.testing.assert_array_equal(pixels(rewritten), pixels(source))


def test_metadata_is_kept_and_what_follows_the_image_is_not():
    exif = Image.Exif()
    exif[0x0112] = 6
    rewritten = to_restart_rows(encode(picture(2), exif=exif, comment=b"hello") + b"trailing")
    assert read_header(rewritten).orientation == 6
    assert read_header(rewritten).end == len(rewritten)
    assert b"hello" in rewritten


@pytest.mark.parametrize(
    "jpeg",
    [encode(picture(1), progressive=True), encode(picture(1, mode="CMYK")), b"", b"\xff\xd8\xff"],
)
def test_other_kinds_are_left_alone(jpeg):
    assert to_restart_rows(jpeg) is None


def test_damaged_data_is_named():
    with pytest.raises(JpegError, match=r"cannot be rewritten: .* too early"):
        to_restart_rows(KINDS["4:2:0"][:-300])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 10**9), min_size=256, max_size=256))
def test_table_is_a_prefix_code_of_at_most_16_bits(counts):
    counts[7] += 1
    histogram, symbols = best_table(counts)
    assert sorted(symbols) == [symbol for symbol in range(256) if counts[symbol]]
    assert sum(histogram) == len(symbols)
    # Kraft's sum leaves room for the code of all ones.
    assert sum(n << (16 - length) for length, n in enumerate(histogram, 1)) < 1 << 16


def test_fibonacci_counts_are_held_to_16_bits():
    counts, pair = [0] * 256, (1, 1)
    for symbol in range(60):
        counts[symbol], pair = pair[0], (pair[1], sum(pair))
    histogram, symbols = best_table(counts)
    assert len(symbols) == 60
    assert sum(n << (16 - length) for length, n in enumerate(histogram, 1)) < 1 << 16
