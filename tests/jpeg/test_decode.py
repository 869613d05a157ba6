"""Views of JPEGs against Pillow's crop and resize, and what is said of those that cannot be."""

import io
import threading
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastprune.base.errors import InvalidValueError, JpegError
from fastprune.jpeg import decode
from fastprune.jpeg.decode import decode_view, require_whole
from fastprune.jpeg.native import MEANINGS
from tests.images import picture
from tests.jpeg import fuzz
from tests.jpeg.samples import encode, known_kinds, with_hidden_frame, with_two_frames

KINDS = known_kinds()


def reference(jpeg, box, size, flip=False):
    """What Pillow makes of the same view."""
    top, left, height, width = box
    image = Image.open(io.BytesIO(jpeg)).convert("RGB")
    view = image.crop((left, top, left + width, top + height))
    pixels = np.asarray(view.resize(size[::-1], Image.Resampling.BILINEAR))
    return pixels[:, ::-1] if flip else pixels


def difference(jpeg, box, size, flip=False):
    """Mean absolute difference from Pillow, in levels."""
    view = decode_view(jpeg, box=box, size=size, flip=flip)
    return np.abs(view.astype(int) - reference(jpeg, box, size, flip)).mean()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("box", [(0, 0, 61, 48), (7, 9, 40, 33), (20, 17, 41, 31)])
@pytest.mark.parametrize("size", [(224, 224), (20, 27)])
def test_view_is_pillows_but_for_rounding_and_chroma(kind, box, size):
    # The halves of a 4:4:0 sample are strewn over it, so its chroma is all edges.
    limit = 3.0 if kind == "4:4:0" else 1.0
    assert difference(KINDS[kind], box, size) < limit


def test_resized_gray_view_is_within_a_level_of_pillows():
    view = decode_view(KINDS["gray"], box=(3, 2, 50, 61), size=(64, 48))
    expected = reference(KINDS["gray"], (3, 2, 50, 61), (64, 48))
    assert np.abs(view.astype(int) - expected).max() <= 1


def test_unscaled_color_view_is_within_a_level_of_pillows():
    view = decode_view(KINDS["4:4:4"], box=(0, 0, 61, 83), size=(61, 83))
    expected = reference(KINDS["4:4:4"], (0, 0, 61, 83), (61, 83))
    assert np.abs(view.astype(int) - expected).max() <= 1


def test_unscaled_gray_view_is_exact():
    view = decode_view(KINDS["gray"], box=(0, 0, 61, 83), size=(61, 83))
    np.testing.assert_array_equal(view, reference(KINDS["gray"], (0, 0, 61, 83), (61, 83)))


def test_flip_mirrors_the_view():
    box = (5, 6, 40, 50)
    plain = decode_view(KINDS["4:2:0"], box=box, size=(33, 47))
    flipped = decode_view(KINDS["4:2:0"], box=box, size=(33, 47), flip=True)
    # Each side's weights are rounded from its own end.
    assert np.abs(plain[:, ::-1].astype(int) - flipped).max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_single_pixel_crops_at_every_corner_show_that_pixel(kind):
    image = Image.open(io.BytesIO(KINDS[kind]))
    for top in (0, image.height - 1):
        for left in (0, image.width - 1):
            view = decode_view(KINDS[kind], box=(top, left, 1, 1), size=(3, 5))
            assert (view == view[0, 0]).all()


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("size", [(1, 1), (1, 17), (16, 1), (8, 8), (9, 15)])
def test_tiny_images_are_decoded_whole(mode, size):
    jpeg = encode(picture(5, width=max(size[1], 4), height=max(size[0], 4), mode=mode))
    jpeg = encode(Image.open(io.BytesIO(jpeg)).crop((0, 0, size[1], size[0])))
    assert difference(jpeg, (0, 0, *size), (11, 13)) < 2.0


@pytest.mark.parametrize("size", [(65_500, 8), (8, 65_500)])
def test_longest_sides_of_libjpeg_are_decoded(size):
    height, width = size
    pixels = np.linspace(0, 255, height * width).astype(np.uint8).reshape(size)
    jpeg = encode(Image.fromarray(pixels))
    assert difference(jpeg, (0, 0, height, width), (64, 64)) < 1.0
    last = (max(height - 50, 0), max(width - 50, 0), min(height, 50), min(width, 50))
    assert difference(jpeg, last, (64, 64)) < 1.0


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_box_of_any_kind_is_near_pillows_view(data):
    jpeg = KINDS[data.draw(st.sampled_from([k for k in KINDS if k != "4:4:0"]))]
    top, left = data.draw(st.integers(0, 60)), data.draw(st.integers(0, 82))
    height, width = data.draw(st.integers(1, 61 - top)), data.draw(st.integers(1, 83 - left))
    size = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    # Of a few pixels, chroma from beyond the box may be a large part.
    limit = 4.0 if min(height, width) >= 16 else 30.0
    assert difference(jpeg, (top, left, height, width), size, data.draw(st.booleans())) < limit


