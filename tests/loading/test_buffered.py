"""DALI's own reader: which rows it gives, and what it refuses."""

import numpy as np
import pytest

from fastprune.beton.writer import convert
from fastprune.errors import (
    BetonError,
    InvalidValueError,
    LoadingError,
    MissingDependencyError,
)
from fastprune.loading.loader import Loader
from tests.conftest import require_library
from tests.images import write_image_folder

require_library("dali")


@pytest.fixture(scope="module")
def beton(tmp_path_factory):
    """Forty pictures of four classes, aligned for DALI."""
    folder = tmp_path_factory.mktemp("buffered")
    convert(
        write_image_folder(folder / "images", classes=4, per_class=10),
        folder / "a.beton",
        workers=1,
    )
    return folder / "a.beton"


def _loader(path, subset=None, **settings):
    defaults = {"batch_size": 4, "image_size": 16, "layout": "xyi", "order": "buffered"}
    return Loader(path, subset, **{**defaults, **settings})


def _rows(loader):
    return [row for _, _, rows in loader for row in rows.tolist()]


@pytest.mark.parametrize("augment", ["rrc", "pad_crop", "center", "none"])
def test_an_exact_epoch_gives_every_kept_row_once_with_its_label(beton, augment):
    kept = np.arange(0, 40, 3)
    loader = _loader(beton, kept, tail="exact", augment=augment)
    rows = []
    for images, labels, batch_rows in loader:
        assert images.shape[1:] == (3, 16, 16)
        assert (labels == batch_rows // 10).all()
        rows += batch_rows.tolist()
    assert sorted(rows) == kept.tolist()
    assert len(loader) == 4


def test_epochs_differ_and_a_named_epoch_comes_again(beton):
    loader = _loader(beton)
    first, second = _rows(loader), _rows(loader)
    assert len(set(first)) == 40
    assert first != second
    loader.set_epoch(0)
    assert _rows(loader) == first


@pytest.mark.parametrize(("tail", "count"), [("drop", 36), ("exact", 38), ("pad", 40)])
def test_ranks_share_the_rows(beton, tail, count):
    ranks = [
        _loader(beton, np.arange(38), tail=tail, batch_size=6, distributed=(r, 3)) for r in range(3)
    ]
    rows = [_rows(rank) for rank in ranks]
    assert [len(rank) for rank in ranks] == [-(-len(part) // 6) for part in rows]
    everything = [row for part in rows for row in part]
    if tail == "pad":
        assert set(everything) == set(range(38))
        assert len(everything) == 38 + ranks[0].num_repeated
    else:
        assert len(everything) == len(set(everything)) == count


def test_changed_rows_are_read(beton):
    loader = _loader(beton)
    loader.warm_up()
    loader.set_rows(np.arange(8))
    assert sorted(_rows(loader)) == list(range(8))


def test_an_epoch_is_not_resumed_half_way(beton):
    loader = _loader(beton)
    batches = iter(loader)
    next(batches)
    with pytest.raises(InvalidValueError, match=r"resumed after 1 batches.*between epochs"):
        _loader(beton).load_state_dict(loader.state_dict())
    list(batches)
    resumed = _loader(beton)
    resumed.load_state_dict(loader.state_dict())
    assert _rows(resumed) == _rows(loader)


@pytest.mark.parametrize(
    "settings",
    [{"backend": "ffcv"}, {"layout": "two_view"}, {"on_error": "skip"}, {"verify_crc": True}],
)
def test_what_the_reader_cannot_do_is_refused(beton, settings):
    (name,) = settings
    with pytest.raises(InvalidValueError, match=rf'cannot do {name}=.* order="random"'):
        _loader(beton, **settings)


def test_a_beton_that_is_not_laid_out_for_dali_is_refused(stock_beton):
    with pytest.raises(BetonError, match="fastprune compact"):
        _loader(stock_beton)


def test_a_damaged_image_ends_the_epoch_with_an_error(beton, tmp_path, damage_row):
    copy = tmp_path / "copy.beton"
    copy.write_bytes(beton.read_bytes())
    damage_row(copy, 5, b"\0\0\0\0")
    with pytest.raises(LoadingError, match=r'copy\.beton.*\n*.*order="random"'):
        list(_loader(copy))


def test_the_reader_needs_dali(beton, monkeypatch):
    monkeypatch.setattr("fastprune.loading.engine._is_installed", lambda package: False)
    with pytest.raises(MissingDependencyError, match=r"pip install fastprune\[dali-cuda13\]"):
        _loader(beton)
