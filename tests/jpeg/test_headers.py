"""The walk over a JPEG's markers: sizes, colors, damage."""

import io
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastprune.base.errors import JpegError
from fastprune.jpeg.decode import decode_view, require_whole
from fastprune.jpeg.headers import TooManyScansError, is_jpeg, read_header, require_few_scans
from tests.images import jpeg_bytes, picture
from tests.jpeg.samples import with_many_scans, with_two_frames


def encode(image, **kwargs):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **kwargs)
    return buffer.getvalue()


def frame_at(jpeg):
    """Where the payload of the baseline frame header starts."""
    return jpeg.index(b"\xff\xc0") + 4


def with_size(jpeg, width, height):
    """The same file with another size in its header."""
    place = frame_at(jpeg) + 1
    return jpeg[:place] + struct.pack(">HH", height, width) + jpeg[place + 4 :]


def test_baseline_header_tells_size_color_and_end():
    jpeg = jpeg_bytes(0, width=64, height=48)
    header = read_header(jpeg)
    assert (header.width, header.height, header.precision) == (64, 48, 8)
    assert (header.process, header.color, header.subsampled) == ("baseline", "ycbcr", True)
    assert (header.orientation, header.end) == (1, len(jpeg))


def test_progressive_full_resolution_chroma_is_told():
    header = read_header(encode(picture(0), progressive=True, subsampling=0))
    assert (header.process, header.subsampled) == ("progressive", False)


@pytest.mark.parametrize(
    ("jpeg", "color"),
    [
        (encode(picture(0, mode="L")), "gray"),
        (encode(picture(0, mode="CMYK")), "cmyk"),
        (encode(picture(0), keep_rgb=True), "rgb"),
    ],
)
def test_color_is_told_as_libjpeg_tells_it(jpeg, color):
    assert read_header(jpeg).color == color


def test_adobe_transform_two_is_ycck():
    jpeg = encode(picture(0, mode="CMYK"))
    place = jpeg.index(b"Adobe") + 11
    assert read_header(jpeg[:place] + b"\x02" + jpeg[place + 1 :]).color == "ycck"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("order", ["<", ">"])
def test_exif_orientation_is_read_in_both_byte_orders(orientation, order):
    mark = b"II*\0" if order == "<" else b"MM\0*"
    tiff = mark + struct.pack(order + "IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)
    assert read_header(encode(picture(0), exif=b"Exif\0\0" + tiff)).orientation == orientation


def test_bytes_behind_the_end_marker_are_no_part_of_the_image():
    jpeg = jpeg_bytes(0)
    assert read_header(jpeg + b"trailing").end == len(jpeg)


def test_a_thumbnails_end_marker_inside_a_segment_is_not_the_end():
    jpeg = encode(picture(0), exif=b"Exif\0\0" + jpeg_bytes(1, width=8, height=8))
    assert read_header(jpeg).end == len(jpeg)
    assert read_header(jpeg).width == 64


def test_restart_markers_do_not_end_a_scan():
    jpeg = encode(picture(0), restart_marker_rows=1)
    assert b"\xff\xd0" in jpeg
    assert read_header(jpeg).end == len(jpeg)


@pytest.mark.parametrize(
    ("jpeg", "match"),
    [
        (b"", "does not start with a JPEG's marker"),
        (b"\x89PNG", "does not start with a JPEG's marker"),
        (jpeg_bytes(0)[:-2], r"truncated: [\d,]+ bytes and no end-of-image"),
        (jpeg_bytes(0)[:300], "is cut or has length|truncated"),
        (b"\xff\xd8\xff\xe0\x00\x01", "segment E0 at byte 2 is cut or has length 1"),
        (b"\xff\xd8\xff\xd9", "has no frame header"),
        (b"\xff\xd8\xff\xc0\x00\x0b\x08\x00\x10\x00\x10\x01\x01\x11\x00\xff\xd9", "has no scan"),
        (with_size(jpeg_bytes(0), 65_535, 65_535), r"claims 65535 x 65535.*\[1, 65,500\]"),
        (with_size(jpeg_bytes(0), 64, 0), "claims 64 x 0 pixels"),
        (with_two_frames(jpeg_bytes(0)), "has two frame headers"),
        (with_size(jpeg_bytes(0), 60_000, 60_000), "60000 x 60000 pixels, which .* cannot hold"),
    ],
)
def test_damage_is_named_with_the_value(jpeg, match):
    with pytest.raises(JpegError, match=match):
        read_header(jpeg)


def test_sampling_factors_out_of_range_are_named():
    jpeg = bytearray(jpeg_bytes(0))
    jpeg[frame_at(jpeg) + 7] = 0x05
    with pytest.raises(JpegError, match=r"sampling factors \[\(0, 5\)"):
        read_header(bytes(jpeg))


@pytest.mark.parametrize(("components", "match"), [(2, "it has 2 components"), (200, "is cut")])
def test_component_counts_that_make_no_sense_are_named(components, match):
    jpeg = bytearray(jpeg_bytes(0))
    jpeg[frame_at(jpeg) + 5] = components
    with pytest.raises(JpegError, match=match):
        read_header(bytes(jpeg))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_damage_gives_a_header_or_our_error(data):
    jpeg = bytearray(encode(picture(1), exif=_EXIF))
    for _ in range(data.draw(st.integers(1, 4))):
        jpeg[data.draw(st.integers(2, len(jpeg) - 1))] = data.draw(st.integers(0, 255))
    jpeg = bytes(jpeg[: data.draw(st.integers(0, len(jpeg)))])
    try:
        header = read_header(jpeg)
    except JpegError:
        return
    assert is_jpeg(jpeg)
    assert 1 <= header.width <= 65_500
    assert header.end <= len(jpeg)


_EXIF = Image.Exif()
_EXIF[0x0112] = 6


BOMB = with_many_scans(encode(picture(1, mode="L"), progressive=True), 600)


def test_more_scans_than_any_encoder_writes_are_refused():
    with pytest.raises(JpegError, match=r"it has 501 scans or more of 64 x 48 pixels; .* have 500"):
        read_header(BOMB)


def test_as_many_scans_as_are_allowed_are_read():
    ordinary = encode(picture(1, mode="L"), progressive=True)
    count = ordinary.count(b"\xff\xda")
    assert read_header(with_many_scans(ordinary, 500 - count)).process == "progressive"


def test_fewer_scans_of_a_large_image_are_refused():
    jpeg = bytearray(with_many_scans(encode(picture(1, mode="L"), progressive=True), 60))
    frame = jpeg.index(b"\xff\xc2") + 5
    jpeg[frame : frame + 4] = (10_000).to_bytes(2) + (20_000).to_bytes(2)
    with pytest.raises(JpegError, match=r"it has 26 scans or more of 20000 x 10000 pixels"):
        read_header(bytes(jpeg))


def test_other_faults_do_not_hide_the_number_of_scans():
    first = BOMB.index(b"\xff\xda")
    for bomb in (BOMB[:-2], BOMB[:first] + b"\xff\xe5\0\0" + BOMB[first:]):
        with pytest.raises(TooManyScansError):
            require_few_scans(bomb)
    require_few_scans(encode(picture(1), progressive=True)[:-2])


def test_no_decoder_is_given_too_many_scans():
    with pytest.raises(JpegError, match=r"501 scans.*Get the file again, or leave it out"):
        decode_view(BOMB, box=(0, 0, 48, 64), size=(32, 32))
    with pytest.raises(JpegError, match="501 scans"):
        require_whole(BOMB, height=48, width=64)
