import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fastprune import Loader, TeacherCache, convert, open_beton, score
from fastprune.base.errors import ArtifactError, ArtifactMismatch, InvalidValueError
from fastprune.difficulty.fill_cache import fill_cache
from fastprune.networks import save_weights
from fastprune.rows.score_table import ScoreTable
from tests.difficulty.betons import small_beton, small_teacher

SIDE = 32
NUM_ROWS = 24
SETTINGS = {"image_size": SIDE, "batch_size": 5, "num_workers": 1}


@pytest.fixture(scope="module")
def beton(tmp_path_factory):
    return small_beton(tmp_path_factory.mktemp("beton"))


class Counting(nn.Module):
    """A teacher that counts the images it sees, but for the trial images."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.asked = 0

    def forward(self, images):
        self.asked += len(images) * bool(images.any())
        return self.network(images)


def expected_logits(beton, slot, *, seed=0):
    """(24, 3): the teacher on the training view of a slot, row by row."""
    loader = Loader(
        beton,
        image_size=SIDE,
        seed=seed,
        order="sequential",
        tail="exact",
        batch_size=NUM_ROWS,
        device="cpu",
    )
    loader.set_epoch(slot)
    with torch.no_grad():
        return small_teacher().eval()(next(iter(loader))[0]).numpy()


def test_fill_asks_for_every_view_of_every_row_once(beton, tmp_path):
    teacher = Counting(small_teacher())
    cache = fill_cache(beton, teacher, tmp_path / "cache", num_views=3, dtype="float32", **SETTINGS)
    assert teacher.asked == 3 * NUM_ROWS
    for slot in range(3):
        np.testing.assert_allclose(
            cache.logits(np.arange(NUM_ROWS), slot), expected_logits(beton, slot), atol=1e-3
        )
    assert not np.allclose(cache.logits([0], 0), cache.logits([0], 1))
    assert list(cache.check()) == []
    again = Counting(small_teacher())
    fill_cache(beton, again, tmp_path / "cache", **SETTINGS)
    assert again.asked == 0


def test_fill_takes_a_subset_and_slots(beton, tmp_path):
    rows = np.array([1, 4, 20])
    teacher = Counting(small_teacher())
    cache = fill_cache(
        beton, teacher, tmp_path / "cache", num_views=3, subset=rows, slots=[0, 2], **SETTINGS
    )
    assert teacher.asked == 6
    assert cache.rows.tolist() == rows.tolist()
    assert [len(cache.missing(slot)) for slot in range(3)] == [0, 3, 0]
    with pytest.raises(InvalidValueError, match=r"no room for row 0: it was made for other rows"):
        fill_cache(beton, teacher, tmp_path / "cache", **SETTINGS)
    with pytest.raises(InvalidValueError, match=r"slot \(3\) must be in \[0, 3\)"):
        fill_cache(beton, teacher, tmp_path / "cache", subset=rows, slots=[1, 3], **SETTINGS)
    assert teacher.asked == 6  # nor was slot 1 filled before


def test_fill_takes_the_teacher_s_own_classes_where_images_have_none(tmp_path):
    small_beton(tmp_path)
    beton = tmp_path / "unlabeled.beton"
    convert(tmp_path / "images", beton, unlabeled=True)
    teacher = {"network": "resnet8", "num_classes": "5"}
    save_weights(small_teacher(num_classes=5), tmp_path / "teacher.safetensors", metadata=teacher)
    checkpoint = tmp_path / "teacher.safetensors"
    cache = fill_cache(
        beton, None, tmp_path / "cache", checkpoint=checkpoint, num_views=1, **SETTINGS
    )
    assert cache.num_classes == 5
    with pytest.raises(InvalidValueError, match=r"has no classifier\..*--teacher-classes"):
        fill_cache(beton, small_teacher(), tmp_path / "other", num_views=1, **SETTINGS)


def test_fill_fills_the_holes_that_another_run_left(beton, tmp_path):
    teacher = Counting(small_teacher())
    cache = fill_cache(beton, teacher, tmp_path / "cache", num_views=2, **SETTINGS)
    for file in cache.path.glob("*-001.npy"):
        file.unlink()
    whole = fill_cache(beton, teacher, tmp_path / "cache", **SETTINGS)
    assert teacher.asked == 3 * NUM_ROWS
    assert len(whole.missing(1)) == 0


def test_scoring_training_views_fills_the_first_slots(beton, tmp_path):
    teacher = Counting(small_teacher())
    table = score(
        beton,
        teacher,
        tmp_path / "scores.parquet",
        views=1,
        seed=7,
        cache=tmp_path / "cache",
        num_views=4,
        cache_dtype="float32",
        **SETTINGS,
    )
    assert teacher.asked == NUM_ROWS
    assert table.view["views"] == 1
    cache = TeacherCache.open(tmp_path / "cache")
    assert cache.num_views == 4
    assert [len(cache.missing(slot)) for slot in range(4)] == [0, 24, 24, 24]
    logits = cache.logits(np.arange(NUM_ROWS), 0)
    np.testing.assert_allclose(logits, expected_logits(beton, 0, seed=7), atol=1e-3)
    # Scores and class std are of the very views that training shows.
    labels = open_beton(beton).labels
    std = logits.astype(np.float64).std(axis=1, ddof=1)
    expected = [std[labels == label].mean() for label in range(3)]
    np.testing.assert_allclose(table.class_std, expected, rtol=1e-5)
    np.testing.assert_array_equal(table.predictions, logits.argmax(axis=1))
    assert list(cache.check()) == []


def test_scoring_n_views_fills_n_slots_and_changes_no_score(beton, tmp_path):
    plain = score(beton, small_teacher(), tmp_path / "plain.parquet", views=2, **SETTINGS)
    teacher = Counting(small_teacher())
    kept = score(
        beton,
        teacher,
        tmp_path / "kept.parquet",
        views=2,
        cache=tmp_path / "cache",
        num_views=2,
        **SETTINGS,
    )
    for name, values in plain.metrics.items():
        assert np.array_equal(kept.metrics[name], values), name
    cache = TeacherCache.open(tmp_path / "cache")
    assert [len(cache.missing(slot)) for slot in range(2)] == [0, 0]
    fill_cache(beton, teacher, tmp_path / "cache", **SETTINGS)
    assert teacher.asked == 2 * NUM_ROWS


def test_the_center_crop_is_the_default_and_depends_on_no_seed(beton, tmp_path):
    tables = [
        score(beton, small_teacher(), tmp_path / f"{number}.parquet", **SETTINGS, **options)
        for number, options in enumerate([{}, {"views": 0, "seed": 3}, {"views": 1}])
    ]
    assert np.array_equal(tables[0].metric("loss"), tables[1].metric("loss"))
    assert not np.array_equal(tables[0].metric("loss"), tables[2].metric("loss"))
    assert [table.view["augment"] for table in tables] == ["center", "center", "train"]


def test_the_policy_of_the_training_is_scored(beton, tmp_path):
    table = score(
        beton, small_teacher(), tmp_path / "s.parquet", views=1, augment="rrc", **SETTINGS
    )
    assert table.view["augment"] == "rrc"
    other = score(beton, small_teacher(), tmp_path / "t.parquet", views=1, **SETTINGS)
    assert not np.array_equal(table.metric("loss"), other.metric("loss"))


def test_a_center_crop_is_kept_in_no_cache_and_k_must_be_known(beton, tmp_path):
    arguments = (beton, small_teacher(), tmp_path / "scores.parquet")
    with pytest.raises(InvalidValueError, match=r"not the center crop.*--views 1"):
        score(*arguments, cache=tmp_path / "cache", num_views=2, **SETTINGS)
    with pytest.raises(InvalidValueError, match=r"how many views recur.*--num-views"):
        score(*arguments, cache=tmp_path / "cache", views=1, **SETTINGS)
    with pytest.raises(InvalidValueError, match="num_views must be an integer >= 3, not 2"):
        score(*arguments, cache=tmp_path / "cache", views=3, num_views=2, **SETTINGS)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1}, "seed of the views: 0, and not 1"),
        ({"image_size": 24}, "image size seen by the teacher: 32, and not 24"),
        ({"image_size": 33}, "image size seen by the teacher: 32, and not 33"),
        ({"mean": (0.0, 0.0, 0.0)}, "another mean"),
        ({"std": (1.0, 1.0, 1.0)}, "another std"),
        ({"augment": "rrc"}, r"crop policy \(kind\): pad_crop, and not rrc"),
        ({"precision": "bf16"}, "teacher's precision: fp32, and not bf16"),
        ({"num_views": 3}, "recurring views: 2, and not 3"),
        ({"dtype": "uint8"}, "stores float16, but uint8"),
    ],
)
def test_a_cache_of_another_setting_is_refused(beton, tmp_path, options, message):
    fill_cache(beton, small_teacher(), tmp_path / "cache", num_views=2, slots=[], **SETTINGS)
    with pytest.raises(ArtifactMismatch, match=message):
        fill_cache(beton, small_teacher(), tmp_path / "cache", **SETTINGS | options)


def test_a_cache_of_another_teacher_or_other_images_is_refused(beton, tmp_path):
    fill_cache(beton, small_teacher(), tmp_path / "cache", num_views=2, slots=[], **SETTINGS)
    with pytest.raises(ArtifactMismatch, match=r"another teacher \(weights_digest\)"):
        fill_cache(beton, small_teacher(seed=1), tmp_path / "cache", **SETTINGS)
    other = small_beton(tmp_path, per_class=9)
    with pytest.raises(ArtifactMismatch, match="was made from beton"):
        fill_cache(other, small_teacher(), tmp_path / "cache", **SETTINGS)


def test_logits_that_float16_cannot_hold_stop_the_filling(beton, tmp_path):
    teacher = small_teacher()
    with torch.no_grad():
        teacher.fc.bias += 1e6
    with pytest.raises(InvalidValueError, match=r'too large for float16 .*"float32"'):
        fill_cache(beton, teacher, tmp_path / "cache", num_views=1, **SETTINGS)
    with pytest.raises(InvalidValueError, match=r'too large for float16 .*"float32"'):
        score(
            *(beton, teacher, tmp_path / "scores.parquet"),
            **{"views": 1, "cache": tmp_path / "cache", **SETTINGS},
        )


def test_a_disk_that_fills_up_costs_the_cache_and_not_the_scores(
    beton, tmp_path, monkeypatch, caplog
):
    def full(*_):
        raise ArtifactError("cannot write: no space left on device")

    monkeypatch.setattr(TeacherCache, "put", full)
    table = score(
        *(beton, small_teacher(), tmp_path / "scores.parquet"),
        **{"views": 1, "cache": tmp_path / "cache", "num_views": 2, **SETTINGS},
    )
    assert len(table.metric("loss")) == NUM_ROWS
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "the teacher cache is not filled any further: cannot write" in warnings[0].message
    assert ScoreTable.load(tmp_path / "scores.parquet").num_rows == NUM_ROWS


def torchrun(folder, *arguments, processes=2):
    save_weights(
        small_teacher(),
        folder / "teacher.safetensors",
        metadata={"network": "resnet8", "image_size": str(SIDE)},
    )
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(processes), "-m", "fastprune", *map(str, arguments)),
            *("--teacher-checkpoint", folder / "teacher.safetensors", "--workers", "1"),
            *("--batch-size", "5", "--device", "cpu"),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )


def test_two_processes_fill_what_one_does(beton, tmp_path):
    one = fill_cache(
        beton, small_teacher(), tmp_path / "one", num_views=2, dtype="float32", **SETTINGS
    )
    done = torchrun(
        tmp_path, "cache", "fill", beton, tmp_path / "two", "--num-views", 2, "--dtype", "float32"
    )
    assert done.returncode == 0, done.stderr
    assert "48 of 48 views (2 of 24 rows)" in done.stdout
    assert done.stdout.count("views") == 1
    two = TeacherCache.open(tmp_path / "two", identity=one.identity)
    for slot in range(2):
        # A row's position in its batch decides its last bits on some CPUs.
        np.testing.assert_allclose(
            two.logits(one.rows, slot), one.logits(one.rows, slot), rtol=1e-4, atol=1e-5
        )
    assert list(two.check()) == []


def test_two_processes_score_into_one_cache(beton, tmp_path):
    done = torchrun(
        *(tmp_path, "score", beton, "-o", tmp_path / "scores.parquet"),
        *("--views", "train", "--cache", tmp_path / "cache", "--num-views", 2),
    )
    assert done.returncode == 0, done.stderr
    cache = TeacherCache.open(tmp_path / "cache")
    assert [len(cache.missing(slot)) for slot in range(2)] == [0, NUM_ROWS]
    logits = cache.logits(np.arange(NUM_ROWS), 0)
    table = ScoreTable.load(tmp_path / "scores.parquet")
    np.testing.assert_array_equal(table.predictions, logits.argmax(axis=1))
