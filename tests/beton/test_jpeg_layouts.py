"""convert --jpeg: which JPEGs get restart rows, and that nothing else of them changes."""

import errno
import io

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from fastprune import check_beton, convert, open_beton
from fastprune.base.errors import ConversionError
from fastprune.beton.compact import compact
from fastprune.beton.convert import transcode
from fastprune.cli import main
from tests.images import jpeg_bytes, picture
from tests.jpeg.samples import with_hidden_frame

LARGE = {"width": 400, "height": 300, "quality": 95}


def encoded(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A small file, a large one, a progressive one, and a PNG."""
    root = tmp_path_factory.mktemp("layouts") / "images"
    (root / "only").mkdir(parents=True)
    contents = {
        "a.jpg": jpeg_bytes(0),
        "b.jpg": jpeg_bytes(1, **LARGE),
        "c.jpg": encoded(picture(2, width=400, height=300), quality=95, progressive=True),
    }
    assert len(contents["a.jpg"]) < 16 << 10 <= min(len(contents[n]) for n in ("b.jpg", "c.jpg"))
    for name, content in contents.items():
        (root / "only" / name).write_bytes(content)
    picture(3, width=400, height=300).save(root / "only" / "d.png")
    return root


def pixels(content):
    return np.asarray(Image.open(io.BytesIO(bytes(content))))


def lines(manifest):
    table = manifest.table(["action", "reason"])
    return table["action"].to_pylist(), table["reason"].to_pylist()


@pytest.mark.parametrize(
    ("jpeg", "actions"),
    [
        ("original", ["copied", "copied", "copied", "transcoded"]),
        ("fast", ["rewritten", "rewritten", "copied", "transcoded"]),
        ("auto", ["copied", "rewritten", "copied", "transcoded"]),
    ],
)
def test_a_layout_decides_by_image_and_keeps_every_pixel(images, tmp_path, jpeg, actions):
    manifest = convert(images, tmp_path / "a.beton", jpeg=jpeg, quality=95)
    assert lines(manifest)[0] == actions
    beton = open_beton(tmp_path / "a.beton")
    for row, path in enumerate(sorted((images / "only").glob("*.jpg"))):
        stored, source = beton.image_bytes(row).tobytes(), path.read_bytes()
        assert (stored == source) == (actions[row] == "copied")
        assert (b"\xff\xdd" in stored[:1000]) == (actions[row] == "rewritten")
        assert (pixels(stored) == pixels(source)).all()
    transcoded = beton.image_bytes(3).tobytes()
    assert (b"\xff\xdd" in transcoded[:1000]) == (jpeg != "original")
    assert check_beton(beton.path, deep=True) == []


def test_a_jpeg_without_a_fast_layout_is_copied_with_a_reason(images, tmp_path):
    manifest = convert(images, tmp_path / "a.beton", jpeg="fast")
    assert lines(manifest)[1][:3] == [None, None, "progressive JPEG, which has no fast layout"]


def test_the_identity_of_the_images_does_not_depend_on_the_layout(images, tmp_path):
    fast = convert(images, tmp_path / "fast.beton", jpeg="fast")
    original = convert(images, tmp_path / "original.beton", jpeg="original")
    assert fast.fingerprint == original.fingerprint
    source, stored = (
        fast.table([name])[name].to_pylist() for name in ("source_crc32c", "stored_crc32c")
    )
    assert [a == b for a, b in zip(source, stored, strict=True)] == [False, False, True, False]


def test_the_number_of_workers_changes_no_byte_of_the_fast_layout(images, tmp_path):
    for workers in (1, 3):
        convert(images, tmp_path / f"{workers}.beton", jpeg="fast", workers=workers)
    assert (tmp_path / "1.beton").read_bytes() == (tmp_path / "3.beton").read_bytes()


def test_compaction_keeps_the_fast_layout(images, tmp_path):
    convert(images, tmp_path / "a.beton", jpeg="fast")
    manifest = compact(tmp_path / "a.beton", tmp_path / "b.beton", subset=np.array([1, 2]))
    assert lines(manifest)[0] == ["rewritten", "copied"]
    one, other = open_beton(tmp_path / "a.beton"), open_beton(tmp_path / "b.beton")
    assert other.image_bytes(0).tobytes() == one.image_bytes(1).tobytes()
    assert check_beton(other.path, deep=True) == []


def test_a_partial_file_of_another_layout_is_refused(images, tmp_path):
    damaged = images.parent / "damaged"
    (damaged / "only").mkdir(parents=True, exist_ok=True)
    (damaged / "only" / "a.jpg").write_bytes(jpeg_bytes(0))
    (damaged / "only" / "b.jpg").write_bytes(b"")
    out = tmp_path / "a.beton"
    with pytest.raises(ConversionError, match="it is empty"):
        convert(damaged, out, jpeg="original", keep_partial=True)
    with pytest.raises(ConversionError, match="cannot be resumed: its settings were"):
        convert(damaged, out, jpeg="fast", resume=True)


def test_damaged_data_that_pillow_makes_up_is_found(tmp_path):
    content = jpeg_bytes(1, **LARGE)
    scan = content.index(b"\xff\xda") + 400
    broken = content[:scan] + bytes([0x5A] * 400) + b"\xff\xd9" * 4
    pixels(broken[:-8] + content[-20_000:])  # no complaint
    root = tmp_path / "images" / "only"
    root.mkdir(parents=True)
    (root / "a.jpg").write_bytes(broken[:-8] + content[-20_000:])
    (root / "b.jpg").write_bytes(jpeg_bytes(0))
    with pytest.raises(
        ConversionError, match=r"a\.jpg: the image cannot be rewritten: its entropy"
    ):
        convert(root.parent, tmp_path / "a.beton", jpeg="fast")
    with pytest.raises(
        ConversionError, match=r"a\.jpg: the image cannot be decoded: .*--on-error skip"
    ):
        convert(root.parent, tmp_path / "a.beton", jpeg="original", verify=True)
    convert(root.parent, tmp_path / "a.beton", jpeg="original")
    (fault,) = check_beton(tmp_path / "a.beton", deep=True)
    assert (fault.kind, fault.row) == ("image", 0)
    assert "its entropy-coded data" in fault.message


def test_a_file_whose_size_pillow_takes_from_elsewhere_is_found(tmp_path):
    content = with_hidden_frame(encoded(picture(2), quality=95, progressive=True))
    root = tmp_path / "images" / "only"
    root.mkdir(parents=True)
    (root / "a.jpg").write_bytes(content)
    with pytest.raises(ConversionError, match=r"finds an image of 8 rows and 8 columns"):
        convert(root.parent, tmp_path / "a.beton", verify=True)
    convert(root.parent, tmp_path / "a.beton")
    (fault,) = check_beton(tmp_path / "a.beton", deep=True)
    assert (fault.kind, fault.row) == ("image", 0)


@pytest.mark.parametrize("setting", [{"jpeg": "fast"}, {"jpeg": "original", "verify": True}])
def test_a_decoder_that_cannot_be_compiled_is_no_fault_of_the_images(
    images, tmp_path, monkeypatch, setting
):
    def fail(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fastprune.jpeg.rewrite.to_restart_rows", fail)
    transcode._compiled.cache_clear()
    with pytest.raises(ConversionError, match=r"cannot be compiled \(.*No space.*NUMBA_CACHE_DIR"):
        convert(images, tmp_path / "a.beton", on_error="skip", **setting)
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_which_layout_was_chosen_and_why(images, tmp_path):
    arguments = ["convert", str(images), str(tmp_path / "a.beton")]
    result = CliRunner().invoke(main, arguments)
    assert result.stdout.splitlines()[1] == (
        "--jpeg auto: 1 JPEG in the fast layout, 1 below 16 KiB as they were, 1 as they were "
        "(progressive JPEG, which has no fast layout)"
    )
    result = CliRunner().invoke(main, [*arguments, "--jpeg", "fast"])
    assert "--jpeg fast: 2 JPEGs in the fast layout" in result.stdout
    result = CliRunner().invoke(main, [*arguments, "--jpeg", "original"])
    assert len(result.stdout.splitlines()) == 1
