"""Batches with the teacher's logits beside them, for loops without a teacher."""

import pickle

import numpy as np
import pytest
import torch

from fastprune import Loader, TeacherCache
from fastprune.base.errors import ArtifactError, ArtifactMismatch, InvalidValueError
from tests.difficulty.betons import small_beton

CLASSES = 5
FIELDS = ("images", "labels", "rows", "teacher_logits")
SETTINGS = {"image_size": 32, "batch_size": 8, "device": "cpu", "num_workers": 1}


def logits_of(rows, slot):
    return np.sin(np.outer(np.asarray(rows) + 1, np.arange(CLASSES) + slot + 1)).astype(np.float32)


@pytest.fixture(scope="module")
def beton(tmp_path_factory):
    """24 rows, with a manifest."""
    return small_beton(tmp_path_factory.mktemp("beton"))


@pytest.fixture
def cache(beton, tmp_path):
    """Both views of every row but one."""
    loader = Loader(beton, seed=3, **SETTINGS)
    made = TeacherCache.create(
        tmp_path / "cache",
        rows=loader.rows,
        num_classes=CLASSES,
        num_views=2,
        dtype="float32",
        identity=loader.view_identity() | {"teacher": {"weights_digest": "a" * 32}},
    )
    for slot in range(2):
        made.put(loader.rows, slot, logits_of(loader.rows, slot))
    made.commit(seal=True)
    return made


def test_logits_are_those_of_the_rows_and_of_the_slot(beton, cache):
    loader = Loader(
        beton,
        seed=3,
        fields=FIELDS,
        teacher_cache=cache.path,
        **SETTINGS,
    )
    assert loader.num_views == 2
    plain = Loader(beton, seed=3, fields=("images", "labels", "rows"), num_views=2, **SETTINGS)
    for epoch in range(3):
        for batch, expected in zip(loader, plain, strict=True):
            _, _, rows, logits = batch
            assert all(map(torch.equal, batch[:3], expected))
            assert logits.dtype == torch.float32
            assert np.array_equal(logits, logits_of(rows, epoch % 2))


def test_an_open_cache_will_do_and_a_subset_of_its_rows(beton, cache):
    loader = Loader(
        *(beton, cache.rows[:9]),
        **{
            "seed": 3,
            "fields": FIELDS,
            "teacher_cache": cache,
            "tail": "exact",
            **SETTINGS,
        },
    )
    rows = torch.cat([rows for _, _, rows, _ in loader])
    assert sorted(rows.tolist()) == cache.rows[:9].tolist()


def test_a_missing_row_is_named(beton, cache, tmp_path):
    for name in ("slot-001.npy", "filled-001.npy"):
        (cache.path / name).unlink()
    loader = Loader(
        beton,
        seed=3,
        fields=FIELDS,
        teacher_cache=cache.path,
        **SETTINGS,
    )
    assert len(list(loader)) > 0
    with pytest.raises(ArtifactError, match=r"no logits yet of row \d+ in slot 1 .*cache fill"):
        next(iter(loader))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 4}, "seed of the views: 3, and not 4"),
        ({"num_views": 3}, "recurring views: 2, and not 3"),
        ({"image_size": 33}, "image size seen by the teacher: 32, and not 33"),
        ({"augment": "rrc"}, r"crop policy \(kind\)"),
        ({"mean": (0.5, 0.5, 0.5)}, "another mean"),
        ({"transform": torch.nn.Identity()}, r"another transform: None, and not Identity\(\)"),
    ],
)
def test_a_cache_of_other_views_is_refused(beton, cache, options, message):
    settings = {
        "seed": 3,
        "fields": FIELDS,
        "teacher_cache": cache.path,
        **SETTINGS,
    } | options
    with pytest.raises(ArtifactMismatch, match=message):
        Loader(beton, **settings)


def test_fields_and_caches_that_do_not_fit_are_refused(beton, cache):
    with pytest.raises(InvalidValueError, match='field "teacher_logits" needs teacher_cache'):
        Loader(beton, fields=FIELDS, **SETTINGS)
    with pytest.raises(InvalidValueError, match='teacher_cache is for the field "teacher_logits"'):
        Loader(beton, seed=3, teacher_cache=cache.path, **SETTINGS)


def test_mixup_is_refused_beside_cached_logits(beton, cache):
    loader = Loader(
        beton,
        seed=3,
        fields=FIELDS,
        teacher_cache=cache.path,
        **SETTINGS,
    )
    loader.mixup_enabled = True
    with pytest.raises(InvalidValueError, match="mixup and cutmix have not mixed"):
        next(iter(loader))


def test_a_loop_of_another_codebase_learns_without_a_teacher(beton, cache):
    """RepDistiller's loop, with the fourth part of the batch in the place of its teacher."""
    torch.manual_seed(0)
    student = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, CLASSES))
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-4)
    loader = Loader(
        beton,
        seed=3,
        fields=FIELDS,
        teacher_cache=cache.path,
        **SETTINGS,
    )
    distances = []
    for _ in range(8):
        for images, _, _, logits in loader:
            distance = torch.nn.functional.mse_loss(student(images), logits)
            optimizer.zero_grad()
            distance.backward()
            optimizer.step()
            distances.append(float(distance.detach()))
    assert np.mean(distances[-3:]) < np.mean(distances[:3])


@pytest.mark.parametrize("is_open", [False, True])
def test_a_pickled_loader_finds_its_cache_from_any_folder(
    beton, cache, tmp_path, monkeypatch, is_open
):
    monkeypatch.chdir(cache.path.parent)
    given = TeacherCache.open(cache.path.name) if is_open else cache.path.name
    loader = Loader(
        beton,
        seed=3,
        fields=FIELDS,
        teacher_cache=given,
        **SETTINGS,
    )
    pickled = pickle.dumps(loader)
    monkeypatch.chdir("/")
    copy = pickle.loads(pickled)
    for one, two in zip(loader, copy, strict=True):
        assert all(map(torch.equal, one, two))