@pytest.mark.parametrize(
    "jpeg",
    [
        encode(picture(1), progressive=True),
        encode(picture(1, mode="CMYK")),
        encode(picture(1), keep_rgb=True),
    ],
)
def test_other_kinds_are_pillows_views_to_the_bit(jpeg):
    box = (4, 6, 30, 40)
    for flip in (False, True):
        view = decode_view(jpeg, box=box, size=(25, 35), flip=flip)
        np.testing.assert_array_equal(view, reference(jpeg, box, (25, 35), flip))


@pytest.mark.parametrize("progressive", [False, True])
def test_box_outside_the_image_is_named_with_the_image_size(progressive):
    jpeg = encode(picture(1, width=64, height=48), progressive=progressive)
    with pytest.raises(InvalidValueError, match=r"\(40, 0, 9, 10\).*48 rows.*64 columns.*<= 48"):
        decode_view(jpeg, box=(40, 0, 9, 10))


@pytest.mark.parametrize(
    ("box", "size", "match"),
    [
        ((0, 0, 0, 5), (4, 4), "height and width >= 1"),
        ((-1, 0, 5, 5), (4, 4), "top and left >= 0"),
        ((0, 0, 5), (4, 4), "must be four integers"),
        ((0, 0, 5, 5.5), (4, 4), "must be four integers"),
        ((0, 0, 5, 5), (0, 4), r"size \(0, 4\) must be .* in \[1, 65500\]"),
        ((0, 0, 5, 5), (4, 65_501), r"size \(4, 65501\)"),
        ((0, 0, 65_501, 5), (4, 4), "reaches beyond 65500, where a JPEG's sides end"),
        ((2**63 - 1, 0, 5, 5), (4, 4), "reaches beyond 65500"),
        ((0, 2**70, 5, 5), (4, 4), "reaches beyond 65500"),
    ],
)
def test_boxes_and_sizes_that_make_no_sense_are_named(box, size, match):
    with pytest.raises(InvalidValueError, match=match):
        decode_view(KINDS["gray"], box=box, size=size)


@pytest.mark.parametrize("content", [b"", b"\xff\xd8", b"\x89PNG\r\n"])
def test_bytes_that_are_no_jpeg_are_refused(content):
    with pytest.raises(JpegError, match="do not start with a JPEG's marker"):
        decode_view(content, box=(0, 0, 1, 1))


def test_damage_that_pillow_finds_is_named():
    with pytest.raises(JpegError, match=r"Pillow cannot decode the image \(.*leave it out"):
        decode_view(encode(picture(1), progressive=True)[:200], box=(0, 0, 5, 5))


@pytest.mark.parametrize("kind", KINDS)
def test_truncation_at_any_byte_is_an_error_or_leaves_the_view_whole(kind):
    jpeg, box, size = KINDS[kind], (0, 0, 61, 48), (16, 16)
    whole = decode_view(jpeg, box=box, size=size)
    errors = 0
    for end in range(len(jpeg) - 2):
        try:
            view = decode_view(jpeg[:end], box=box, size=size)
        except JpegError:
            errors += 1
            continue
        np.testing.assert_array_equal(view, whole)
    assert errors > 300


