"""The fields of a batch."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from fastprune.base.errors import InvalidValueError, LoadingError
from fastprune.loading.contrast import ContrastRows, contrast_batches
from fastprune.loading.loader import Loader
from fastprune.loading.sending import one_ahead

ROWS = ("images", "labels", "rows")
CONTRAST = (*ROWS, "contrast_rows")
TWO_VIEWS = ("images", "second_images", "labels", "rows")


def _loader(path, subset=None, **settings):
    defaults = {"batch_size": 6, "image_size": 32, "augment": "rrc", "dtype": torch.uint8}
    return Loader(path, subset, **{**defaults, **settings})


def test_a_batch_has_the_asked_fields_in_their_order(bare_beton):
    fields = ("rows", "host_rows", "labels")
    loader = _loader(bare_beton, fields=fields)
    rows, host_rows, labels = next(iter(loader))
    assert loader.fields == fields
    assert torch.equal(rows, host_rows)
    assert torch.equal(rows % 3, labels)


def test_contrast_rows_are_the_row_itself_and_kept_rows_of_other_classes(bare_beton):
    kept = np.arange(0, 30, 2)
    loader = _loader(bare_beton, kept, fields=CONTRAST, num_negatives=50)
    for _, labels, rows, contrast in loader:
        assert contrast.shape == (6, 51)
        assert torch.equal(contrast[:, 0], rows)
        assert np.isin(contrast, kept).all()
        assert (contrast[:, 1:] % 3 != labels[:, None]).all()


def test_a_running_iterator_keeps_its_contrast_rows_when_the_rows_change(bare_beton):
    loader = _loader(bare_beton, fields=CONTRAST, num_negatives=50)
    running = iter(loader)
    next(running)
    loader.set_rows(np.arange(7))
    assert all(contrast.max() > 6 for *_, contrast in running)


def test_every_row_of_other_classes_is_drawn_about_as_often():
    rows, labels = np.arange(100) * 2, np.repeat([0, 3, 5], [20, 50, 30])
    contrast = ContrastRows(rows, labels, num_negatives=8000, seed=0)
    drawn = contrast.draw(rows[[30]], labels[[30]], epoch=0)[0, 1:].numpy()
    values, counts = np.unique(drawn, return_counts=True)
    assert (values == rows[labels != 3]).all()
    assert counts.min() > 100


def test_contrast_rows_depend_on_seed_epoch_and_row_alone():
    rows, labels = np.arange(40), np.arange(40) % 4
    draw = ContrastRows(rows, labels, num_negatives=9, seed=1).draw
    whole = draw(rows, labels, epoch=2)
    assert (draw(rows[7:9], labels[7:9], epoch=2) == whole[7:9]).all()
    assert (draw(rows, labels, epoch=3) != whole).any()
    assert (
        ContrastRows(rows, labels, num_negatives=9, seed=2).draw(rows, labels, epoch=2) != whole
    ).any()


def test_contrast_rows_drawn_ahead_are_those_drawn_at_once():
    rows, labels = np.arange(100), np.arange(100) % 4
    contrast = ContrastRows(rows, labels, num_negatives=9, seed=1)
    batches = [*np.random.default_rng(0).permutation(100).reshape(10, 10)]
    drawn = contrast_batches(contrast, labels, batches, epoch=3, num_workers=2)
    for batch, ahead in zip(batches, drawn, strict=True):
        assert torch.equal(ahead, contrast.draw(batch, labels[batch], epoch=3))


def test_contrast_rows_stay_with_their_rows_where_rows_are_left_out(beton_copy, damage_row):
    settings = {"fields": CONTRAST, "num_negatives": 9, "order": "sequential"}
    whole = {int(row[0]): row for batch in _loader(beton_copy, **settings) for row in batch[3]}
    # The second batch is lost, and a row of the third.
    for row in (*range(6, 12), 14):
        damage_row(beton_copy, row, b"\0\0\0\0")
    batches = list(_loader(beton_copy, on_error="skip", **settings))
    assert [len(batch[2]) for batch in batches] == [6, 5, 6, 6]
    for _, _, rows, contrast in batches:
        assert all(torch.equal(contrast[i], whole[int(row)]) for i, row in enumerate(rows))


def test_contrast_rows_of_a_single_class_are_refused(bare_beton):
    with pytest.raises(InvalidValueError, match=r"two classes, but all are of class 1. Keep more"):
        _loader(bare_beton, np.arange(1, 30, 3), fields=CONTRAST)


@pytest.mark.parametrize("backend", ["cpu", "dali"])
def test_two_views_of_a_row_differ_and_the_first_is_that_of_other_loaders(bare_beton, backend):
    both = next(iter(_loader(bare_beton, fields=TWO_VIEWS, backend=backend)))
    single = next(iter(_loader(bare_beton, fields=ROWS, backend=backend)))
    first, second, labels, rows = both
    assert torch.equal(first, single[0])
    assert torch.equal(labels, single[1])
    assert torch.equal(rows, single[2])
    assert first.shape == second.shape
    assert not torch.equal(first, second)


def test_a_row_left_out_of_two_views_counts_once(beton_copy, damage_row):
    damage_row(beton_copy, 2, b"\0\0\0\0")
    loader = _loader(
        beton_copy,
        fields=TWO_VIEWS,
        order="sequential",
        on_error="skip",
    )
    first, second, _, rows = next(iter(loader))
    assert rows.tolist() == [0, 1, 3, 4, 5]
    assert len(first) == len(second) == 5
    assert loader.num_skipped == 1


def test_a_transform_is_seeded_by_the_row_and_leaves_torchs_generator_alone(bare_beton):
    def images(**settings):
        loader = _loader(bare_beton, fields=ROWS, transform=v2.RandAugment(), **settings)
        return {int(rows[i]): x[i] for x, _, rows in loader for i in range(len(rows))}

    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    one = images(tail="exact")
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(4)
    other = images(tail="exact", batch_size=5)
    assert all(torch.equal(one[row], other[row]) for row in range(30))
    plain = next(iter(_loader(bare_beton, fields=ROWS)))
    assert any(not torch.equal(one[int(row)], x) for x, row in zip(plain[0], plain[2], strict=True))


def test_a_transform_of_images_on_the_cpu_leaves_the_generators_of_gpus_alone(
    bare_beton, monkeypatch
):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    next(iter(_loader(bare_beton, transform=torch.zeros_like)))
    assert not seeded


def test_with_two_views_only_the_second_is_transformed(bare_beton):
    loader = _loader(bare_beton, fields=TWO_VIEWS, transform=torch.zeros_like)
    first, second, _, _ = next(iter(loader))
    assert first.any()
    assert not second.any()


def test_one_item_is_made_ahead_but_for_the_first():
    made = []

    def items():
        for number in range(4):
            made.append(number)
            yield number

    seen = [(number, list(made)) for number in one_ahead(items())]
    assert seen == [(0, [0]), (1, [0, 1, 2]), (2, [0, 1, 2, 3]), (3, [0, 1, 2, 3])]


@pytest.mark.parametrize("num_good", [0, 1, 2, 3])
def test_an_error_made_ahead_comes_in_its_turn(num_good):
    def items():
        yield from range(num_good)
        raise LoadingError("row 7")

    given = []
    with pytest.raises(LoadingError, match="row 7"):
        for item in one_ahead(items()):
            given.append(item)  # noqa: PERF402 - what came before the error is kept
    assert given == list(range(num_good))
