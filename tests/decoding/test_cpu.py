"""The CPU engine: what its pixels are, and what it does with damaged rows and dying threads."""

import ctypes
import io
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from fastprune.base.errors import LoadingError
from fastprune.beton.convert.writer import convert
from fastprune.beton.opening import open_beton
from fastprune.decoding.cpu import CpuDecoder
from fastprune.decoding.faults import RowFaults
from fastprune.decoding.views import FLIP, HEIGHT, LEFT, SHIFT_DOWN, SHIFT_RIGHT, TOP, WIDTH
from fastprune.jpeg.decode import decode_view
from fastprune.loading.crops import CropPolicy
from tests.conftest import require_library
from tests.images import picture, write_image_folder


def _engine(path, **settings):
    beton = open_beton(path)
    faults = RowFaults(beton, **{"skip": False, "verify_crc": False, **settings})
    engine = CpuDecoder(beton, image_size=32, num_workers=2, pin_memory=False, faults=faults)
    engine.faults = faults
    return engine


def _views(beton, kind):
    policy = CropPolicy.make(kind, image_size=32, train=True)
    return lambda rows: policy.views(
        rows,
        beton.widths[rows].astype(np.int64),
        beton.heights[rows].astype(np.int64),
        seed=5,
        slot=2,
    )


def _reference(beton, row, view):
    """The box by `decode_view`, then moved over a black border."""
    box = tuple(view[[TOP, LEFT, HEIGHT, WIDTH]].tolist())
    pixels = decode_view(beton.image_bytes(row), box=box, size=(32, 32), flip=bool(view[FLIP]))
    return _shifted(pixels, view)


def _shifted(pixels, view):
    """Flipped pixels, moved as the view says before the flip."""
    bordered = np.pad(pixels, ((4, 4), (4, 4), (0, 0)))
    down, right = 4 - view[SHIFT_DOWN], 4 - view[SHIFT_RIGHT] * (-1 if view[FLIP] else 1)
    return bordered[down : down + 32, right : right + 32]


def _pillow(whole, view):
    """The same by Pillow, from a whole picture."""
    box = whole.crop(
        (view[LEFT], view[TOP], view[LEFT] + view[WIDTH], view[TOP] + view[HEIGHT])
    ).resize((32, 32), Image.Resampling.BILINEAR)
    pixels = np.asarray(box.convert("RGB"))
    return _shifted(pixels[:, ::-1] if view[FLIP] else pixels, view)


def _beton_of(folder, *pictures):
    """A beton of these pictures: bytes of image files."""
    (folder / "images" / "class_00").mkdir(parents=True)
    for number, content in enumerate(pictures):
        (folder / "images" / "class_00" / f"{number:03d}.jpg").write_bytes(content)
    convert(folder / "images", folder / "pictures.beton", workers=1)
    return folder / "pictures.beton"


def _encoded(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["rrc", "pad_crop", "center", "none"])
def test_pixels_are_those_of_the_view_decoder_to_the_bit(bare_beton, kind):
    beton = open_beton(bare_beton)
    draw = _views(beton, kind)
    ((pixels, rows),) = _engine(bare_beton).decode([np.arange(30)], draw)
    for row, image in zip(rows, pixels.numpy(), strict=True):
        assert (image == _reference(beton, row, draw(rows)[row])).all()


@pytest.mark.parametrize("kind", ["pad_crop", "center", "none"])
def test_a_whole_picture_of_the_views_size_is_not_blurred(tmp_path, kind):
    gray = [picture(seed, width=32, height=32, mode="L") for seed in range(6)]
    path = _beton_of(tmp_path, *(_encoded(image) for image in gray))
    beton, rows = open_beton(path), np.arange(6)
    draw = _views(beton, kind)
    ((pixels, _),) = _engine(path).decode([rows], draw)
    for row, image in enumerate(pixels.numpy()):
        whole = Image.open(io.BytesIO(beton.image_bytes(row)))
        assert (image == _pillow(whole, draw(rows)[row])).all()


@pytest.mark.parametrize("kind", ["rrc", "pad_crop", "center", "none"])
def test_progressive_pictures_are_decoded_whole_and_counted(tmp_path, kind, caplog):
    pictures = [_encoded(picture(seed), progressive=seed < 4) for seed in range(6)]
    path = _beton_of(tmp_path, *pictures)
    beton, rows = open_beton(path), np.arange(6)
    draw, engine = _views(beton, kind), _engine(path)
    for _ in range(2):
        ((pixels, _),) = engine.decode([rows], draw)
    for row, image in enumerate(pixels.numpy()[:4]):
        whole = Image.open(io.BytesIO(beton.image_bytes(row))).convert("RGB")
        assert (image == _pillow(whole, draw(rows)[row])).all()
    assert engine.faults.num_decoded_whole == 8
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "4 of the first 6 views (66.7%)" in record.message
    assert "(4 progressive)" in record.message
    assert "jpegtran -copy all" in record.message


