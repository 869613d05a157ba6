"""Every strange image is copied, transcoded, or refused with a reason; none gets through broken."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from fastprune import check_beton, convert, open_beton
from fastprune.base.errors import ConversionError
from fastprune.beton.convert.transcode import prepare_image
from fastprune.settings import ImageSettings
from tests.images import jpeg_bytes, picture


def encode(image, kind, **kwargs):
    buffer = io.BytesIO()
    image.save(buffer, kind, **kwargs)
    return buffer.getvalue()


def ycck():
    jpeg = encode(picture(0, mode="CMYK"), "JPEG")
    place = jpeg.index(b"Adobe") + 11
    return jpeg[:place] + b"\x02" + jpeg[place + 1 :]


def with_size(jpeg, width, height):
    place = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:place] + struct.pack(">HH", height, width) + jpeg[place + 4 :]


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(picture(0), "JPEG", exif=exif)


def sixteen_bit():
    ramp = np.linspace(0, 65_535, 64 * 48).reshape(48, 64).astype(np.uint16)
    return encode(Image.fromarray(ramp), "PNG")


def palette_with_alpha():
    image = picture(0).convert("P")
    return encode(image, "PNG", transparency=bytes(range(256)))


def animation():
    return encode(picture(0), "GIF", save_all=True, append_images=[picture(1), picture(2)])


COPIED = {
    "baseline.jpg": jpeg_bytes(0),
    "gray.jpg": encode(picture(0, mode="L"), "JPEG"),
    "progressive.jpg": encode(picture(0), "JPEG", progressive=True),
    "full_chroma.jpg": encode(picture(0), "JPEG", subsampling=0),
    "rotated.jpg": rotated(),
    "one_pixel.jpg": encode(picture(0).resize((1, 1)), "JPEG"),
    "a png by name.png": jpeg_bytes(1),
}
TRANSCODED = {
    "cmyk.jpg": (encode(picture(0, mode="CMYK"), "JPEG"), "CMYK JPEG"),
    "ycck.jpg": (ycck(), "YCCK JPEG"),
    "rgb.jpg": (encode(picture(0), "JPEG", keep_rgb=True), "RGB JPEG"),
    "sixteen.png": (sixteen_bit(), "PNG of mode I;16"),
    "palette.png": (palette_with_alpha(), "PNG of mode P"),
    "alpha.png": (encode(picture(0, mode="RGBA"), "PNG"), "PNG of mode RGBA"),
    "n02105855_2933.JPEG": (encode(picture(0), "PNG"), "PNG of mode RGB"),
    "webp.webp": (encode(picture(0), "WEBP"), "WEBP of mode RGB"),
    "bitmap.bmp": (encode(picture(0), "BMP"), "BMP of mode RGB"),
    "animation.jpg": (animation(), "first of 3 frames"),
    "one_bit.png": (encode(picture(0, mode="1"), "PNG"), "PNG of mode 1"),
}
REFUSED = {
    "truncated.jpg": (jpeg_bytes(0)[:-200], "it is truncated"),
    "truncated.png": (encode(picture(0), "PNG")[:-500], "it cannot be decoded"),
    "empty.jpg": (b"", r"it is empty \(0 bytes\)"),
    "text.jpg": (b"I am no image", r"it is no image: it starts with b'I am no imag'"),
    "claims.jpg": (with_size(jpeg_bytes(0), 65_535, 65_535), "claims 65535 x 65535"),
    "wide.png": (encode(Image.new("RGB", (70_000, 1)), "PNG"), "70,000 x 1 pixels.*--max-side"),
    "float.tif": (encode(Image.new("F", (4, 4)), "TIFF"), "32-bit .*mode F"),
    "vector.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "it is no image"),
}


def convert_one(tmp_path, name, content, **kwargs):
    folder = tmp_path / "images" / "only"
    folder.mkdir(parents=True)
    (folder / name).write_bytes(content)
    manifest = convert(tmp_path / "images", tmp_path / "a.beton", workers=1, **kwargs)
    return manifest.table().to_pylist()[0], open_beton(tmp_path / "a.beton")


@pytest.mark.parametrize("name", COPIED)
def test_is_copied_byte_for_byte(tmp_path, name):
    line, beton = convert_one(tmp_path, name, COPIED[name])
    assert line["action"] == "copied"
    assert beton.image_bytes(0).tobytes() == COPIED[name]
    with Image.open(io.BytesIO(COPIED[name])) as image:
        assert image.size == (beton.widths[0], beton.heights[0])


@pytest.mark.parametrize("name", TRANSCODED)
def test_is_transcoded_with_a_reason_and_its_picture_kept(tmp_path, name):
    content, reason = TRANSCODED[name]
    line, beton = convert_one(tmp_path, name, content)
    assert line["action"] == "transcoded"
    assert reason in line["reason"]
    assert check_beton(tmp_path / "a.beton", deep=True) == []
    stored = Image.open(io.BytesIO(beton.image_bytes(0)))
    assert (stored.format, stored.mode in ("RGB", "L")) == ("JPEG", True)
    source = Image.open(io.BytesIO(content))
    if source.mode == "I;16":
        expected = np.asarray(source) >> 8
    else:
        source = source.convert("RGBA") if "transparency" in source.info else source
        expected = np.asarray(source.convert(stored.mode))
    assert np.abs(np.asarray(stored).astype(int) - expected).mean() < 3


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_with_the_file_and_the_reason(tmp_path, name):
    content, reason = REFUSED[name]
    with pytest.raises(ConversionError, match=f"images/only/{name}: .*{reason}"):
        convert_one(tmp_path, name, content)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]


def test_all_that_is_refused_is_skipped_on_request(tmp_path):
    folder = tmp_path / "images" / "only"
    folder.mkdir(parents=True)
    for name, (content, _) in REFUSED.items():
        (folder / name).write_bytes(content)
    (folder / "good.jpg").write_bytes(jpeg_bytes(0))
    manifest = convert(tmp_path / "images", tmp_path / "a.beton", on_error="skip")
    assert manifest.counts == {
        "copied": 1,
        "rewritten": 0,
        "transcoded": 0,
        "skipped": len(REFUSED),
    }
    lines = manifest.table().to_pylist()
    assert [line["row"] for line in lines] == [0] + [None] * len(REFUSED)
    assert sorted(line["source_index"] for line in lines) == list(range(len(lines)))
    assert all(line["reason"] and line["bytes"] is None for line in lines[1:])
    assert open_beton(tmp_path / "a.beton").num_rows == 1
    assert check_beton(tmp_path / "a.beton", deep=True) == []


def test_nothing_but_bad_images_is_an_error_even_when_skipping(tmp_path):
    with pytest.raises(ConversionError, match=r"none of the 1 images could be read.*empty"):
        convert_one(tmp_path, "a.jpg", b"", on_error="skip")


def test_a_wide_picture_fits_after_max_side(tmp_path):
    line, beton = convert_one(tmp_path, "wide.png", REFUSED["wide.png"][0], max_side=500)
    assert (beton.widths[0], beton.heights[0], line["action"]) == (500, 1, "transcoded")


def test_max_side_shrinks_by_area_and_leaves_smaller_images_alone():
    source = picture(0, width=64, height=48)
    large = encode(source, "JPEG", quality=95, subsampling=0)
    small = prepare_image(large, ImageSettings(max_side=16, quality=100))
    assert (small.width, small.height, small.reason) == (16, 12, "64 x 48 pixels")
    decoded = np.asarray(Image.open(io.BytesIO(large))).reshape(12, 4, 16, 4, 3).mean((1, 3))
    stored = np.asarray(Image.open(io.BytesIO(small.data)))
    assert np.abs(stored - decoded).mean() < 2
    assert prepare_image(large, ImageSettings(max_side=64)).data == large


def test_exif_apply_turns_the_pixels_and_ignore_keeps_the_bytes():
    kept = prepare_image(rotated(), ImageSettings())
    turned = prepare_image(rotated(), ImageSettings(exif="apply"))
    assert (kept.width, kept.height) == (64, 48)
    assert (turned.width, turned.height, turned.reason) == (48, 64, "EXIF orientation 6")
    upright = np.rot90(np.asarray(Image.open(io.BytesIO(rotated()))), -1)
    stored = np.asarray(Image.open(io.BytesIO(turned.data)))
    assert np.abs(stored.astype(int) - upright).mean() < 3


def test_quality_changes_the_size_of_transcoded_images():
    png = encode(picture(0), "PNG")
    small, large = (prepare_image(png, ImageSettings(quality=q)).data for q in (30, 95))
    assert len(small) < len(large)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_more_pixels_than_check_would_decode_are_refused(monkeypatch, kind):
    image = encode(picture(0), kind)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ConversionError, match=r"more than the 2,000 pixels.*Shrink the file"):
        prepare_image(image, ImageSettings())


def test_verify_finds_damage_that_the_markers_do_not_show():
    # A progressive file whose second scan names a component that does not exist.
    jpeg = bytearray(encode(picture(0), "JPEG", progressive=True))
    scan = jpeg.index(b"\xff\xda", jpeg.index(b"\xff\xda") + 2)
    jpeg[scan + 5] = 77
    assert prepare_image(bytes(jpeg), ImageSettings()).data == bytes(jpeg)
    with pytest.raises(ConversionError, match=r"cannot decode the image.*--on-error skip"):
        prepare_image(bytes(jpeg), ImageSettings(verify=True))
