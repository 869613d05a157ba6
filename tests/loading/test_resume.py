"""Going on where a run stopped, and changing the kept rows between epochs."""

import io

import numpy as np
import pytest
import torch

from fastprune.base.errors import InvalidValueError
from fastprune.loading.loader import Loader
from tests.conftest import require_library


def _loader(path, subset=None, **settings):
    defaults = {
        "batch_size": 2,
        "image_size": 32,
        "augment": "rrc",
        "fields": ("images", "labels", "rows"),
    }
    return Loader(path, subset, **{**defaults, **settings})


def _stored(state):
    """The state as a checkpoint file gives it back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def _equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("order", ["random", "pages"])
def test_batches_after_a_resume_are_those_of_the_uninterrupted_run_to_the_bit(bare_beton, order):
    uninterrupted = _loader(bare_beton, order=order)
    uninterrupted.set_epoch(2)
    batches = iter(uninterrupted)
    for _ in range(7):
        next(batches)
    state = _stored(uninterrupted.state_dict())
    resumed = _loader(bare_beton, order=order)
    resumed.load_state_dict(state)
    rest = list(batches)
    assert len(rest) == 8
    assert all(map(_equal, rest, resumed))
    assert _equal(next(iter(uninterrupted)), next(iter(resumed)))


def test_naming_the_resumed_epoch_does_not_start_it_again(bare_beton):
    loader = _loader(bare_beton)
    batches = iter(loader)
    next(batches)
    state = loader.state_dict()
    loader.load_state_dict(state)
    loader.set_epoch(0)
    assert len(list(loader)) == 14
    loader.set_epoch(0)
    assert len(list(loader)) == 15


def test_the_state_between_epochs_is_the_next_epoch(bare_beton):
    loader = _loader(bare_beton)
    list(loader)
    resumed = _loader(bare_beton)
    resumed.load_state_dict(loader.state_dict())
    assert _equal(next(iter(loader)), next(iter(resumed)))


@pytest.mark.parametrize(
    ("settings", "difference"),
    [
        ({"batch_size": 3}, r"batch_size \(2 there, 3 here\)"),
        ({"seed": 1}, r"seed \(0 there, 1 here\)"),
        ({"num_views": 4}, r"num_views \(None there, 4 here\)"),
        ({"image_size": 48}, r"image_size \(32 there, 48 here\)"),
        ({"augment": "center"}, r"augment \('rrc' there, 'center' here\)"),
        ({"distributed": (0, 2)}, r"world \(1 there, 2 here\)"),
        ({"subset": np.arange(20)}, "rows_digest"),
    ],
)
def test_the_state_of_a_loader_with_other_batches_is_refused(bare_beton, settings, difference):
    state = _loader(bare_beton).state_dict()
    with pytest.raises(InvalidValueError, match=rf"{difference}.*Make this loader with the same"):
        _loader(bare_beton, **settings).load_state_dict(state)


def test_the_state_of_a_loader_of_other_images_is_refused(bare_beton, tmp_path):
    from fastprune.beton.compact import compact

    compact(bare_beton, tmp_path / "part.beton", subset=np.arange(1, 30))
    state = _loader(bare_beton, np.arange(20)).state_dict()
    with pytest.raises(InvalidValueError, match=r"images \('.*Make this loader with the same"):
        _loader(tmp_path / "part.beton", np.arange(20)).load_state_dict(state)


def test_changed_rows_come_from_the_next_epoch_on_and_stay(bare_beton):
    loader = _loader(bare_beton, tail="exact")
    running = iter(loader)
    next(running)
    loader.set_rows(np.arange(5, 15))
    assert len(list(running)) == 14
    for _ in range(2):
        assert sorted(torch.cat([rows for _, _, rows in loader]).tolist()) == list(range(5, 15))
    assert len(loader) == 5
    assert len(loader.dataset) == 10


def test_changed_rows_are_part_of_the_state(bare_beton):
    loader = _loader(bare_beton)
    list(loader)
    loader.set_rows(np.arange(5, 15))
    batches = iter(loader)
    next(batches)
    resumed = _loader(bare_beton)
    resumed.load_state_dict(_stored(loader.state_dict()))
    assert resumed.rows.tolist() == list(range(5, 15))
    assert all(map(_equal, list(batches), resumed))


def test_rows_that_fill_no_batch_are_refused_and_change_nothing(bare_beton):
    loader = _loader(bare_beton)
    with pytest.raises(InvalidValueError, match="1 kept rows"):
        loader.set_rows([3])
    assert len(loader.rows) == 30


def test_the_state_of_an_earlier_version_is_refused_with_the_cure(bare_beton):
    loader = _loader(bare_beton)
    state = loader.state_dict() | {"epoch": 7}
    del state["version"]
    with pytest.raises(
        InvalidValueError, match=r"of version 1 .*Start a new run, .*set_epoch\(7\)"
    ):
        loader.load_state_dict(state)


@pytest.mark.parametrize("state", [None, {}, [], "epoch", {"epoch": 1, "version": 2}])
def test_what_is_no_state_of_a_loader_is_refused(bare_beton, state):
    with pytest.raises(InvalidValueError, match=r"not a loader's state: it (lacks|is) "):
        _loader(bare_beton).load_state_dict(state)


@pytest.mark.parametrize(("name", "value"), [("epoch", -1), ("batches", 1.5), ("batches", 2**70)])
def test_a_position_that_is_none_is_refused(bare_beton, name, value):
    loader = _loader(bare_beton)
    with pytest.raises(InvalidValueError, match=rf"state's {name} must be an integer .*{value}"):
        loader.load_state_dict(loader.state_dict() | {name: value})


def test_rows_of_a_state_that_are_none_are_refused(bare_beton):
    loader = _loader(bare_beton)
    with pytest.raises(InvalidValueError, match="state's rows must be integers, not 'some'"):
        loader.load_state_dict(loader.state_dict() | {"rows": "some"})


def test_a_position_behind_the_epoch_is_refused(bare_beton):
    loader = _loader(bare_beton)
    with pytest.raises(InvalidValueError, match="of batch 16, but an epoch has 15 batches"):
        loader.load_state_dict(loader.state_dict() | {"batches": 16})


def test_the_state_of_another_decoder_is_refused(bare_beton):
    require_library("dali")
    state = _loader(bare_beton).state_dict()
    with pytest.raises(
        InvalidValueError, match=r"decoder \(.*'cpu'.* there, .*'dali \(CPU\)'.* here"
    ):
        _loader(bare_beton, backend="dali").load_state_dict(state)