def test_views_of_both_layouts_are_equal_to_the_bit(tmp_path):
    folder = write_image_folder(tmp_path / "images")
    views = []
    for jpeg in ("original", "fast"):
        path = tmp_path / f"{jpeg}.beton"
        convert(folder, path, jpeg=jpeg, workers=1)
        draw = _views(open_beton(path), "rrc")
        ((pixels, _),) = _engine(path).decode([np.arange(12)], draw)
        views.append(pixels)
    assert (views[0] == views[1]).all()


@pytest.mark.parametrize("kind", ["rrc", "pad_crop", "center"])
def test_raw_pixels_are_cropped_and_resized_as_pillow_does(tmp_path, kind):
    require_library("ffcv")
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    pictures = np.random.default_rng(0).integers(0, 256, (4, 40, 50, 3), np.uint8)
    path = tmp_path / "raw.beton"
    writer = DatasetWriter(
        str(path), {"image": RGBImageField(write_mode="raw"), "label": IntField()}, num_workers=1
    )
    writer.from_indexed_dataset([(pixels, 0) for pixels in pictures])
    draw = _views(open_beton(path), kind)
    ((pixels, rows),) = _engine(path).decode([np.arange(4)], draw)
    for row, image in enumerate(pixels.numpy()):
        assert (image == _pillow(Image.fromarray(pictures[row]), draw(rows)[row])).all()


def test_pictures_that_take_much_memory_are_decoded_one_by_one(tmp_path, monkeypatch):
    sides = [(3000, 40), (40, 3000), (48, 64), (1, 1)]
    shapes = [picture(seed, width=w, height=h) for seed, (w, h) in enumerate(sides)]
    path = _beton_of(tmp_path, *map(_encoded, shapes))
    monkeypatch.setattr("fastprune.decoding.pixels._MOST_KEPT_BYTES", 1 << 20)
    beton = open_beton(path)
    draw = _views(beton, "none")
    ((pixels, rows),) = _engine(path).decode([np.arange(4)], draw)
    for row, image in zip(rows, pixels.numpy(), strict=True):
        assert (image == _reference(beton, row, draw(rows)[row])).all()


def test_a_row_damaged_in_one_of_its_views_is_left_out_of_both(beton_copy, damage_row):
    beton = open_beton(beton_copy)
    damage_row(beton_copy, 13, b"\xff\xd9" * 50, int(beton.sizes[13]) - 100)
    top, whole = [0, 0, 8, 8, 0, 0, 0], [0, 0, int(beton.heights[13]), 96, 0, 0, 0]
    engine = _engine(beton_copy, skip=True)
    views = np.array([top, top, whole, top], np.int32)
    ((_, rows),) = engine.decode([np.array([12, 13, 13, 12])], lambda rows: views)
    assert rows.tolist() == [12, 12]
    assert engine.faults.num_skipped == 1


@pytest.mark.parametrize(
    ("data", "start", "reason"),
    [
        (b"\0\0\0\0", 0, "does not start with a JPEG's marker"),
        (b"\xff\xd9" * 200, 900, "entropy-coded data ends too early"),
    ],
)
def test_an_undecodable_row_is_named(beton_copy, damage_row, data, start, reason):
    damage_row(beton_copy, 13, data, start)
    batches = _engine(beton_copy).decode(
        [np.arange(5), np.arange(10, 15)], _views(open_beton(beton_copy), "rrc")
    )
    next(batches)
    with pytest.raises(LoadingError, match=rf"row 13 of .*copy\.beton .*{reason}.*on_error"):
        next(batches)


def test_an_undecodable_row_is_left_out_and_counted(beton_copy, damage_row):
    damage_row(beton_copy, 13, b"\0\0\0\0")
    engine = _engine(beton_copy, skip=True)
    ((pixels, rows),) = engine.decode([np.arange(10, 15)], _views(open_beton(beton_copy), "rrc"))
    assert rows.tolist() == [10, 11, 12, 14]
    assert len(pixels) == 4
    assert engine.faults.num_skipped == 1


def test_a_file_cut_while_it_is_read_is_noticed(beton_copy):
    beton = open_beton(beton_copy)
    batches = _engine(beton_copy).decode([np.arange(5)] * 20, _views(beton, "rrc"))
    next(batches)
    # The cut takes the allocation table alone: no page that a thread may be reading.
    with beton_copy.open("r+b") as file:
        file.truncate(len(beton.content) - 8)
    with pytest.raises(LoadingError, match=r"copy\.beton was cut from .* Get a whole copy"):
        list(batches)


