"""A small beton, with and without FFCV, and copies of it that a test may damage."""

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from fastprune.beton.convert.writer import convert
from fastprune.beton.manifest import manifest_path
from tests.conftest import require_library
from tests.images import picture

# The first call of a compiled function may compile it; nothing here is about speed.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

NUM_ROWS = 30
NUM_CLASSES = 3


def _picture(row):
    """Pictures of different sizes, one per row."""
    return picture(row, width=96 + 5 * (row % 7), height=80 + 7 * (row % 5))


class _Pictures:
    def __len__(self):
        return NUM_ROWS

    def __getitem__(self, row):
        return np.array(_picture(row)), row % NUM_CLASSES


@pytest.fixture(scope="session")
def stock_beton(tmp_path_factory) -> Path:
    """30 JPEG rows of three classes by FFCV itself, the fields under other names."""
    require_library("ffcv")
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    path = tmp_path_factory.mktemp("beton") / "stock.beton"
    fields = {"photo": RGBImageField(write_mode="jpg"), "class": IntField()}
    writer = DatasetWriter(str(path), fields, num_workers=1)
    writer.from_indexed_dataset(_Pictures(), chunksize=NUM_ROWS)
    return path


@pytest.fixture(scope="session")
def bare_beton(tmp_path_factory) -> Path:
    """30 JPEG rows of three classes, without a manifest, as FFCV would leave it."""
    path = tmp_path_factory.mktemp("beton") / "bare.beton"
    jpegs = []
    for row in range(NUM_ROWS):
        buffer = io.BytesIO()
        _picture(row).save(buffer, "JPEG", quality=90)
        jpegs.append((buffer.getvalue(), row % NUM_CLASSES))
    convert(jpegs, path, jpeg="original", workers=1)
    manifest_path(path).unlink()
    return path


@pytest.fixture
def beton_copy(bare_beton, tmp_path) -> Path:
    """A copy of the bare beton for the test alone."""
    return Path(shutil.copy(bare_beton, tmp_path / "copy.beton"))


@pytest.fixture
def damage_row():
    """A function that overwrites a row's stored bytes from a byte on."""

    def damage(path: Path, row: int, data: bytes, start: int = 0) -> None:
        from fastprune.beton.opening import open_beton

        offset = int(open_beton(path).offsets[row]) + start
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(data)

    return damage