def test_truncated_data_is_said_to_be_truncated():
    jpeg = KINDS["best"]
    with pytest.raises(
        JpegError, match=r"in box \(0, 0, 61, 83\): .* ends too early.*leave it out"
    ):
        decode_view(jpeg[: len(jpeg) // 2], box=(0, 0, 61, 83))


def test_damaged_and_hidden_frames_are_found_by_a_look_at_the_whole_image():
    for jpeg in (
        with_two_frames(KINDS["gray"]),
        with_hidden_frame(encode(picture(1, width=83, height=61), progressive=True)),
    ):
        with pytest.raises(JpegError):
            require_whole(jpeg, height=61, width=83)


def test_memory_that_runs_out_is_not_blamed_on_the_image(monkeypatch):
    def fail(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr("PIL.Image.Image.convert", fail)
    with pytest.raises(MemoryError):
        decode_view(encode(picture(1), progressive=True), box=(0, 0, 5, 5))


def test_a_view_that_memory_was_too_small_for_leaves_no_workspace_that_is(monkeypatch):
    def fail(**sizes):
        raise MemoryError

    monkeypatch.setattr(decode, "_kept", threading.local())
    expected = decode_view(KINDS["best"], box=(0, 0, 61, 83), size=(33, 35))
    with monkeypatch.context() as patch:
        patch.setattr(decode, "make_workspace", fail)
        with pytest.raises(MemoryError):
            decode_view(KINDS["best"], box=(0, 0, 65_500, 65_500), size=(33, 35))
    # Were the room noted without the workspace, this would be taken to fit into the old one.
    tall = encode(picture(2, width=400, height=400))
    assert decode_view(tall, box=(0, 0, 400, 400), size=(33, 35)).any()
    again = decode_view(KINDS["best"], box=(0, 0, 61, 83), size=(33, 35))
    np.testing.assert_array_equal(again, expected)


def test_no_large_workspace_is_kept(monkeypatch):
    monkeypatch.setattr(decode, "_kept", threading.local())
    wide = encode(Image.new("L", (60_000, 8)))
    tall = encode(Image.new("L", (8, 60_000)))
    small = picture(1, width=50, height=40)
    decode_view(encode(small), box=(0, 0, 40, 50), size=(32, 32))
    for jpeg, height, width in [(wide, 8, 60_000), (tall, 60_000, 8)]:
        assert not decode_view(jpeg, box=(0, 0, height, width), size=(32, 32)).any()
        assert sum(array.nbytes for array in decode._kept.work) < 17 << 20
    assert difference(encode(small), (0, 0, 40, 50), (32, 32)) < 1.0


def test_looking_at_all_of_an_image_takes_no_memory_for_its_pixels():
    side = 65_500
    flat = bytearray(encode(Image.new("L", (8, 8))))
    frame = flat.index(b"\xff\xc0") + 5
    flat[frame : frame + 4] = side.to_bytes(2) + side.to_bytes(2)
    tracemalloc.start()
    try:
        with pytest.raises(JpegError, match="ends too early"):
            require_whole(bytes(flat), height=side, width=side)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_an_image_of_another_size_is_not_whole():
    for jpeg in (KINDS["4:2:0"], encode(picture(1, width=83, height=61), progressive=True)):
        require_whole(jpeg, height=61, width=83)
        with pytest.raises(JpegError, match=r"61 rows and 83 columns, not (of )?60 and 83"):
            require_whole(jpeg, height=60, width=83)


def test_pillow_is_given_no_more_pixels_than_it_would_open(monkeypatch):
    jpeg = encode(picture(1, width=83, height=61), progressive=True)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2_000)
    with pytest.raises(JpegError, match=r"it has 5,063 pixels, more than the 4,000"):
        decode_view(jpeg, box=(0, 0, 5, 5))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(KINDS)), st.integers(0, 2**32))
def test_what_is_found_whole_can_be_decoded_and_faults_are_the_same(kind, seed):
    damaged = fuzz.damage(np.frombuffer(KINDS[kind], np.uint8), np.random.default_rng(seed))
    faults = []
    height, width = Image.open(io.BytesIO(KINDS[kind])).size[::-1]
    for look in (
        lambda jpeg: require_whole(jpeg, height=height, width=width),
        lambda jpeg: decode_view(jpeg, box=(0, 0, height, width), size=(8, 8)),
    ):
        try:
            look(damaged.tobytes())
            faults.append(None)
        except (JpegError, InvalidValueError) as error:
            faults.append(str(error))
    if faults[0] is None:
        assert faults[1] is None
    elif "entropy" in str(faults[1]):
        assert faults[0].partition(": ")[2] in faults[1]


def test_a_dc_table_with_symbols_that_are_no_categories_is_refused():
    jpeg = bytearray(KINDS["4:2:0"])
    table = jpeg.index(b"\xff\xc4\x00\x1f\x00")
    jpeg[table + 5 + 16 + 2] |= 0x50
    with pytest.raises(JpegError, match="Pillow cannot decode"):
        decode_view(bytes(jpeg), box=(0, 0, 61, 83), size=(8, 8))


def test_each_code_has_a_meaning():
    assert all(MEANINGS[code] for code in range(1, 7))


def test_arrays_are_as_good_as_bytes():
    jpeg, box = KINDS["4:2:0"], (0, 0, 20, 20)
    array = np.frombuffer(bytearray(jpeg), np.uint8)
    np.testing.assert_array_equal(decode_view(array, box=box), decode_view(jpeg, box=box))


def test_threads_do_not_disturb_each_other():
    boxes = [(n % 13, n % 19, 30 + n % 17, 20 + n % 23) for n in range(60)]
    expected = [decode_view(KINDS["4:2:0"], box=box) for box in boxes]
    wrong = []

    def compare():
        for box, view in zip(boxes, expected, strict=True):
            if not np.array_equal(decode_view(KINDS["4:2:0"], box=box), view):
                wrong.append(box)

    threads = [threading.Thread(target=compare) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