def test_a_file_removed_while_it_is_read_is_noticed(beton_copy):
    batches = _engine(beton_copy).decode([np.arange(5)] * 20, _views(open_beton(beton_copy), "rrc"))
    next(batches)
    beton_copy.unlink()
    with pytest.raises(LoadingError, match=r"copy\.beton cannot be found .* Put it back"):
        list(batches)


def test_a_file_replaced_while_it_is_read_is_noticed(beton_copy, bare_beton, tmp_path):
    batches = _engine(beton_copy).decode([np.arange(5)] * 20, _views(open_beton(beton_copy), "rrc"))
    next(batches)
    other = tmp_path / "other.beton"
    other.write_bytes(bare_beton.read_bytes())
    other.replace(beton_copy)
    with pytest.raises(LoadingError, match=r"copy\.beton was replaced .* Start the loader again"):
        list(batches)


@pytest.mark.parametrize("restores_the_time", [False, True])
def test_a_file_written_to_in_place_while_it_is_read_is_noticed(beton_copy, restores_the_time):
    before = beton_copy.stat()
    batches = _engine(beton_copy).decode([np.arange(5)] * 20, _views(open_beton(beton_copy), "rrc"))
    next(batches)
    # What `cp` does, with the same bytes, so that no thread meets others meanwhile.
    with beton_copy.open("r+b") as file:
        file.write(beton_copy.read_bytes()[:4])
    if restores_the_time:
        os.utime(beton_copy, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(LoadingError, match=r"copy\.beton was written to .* by renaming a finished"):
        list(batches)


def test_a_file_replaced_between_opening_it_and_starting_the_engine_is_noticed(
    beton_copy, bare_beton, tmp_path
):
    beton = open_beton(beton_copy)
    other = tmp_path / "other.beton"
    other.write_bytes(bare_beton.read_bytes())
    other.replace(beton_copy)
    engine = CpuDecoder(
        beton,
        image_size=32,
        num_workers=1,
        pin_memory=False,
        faults=RowFaults(beton, skip=False, verify_crc=False),
    )
    with pytest.raises(LoadingError, match=r"copy\.beton was replaced"):
        next(engine.decode([np.arange(5)], _views(beton, "rrc")))


def test_a_file_that_gets_another_name_or_mode_is_read_on(beton_copy, tmp_path):
    batches = _engine(beton_copy).decode([np.arange(5)] * 20, _views(open_beton(beton_copy), "rrc"))
    next(batches)
    (tmp_path / "link.beton").hardlink_to(beton_copy)
    next(batches)
    beton_copy.chmod(0o400)
    assert len(list(batches)) == 18


@pytest.mark.timeout(30)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("repetition", range(5))
def test_a_killed_decoding_thread_ends_the_epoch_with_an_error(bare_beton, repetition):
    rows = [np.arange(30)] * 1000
    # Threads of iterators that other tests have left would end in a later test.
    others = set(threading.enumerate())
    batches = _engine(bare_beton).decode(rows, _views(open_beton(bare_beton), "rrc"))
    next(batches)
    for thread in set(threading.enumerate()) - others:
        if thread.name.startswith("fastprune-decode"):
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit)
            )
    with pytest.raises(LoadingError, match=r"a thread that decoded rows .* Start the epoch again"):
        list(batches)


def test_starting_the_engine_keeps_the_thread_counts(bare_beton):
    script = f"""
import numba, torch
torch.set_num_threads(2)
numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
before = torch.get_num_threads(), numba.get_num_threads()
from fastprune.loading.loader import Loader
next(iter(Loader({str(bare_beton)!r}, batch_size=8, image_size=32, num_workers=1)))
assert (torch.get_num_threads(), numba.get_num_threads()) == before
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_a_process_may_end_in_the_middle_of_an_epoch(bare_beton):
    script = f"""
from fastprune.loading.loader import Loader
batches = iter(Loader({str(bare_beton)!r}, batch_size=2, image_size=224, num_workers=2))
next(batches)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_a_thread_that_cannot_be_started_leaves_none_running(bare_beton, monkeypatch):
    start, num_started = threading.Thread.start, 0

    def fail_at_the_third(thread):
        nonlocal num_started
        if thread.name == "fastprune-decode-2":
            raise RuntimeError("can't start new thread")
        num_started += 1
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", fail_at_the_third)
    before = threading.active_count()
    beton = open_beton(bare_beton)
    faults = RowFaults(beton, skip=False, verify_crc=False)
    engine = CpuDecoder(beton, image_size=32, num_workers=5, pin_memory=False, faults=faults)
    with pytest.raises(LoadingError, match=r"only 2 of 5 threads .* fewer workers"):
        next(engine.decode([np.arange(5)], _views(beton, "rrc")))
    assert (num_started, threading.active_count()) == (2, before)
