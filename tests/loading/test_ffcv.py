"""The FFCV engine: what its pixels are, and what it does with damaged rows and dying threads."""

import ctypes
import io
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from fastprune.beton.reader import open_beton
from fastprune.errors import LoadingError
from fastprune.loading.augment import (
    FLIP,
    HEIGHT,
    LEFT,
    SHIFT_DOWN,
    SHIFT_RIGHT,
    TOP,
    WIDTH,
    Recipe,
)
from fastprune.loading.faults import RowFaults
from tests.conftest import require_library
from tests.images import jpeg_bytes

require_library("ffcv")


def _engine(path, **settings):
    from fastprune.loading._ffcv import FfcvEngine

    beton = open_beton(path)
    faults = RowFaults(beton, **{"skip": False, "verify_crc": False, **settings})
    engine = FfcvEngine(beton, image_size=32, num_workers=2, pin_memory=False, faults=faults)
    engine.faults = faults
    return engine


def _views(beton, kind):
    recipe = Recipe.make(kind, image_size=32, train=True)
    return lambda rows: recipe.views(
        rows,
        beton.widths[rows].astype(np.int64),
        beton.heights[rows].astype(np.int64),
        seed=5,
        epoch=2,
    )


def _reference(beton, row, view):
    """Decode the whole image with PIL, crop and resize with FFCV's function, shift, flip."""
    from ffcv.libffcv import resize_crop

    whole = np.array(Image.open(io.BytesIO(beton.image_bytes(row))))
    top, left = view[TOP], view[LEFT]
    resized = np.empty((32, 32, 3), np.uint8)
    box = (int(top), int(top + view[HEIGHT]), int(left), int(left + view[WIDTH]))
    resize_crop(whole, *box, resized)
    bordered = np.pad(resized, ((4, 4), (4, 4), (0, 0)))
    down, right = 4 - view[SHIFT_DOWN], 4 - view[SHIFT_RIGHT]
    shifted = bordered[down : down + 32, right : right + 32]
    return shifted[:, ::-1] if view[FLIP] else shifted


@pytest.mark.parametrize("kind", ["rrc", "pad_crop", "center", "none"])
def test_pixels_are_those_of_the_plain_way_to_the_bit(stock_beton, kind):
    beton = open_beton(stock_beton)
    draw = _views(beton, kind)
    ((pixels, rows),) = _engine(stock_beton).decode([np.arange(30)], draw)
    for row, image in zip(rows, pixels.numpy(), strict=True):
        assert (image == _reference(beton, row, draw(rows)[row])).all()


def test_raw_pixels_are_read_as_they_are(tmp_path):
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    pictures = np.random.default_rng(0).integers(0, 256, (4, 40, 50, 3), np.uint8)
    path = tmp_path / "raw.beton"
    writer = DatasetWriter(
        str(path), {"image": RGBImageField(write_mode="raw"), "label": IntField()}, num_workers=1
    )
    writer.from_indexed_dataset([(picture, 0) for picture in pictures])
    whole = np.array([[0, 0, 32, 32, 0, 0, 0]] * 4, np.int32)
    ((pixels, _),) = _engine(path).decode([np.arange(4)], lambda rows: whole)
    assert (pixels.numpy() == pictures[:, :32, :32]).all()


@pytest.mark.parametrize(
    ("data", "start", "reason"),
    [(b"\0\0\0\0", 0, "Not a JPEG file"), (b"\xff\xd9" * 200, 900, "remature end")],
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


def test_a_warning_of_the_decoder_is_counted_and_the_row_kept(beton_copy, damage_row):
    beton = open_beton(beton_copy)
    width, height, size = (int(column[13]) for column in (beton.widths, beton.heights, beton.sizes))
    smaller = jpeg_bytes(13, quality=50, width=width, height=height)
    damage_row(beton_copy, 13, smaller[:-2] + bytes(size - len(smaller)) + smaller[-2:])
    engine = _engine(beton_copy)
    ((_, rows),) = engine.decode([np.arange(10, 15)], _views(beton, "rrc"))
    assert rows.tolist() == [10, 11, 12, 13, 14]
    assert engine.faults.num_warnings == 1


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


def test_a_file_replaced_while_it_is_read_is_noticed(beton_copy, stock_beton, tmp_path):
    batches = _engine(beton_copy).decode([np.arange(5)] * 20, _views(open_beton(beton_copy), "rrc"))
    next(batches)
    other = tmp_path / "other.beton"
    other.write_bytes(stock_beton.read_bytes())
    other.replace(beton_copy)
    with pytest.raises(LoadingError, match=r"copy\.beton was replaced .* Start the loader again"):
        list(batches)


@pytest.mark.timeout(30)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("repetition", range(5))
def test_a_killed_decoding_thread_ends_the_epoch_with_an_error(stock_beton, repetition):
    rows = [np.arange(30)] * 1000
    batches = _engine(stock_beton).decode(rows, _views(open_beton(stock_beton), "rrc"))
    next(batches)
    for thread in threading.enumerate():
        if thread.name.startswith("fastprune-decode"):
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit)
            )
    with pytest.raises(LoadingError, match=r"a thread that decoded rows .* Start the epoch again"):
        list(batches)


def test_importing_ffcv_and_starting_the_engine_keep_the_thread_counts(stock_beton):
    script = f"""
import numba, torch
torch.set_num_threads(2)
numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
before = torch.get_num_threads(), numba.get_num_threads()
from fastprune.loading.loader import Loader
next(iter(Loader({str(stock_beton)!r}, batch_size=8, image_size=32, num_workers=1)))
assert (torch.get_num_threads(), numba.get_num_threads()) == before
import ffcv.fields.rgb_image
assert ffcv.fields.rgb_image.IMAGE_MODES == {{"jpg": 0, "raw": 1}}
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_a_process_may_end_in_the_middle_of_an_epoch(stock_beton):
    script = f"""
from fastprune.loading.loader import Loader
batches = iter(Loader({str(stock_beton)!r}, batch_size=2, image_size=224, num_workers=2))
next(batches)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
