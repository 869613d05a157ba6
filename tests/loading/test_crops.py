import hashlib
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastprune.beton.opening import open_beton
from fastprune.decoding.views import FLIP, HEIGHT, LEFT, SHIFT_DOWN, SHIFT_RIGHT, TOP, WIDTH
from fastprune.loading import crops
from fastprune.loading.crops import CropPolicy, warn_of_enlarging

_MASK = 2**64 - 1


def _absorb(key, value):
    """The hash, in Python integers."""
    z = ((key ^ (value * 0xBF58476D1CE4E5B9 & _MASK)) + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def _random_box(seed, epoch, k, row, width, height):
    """torchvision's RandomResizedCrop.get_params with the hash for random numbers."""
    key = _absorb(_absorb(_absorb(_absorb(0, seed), epoch), k), row)

    def uniform(counter, low, high):
        return low + (_absorb(key, counter) >> 11) * 2.0**-53 * (high - low)

    flip = int(uniform(0, 0.0, 2.0))
    for attempt in range(10):
        first = 1 + 4 * attempt
        area = height * width * uniform(first, 0.08, 1.0)
        aspect = math.exp(uniform(first + 1, math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(uniform(first + 2, 0.0, height - h + 1))
            return [top, int(uniform(first + 3, 0.0, width - w + 1)), h, w, 0, 0, flip]
    h, w = height, width
    if width / height < 3 / 4:
        h = round(width / (3 / 4))
    elif width / height > 4 / 3:
        w = round(height * (4 / 3))
    return [(height - h) // 2, (width - w) // 2, h, w, 0, 0, flip]


def _views(kind, rows, width, height, *, seed=0, epoch=0, k=0, image_size=224):
    policy = CropPolicy.make(kind, image_size=image_size, train=True)
    rows = np.asarray(rows, np.int64)
    widths, heights = np.full(len(rows), width), np.full(len(rows), height)
    return policy.views(rows, widths, heights, seed=seed, slot=epoch, k=k)


keys = st.integers(0, 2**63 - 1)
sides = st.integers(1, 65_535)


@given(keys, keys, st.integers(0, 9), keys, sides, sides)
def test_a_random_box_is_the_one_of_the_reference(seed, epoch, k, row, width, height):
    view = _views("rrc", [row], width, height, seed=seed, epoch=epoch, k=k)[0]
    assert view.tolist() == _random_box(seed, epoch, k, row, width, height)


@given(st.sampled_from(crops.AUGMENTS), keys, sides, sides)
def test_every_box_lies_within_its_image(kind, row, width, height):
    view = _views(kind, [row], width, height)[0]
    assert view[TOP] >= 0 and view[LEFT] >= 0 and view[HEIGHT] >= 1 and view[WIDTH] >= 1
    assert view[TOP] + view[HEIGHT] <= height and view[LEFT] + view[WIDTH] <= width


def test_a_view_does_not_depend_on_the_rows_beside_it():
    together = _views("rrc", range(50), 500, 375)
    assert (together[17] == _views("rrc", [17], 500, 375)[0]).all()


@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 1}, {"k": 1}])
def test_each_part_of_the_key_changes_the_views(change):
    assert not (
        _views("rrc", range(50), 500, 375) == _views("rrc", range(50), 500, 375, **change)
    ).all()


def test_random_boxes_cover_the_scale_evenly_and_half_of_them_flip():
    views = _views("rrc", range(20_000), 600, 600).astype(np.float64)
    share = views[:, HEIGHT] * views[:, WIDTH] / 600**2
    assert share.min() > 0.07
    assert abs(share.mean() - 0.49) < 0.03
    assert abs(views[:, FLIP].mean() - 0.5) < 0.02


def test_shifts_of_small_images_reach_every_offset_evenly():
    views = _views("pad_crop", range(20_000), 32, 32, image_size=32)
    for column in (SHIFT_DOWN, SHIFT_RIGHT):
        values, counts = np.unique(views[:, column], return_counts=True)
        assert values.tolist() == list(range(-4, 5))
        assert counts.min() > 0.9 * 20_000 / 9
    assert (views[:, [TOP, LEFT, HEIGHT, WIDTH]] == [0, 0, 32, 32]).all()


def test_the_central_square_is_smaller_for_large_outputs_only():
    assert _views("center", [0], 500, 400)[0].tolist() == [25, 75, 350, 350, 0, 0, 0]
    assert _views("center", [0], 32, 32, image_size=32)[0].tolist() == [0, 0, 32, 32, 0, 0, 0]


def test_without_augmentation_the_view_is_the_whole_image():
    assert _views("none", [0], 500, 400)[0].tolist() == [0, 0, 400, 500, 0, 0, 0]


@pytest.mark.parametrize(
    ("train", "image_size", "kind"),
    [(True, 224, "rrc"), (True, 64, "pad_crop"), (False, 224, "center"), (False, 32, "center")],
)
def test_the_usual_recipe_depends_on_purpose_and_size(train, image_size, kind):
    assert CropPolicy.make(None, image_size=image_size, train=train).kind == kind


@pytest.mark.parametrize(
    ("kind", "digest"),
    [
        ("rrc", "34258954198c1568"),
        ("pad_crop", "756222c8369649ba"),
        ("center", "cded24ae1f469d42"),
    ],
)
def test_views_are_drawn_as_they_always_were(kind, digest):
    """Other views would break every resumed run and every cache of a teacher's logits."""
    rows, found = np.arange(300), hashlib.blake2b(digest_size=8)
    widths, heights = 200 + rows % 77, 150 + rows % 91
    policy = CropPolicy.make(kind, image_size=32, train=True)
    for seed in (0, 7):
        for slot in (0, 90):
            for k in (0, 1):
                views = policy.views(rows, widths, heights, seed=seed, slot=slot, k=k)
                found.update(views.astype("<i8").tobytes())
    assert found.hexdigest() == digest


@pytest.mark.parametrize(("factor", "is_warned_of"), [(5, True), (4, False)])
def test_views_far_larger_than_the_images_are_warned_of(bare_beton, caplog, factor, is_warned_of):
    beton = open_beton(bare_beton)
    side = int(np.median(np.minimum(beton.widths, beton.heights)))
    warn_of_enlarging(beton, factor * side)
    assert (f"image_size={side}" in caplog.text) == is_warned_of
