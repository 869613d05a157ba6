import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fastprune import Loader, convert, open_beton, score
from fastprune.base.errors import ArtifactError, InvalidValueError
from fastprune.difficulty.kernels import centroid_distances, centroid_median_distances
from fastprune.networks import build_network, save_weights
from fastprune.rows.score_table import ScoreTable
from tests.difficulty.betons import small_beton, small_teacher

SIDE = 32


@pytest.fixture(scope="module")
def beton(tmp_path_factory):
    return small_beton(tmp_path_factory.mktemp("beton"))


def run(beton, teacher, out, **options):
    options = {"image_size": SIDE, "batch_size": 4, "num_workers": 1, **options}
    return score(beton, teacher, out, **options)


def assert_same(first, second):
    """The tables hold the same bits."""
    assert first.metrics.keys() == second.metrics.keys()
    for name in first.metrics:
        assert np.array_equal(first.metrics[name], second.metrics[name]), name
    assert np.array_equal(first.predictions, second.predictions)
    assert np.array_equal(first.class_std, second.class_std, equal_nan=True)


class _Interrupted(Exception):
    """What stops a pass in these tests."""


class _StopsAfter(nn.Module):
    """A teacher that fails at its n-th batch; the trial image counts as one."""

    def __init__(self, network, batches):
        super().__init__()
        self.network = network
        self.left = batches

    def forward(self, images):
        if self.left == 0:
            raise _Interrupted
        self.left -= 1
        return self.network(images)


def test_scores_are_what_the_teacher_says_of_every_row(beton, tmp_path):
    teacher = small_teacher()
    table = run(beton, teacher, tmp_path / "scores.parquet")
    images = [images for images, _ in Loader(beton, train=False, image_size=SIDE, device="cpu")]
    labels = torch.from_numpy(open_beton(beton).labels.copy())
    with torch.no_grad():
        seen = []
        teacher.fc.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        logits = teacher.eval()(torch.cat(images))
    features = seen[0].numpy()
    np.testing.assert_allclose(
        table.metric("loss"),
        functional.cross_entropy(logits, labels, reduction="none"),
        rtol=1e-4,
    )
    assert np.array_equal(table.predictions, logits.argmax(dim=1))
    assert table.seconds > 0
    # The features are kept in float16, so distances agree to its precision.
    for name, kernel in (
        ("centroid", centroid_distances),
        ("centroid_median", centroid_median_distances),
    ):
        np.testing.assert_allclose(table.metric(name), kernel(features, labels), rtol=2e-3)
    std = logits.double().std(dim=1)
    expected = [std[labels == label].mean() for label in range(3)]
    np.testing.assert_allclose(table.class_std, expected, rtol=1e-5)
    assert table.class_counts.tolist() == [8, 8, 8]


def test_table_on_disk_is_the_one_returned_and_tells_where_it_came_from(beton, tmp_path):
    table = run(beton, small_teacher(), tmp_path / "scores.parquet")
    loaded = ScoreTable.load(tmp_path / "scores.parquet")
    assert_same(table, loaded)
    assert loaded.fingerprint == open_beton(beton).fingerprint
    assert loaded.teacher["network"] == "SmallResNet"
    assert len(loaded.teacher["weights_digest"]) == 32
    assert loaded.view["augment"] == "center"
    assert loaded.view["image_size"] == SIDE


def test_nothing_but_the_table_is_left(beton, tmp_path):
    run(beton, small_teacher(), tmp_path / "scores.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["scores.parquet"]


def test_features_are_kept_on_request_and_give_the_same_distances(beton, tmp_path):
    table = run(beton, small_teacher(), tmp_path / "scores.parquet", keep_features=True)
    features = np.load(tmp_path / "scores.features.npy", mmap_mode="r")
    assert (features.shape, features.dtype) == ((24, 64), np.float16)
    assert np.array_equal(centroid_distances(features, table.labels), table.metric("centroid"))


def test_teacher_keeps_its_mode_and_its_hooks(beton, tmp_path):
    teacher = small_teacher().train()
    teacher.bn1.eval()
    run(beton, teacher, tmp_path / "scores.parquet")
    assert teacher.training
    assert not teacher.bn1.training
    assert not teacher.fc._forward_pre_hooks


def test_named_teacher_with_a_checkpoint_scores_as_the_network_does(beton, tmp_path):
    teacher = small_teacher()
    expected = run(beton, teacher, tmp_path / "expected.parquet")
    save_weights(
        teacher,
        tmp_path / "teacher.safetensors",
        metadata={"network": "resnet8", "image_size": str(SIDE)},
    )
    named = run(
        beton, "resnet8", tmp_path / "named.parquet", checkpoint=tmp_path / "teacher.safetensors"
    )
    told = run(
        beton,
        None,
        tmp_path / "told.parquet",
        checkpoint=tmp_path / "teacher.safetensors",
        image_size=None,
    )
    factory = run(beton, "tests.difficulty.betons:teacher_factory", tmp_path / "factory.parquet")
    for table in (named, told, factory):
        assert_same(table, expected)
    assert told.view["image_size"] == SIDE
    assert named.teacher["checkpoint"] == "teacher.safetensors"


def test_checkpoint_that_tells_how_its_images_were_normalised_sees_them_so(beton, tmp_path):
    path = tmp_path / "teacher.safetensors"
    told = {
        "network": "resnet8",
        "image_size": str(SIDE),
        "mean": "[0.1, 0, 0]",
        "std": "[1, 2, 3]",
    }
    save_weights(build_network("resnet8", num_classes=3), path, metadata=told)
    table = run(beton, None, tmp_path / "scores.parquet", checkpoint=path, image_size=None)
    assert (table.view["mean"], table.view["std"]) == ([0.1, 0, 0], [1, 2, 3])


def test_views_are_averaged(beton, tmp_path):
    teacher = small_teacher()
    table = run(beton, teacher, tmp_path / "scores.parquet", views=3, seed=5)
    losses = []
    loader = Loader(
        beton,
        image_size=SIDE,
        batch_size=24,
        order="sequential",
        tail="exact",
        seed=5,
        device="cpu",
    )
    for _ in range(3):
        images, labels = next(iter(loader))
        with torch.no_grad():
            logits = teacher.eval()(images)
        losses.append(functional.cross_entropy(logits, labels, reduction="none").numpy())
    np.testing.assert_allclose(table.metric("loss"), np.mean(losses, axis=0), rtol=1e-4)
    assert table.view["views"] == 3


def test_feature_layer_is_what_distances_are_taken_in(beton, tmp_path):
    table = run(
        beton,
        small_teacher(),
        tmp_path / "scores.parquet",
        feature_layer="layer2",
        keep_features=True,
    )
    assert np.load(tmp_path / "scores.features.npy").shape == (24, 32)
    # The last layer's gradient needs that layer's own input.
    assert "grand_last" not in table.metrics
    assert "el2n" in table.metrics


def test_compiled_teacher_scores_as_the_plain_one(beton, tmp_path):
    teacher = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 3))
    plain = run(beton, teacher, tmp_path / "plain.parquet", batch_size=24)
    compiled = run(
        beton, teacher, tmp_path / "compiled.parquet", batch_size=24, compile_teacher=True
    )
    np.testing.assert_allclose(compiled.metric("loss"), plain.metric("loss"), rtol=1e-4)


def test_bfloat16_scores_are_near_those_of_float32(beton, tmp_path):
    exact = run(beton, small_teacher(), tmp_path / "exact.parquet")
    rough = run(beton, small_teacher(), tmp_path / "rough.parquet", precision="bf16")
    assert rough.teacher["dtype"] == "torch.bfloat16"
    assert not np.array_equal(exact.metric("loss"), rough.metric("loss"))
    np.testing.assert_allclose(rough.metric("loss"), exact.metric("loss"), atol=0.1)


def test_features_beyond_float16_switch_the_file_to_float32(beton, tmp_path):
    class Jumps(nn.Module):
        """Multiplies the features of all but the first two rows by a million."""

        def __init__(self):
            super().__init__()
            self.calls = 0
            self.fc = nn.Linear(3, 3)

        def forward(self, images):
            self.calls += 1
            return self.fc(images.mean(dim=(2, 3)) * (1e6 if self.calls > 2 else 1))

    table = run(beton, Jumps(), tmp_path / "scores.parquet", keep_features=True)
    features = np.load(tmp_path / "scores.features.npy")
    assert features.dtype == np.float32
    assert np.abs(features).max() > 65504
    assert np.abs(features[:4]).max() < 10
    assert np.isfinite(table.metric("centroid")).all()


@pytest.mark.parametrize("batches", [1, 2, 4, 6])
def test_interrupted_pass_goes_on_and_equals_an_uninterrupted_one(beton, tmp_path, batches):
    expected = run(beton, _StopsAfter(small_teacher(), 99), tmp_path / "expected.parquet")
    out = tmp_path / "scores.parquet"
    with pytest.raises(_Interrupted):
        run(beton, _StopsAfter(small_teacher(), batches), out)
    assert not out.exists()
    done = np.load(tmp_path / "scores.parquet.partial/marks.npy")
    assert np.flatnonzero(done).tolist() == list(range(4 * (batches - 1)))
    rest = _StopsAfter(small_teacher(), 8 - batches)
    assert_same(run(beton, rest, out), expected)
    assert rest.left == 0
    assert not (tmp_path / "scores.parquet.partial").exists()


def test_restart_forgets_the_unfinished_pass(beton, tmp_path):
    out = tmp_path / "scores.parquet"
    with pytest.raises(_Interrupted):
        run(beton, _StopsAfter(small_teacher(), 3), out)
    teacher = _StopsAfter(small_teacher(), 7)
    run(beton, teacher, out, resume=False)
    assert teacher.left == 0


def test_unfinished_pass_of_another_teacher_is_not_gone_on_with(beton, tmp_path):
    out = tmp_path / "scores.parquet"
    with pytest.raises(_Interrupted):
        run(beton, _StopsAfter(small_teacher(seed=1), 3), out)
    table = run(beton, small_teacher(seed=2), out)
    assert_same(table, run(beton, small_teacher(seed=2), tmp_path / "expected.parquet"))


def test_table_in_a_folder_that_is_not_there_is_refused_before_the_pass(beton, tmp_path):
    with pytest.raises(ArtifactError, match=r"No such file.*a folder that exists"):
        run(beton, small_teacher(), tmp_path / "none" / "scores.parquet")


SLOW = """
import time
from fastprune import score
from fastprune.difficulty import unfinished_pass
from tests.difficulty.betons import small_teacher

unfinished_pass._COMMIT_SECONDS = 0.0
network = small_teacher()
network.register_forward_hook(lambda *_: time.sleep(0.3))
score({beton!r}, network, {out!r}, image_size=32, batch_size=4, num_workers=1)
"""


def test_pass_killed_by_the_system_goes_on_where_it_was(beton, tmp_path):
    out = tmp_path / "scores.parquet"
    marks = tmp_path / "scores.parquet.partial" / "marks.npy"
    code = SLOW.format(beton=str(beton), out=str(out))
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while not (marks.exists() and np.load(marks).sum() >= 8):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    rows_done = np.load(marks).sum()
    seen = []
    teacher = small_teacher()
    teacher.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    table = run(beton, teacher, out)
    assert sum(seen) == 1 + 24 - rows_done
    assert_same(table, run(beton, small_teacher(), tmp_path / "expected.parquet"))


def test_label_outside_the_teachers_classes_is_refused_with_the_row(beton, tmp_path):
    with pytest.raises(
        InvalidValueError, match=r"row 16 of .*train\.beton has label 2.*2 classes are 0 to 1"
    ):
        run(beton, small_teacher(num_classes=2), tmp_path / "s.parquet", num_classes=2)


def test_teacher_of_another_class_count_is_refused(beton, tmp_path):
    with pytest.raises(InvalidValueError, match=r"no linear layer with 3 outputs.*'fc', has 10"):
        run(beton, small_teacher(num_classes=10), tmp_path / "s.parquet")
    with pytest.raises(InvalidValueError, match=r"shape \(1, 10\).*but 3 classes are wanted"):
        run(beton, small_teacher(num_classes=10), tmp_path / "s.parquet", feature_layer="layer3")


def test_teacher_with_more_classes_is_taken_where_that_is_said(beton, tmp_path):
    table = run(beton, small_teacher(num_classes=10), tmp_path / "s.parquet", num_classes=10)
    assert table.class_counts.tolist() == [8, 8, 8] + [0] * 7
    assert np.isnan(table.class_std[3:]).all()


def test_checkpoint_of_another_network_is_refused(beton, tmp_path):
    torch.save(build_network("resnet14", num_classes=3).state_dict(), tmp_path / "teacher.pth")
    with pytest.raises(
        ArtifactError, match=r"teacher\.pth does not fit SmallResNet: 36 unexpected"
    ):
        run(beton, "resnet8", tmp_path / "s.parquet", checkpoint=tmp_path / "teacher.pth")


def test_row_with_features_that_are_not_finite_is_named(beton, tmp_path):
    class Spoils(nn.Module):
        """Gives NaN for one image."""

        def __init__(self):
            super().__init__()
            self.calls = 0
            self.fc = nn.Linear(3, 3)

        def forward(self, images):
            self.calls += 1
            features = images.mean(dim=(2, 3))
            if self.calls == 4:
                features[1] = torch.nan
            return self.fc(features)

    with pytest.raises(InvalidValueError, match=r"NaN or infinity for row 9.*--precision fp32"):
        run(beton, Spoils(), tmp_path / "s.parquet")


@pytest.mark.parametrize(
    ("teacher", "options", "message"),
    [
        (None, {}, "there is no teacher. Name one"),
        ("resnet8", {}, "resnet8 has no published weights.*--teacher-checkpoint"),
        ("resnet8", {"checkpoint": "a.pth", "weights": "DEFAULT"}, "Leave one of them out"),
        (None, {"checkpoint": "a.pth"}, r"a.pth does not name its network.*--teacher"),
        ("network", {"checkpoint": "a.pth"}, "the teacher is a network.*leave the checkpoint"),
        ("network", {"views": -1}, "views must be an integer >= 0, not -1"),
        ("network", {"views": "train"}, "views must be an integer >= 0, not 'train'"),
        ("network", {"image_size": 0}, "image_size must be an integer from 1 to 8,192, not 0"),
        ("network", {"image_size": 99999}, "integer from 1 to 8,192, not 99999"),
        ("network", {"precision": "half"}, "precision must be one of 'auto', 'fp32', 'bf16'"),
        ("network", {"batch_size": 0}, "batch_size must be an integer >= 1, not 0"),
    ],
)
def test_wrong_arguments_are_refused(beton, tmp_path, teacher, options, message):
    teacher = small_teacher() if teacher == "network" else teacher
    with pytest.raises(InvalidValueError, match=message):
        run(beton, teacher, tmp_path / "s.parquet", **options)


def test_shards_get_the_scores_of_the_single_beton(beton, tmp_path):
    convert(beton.parent / "images", tmp_path / "train", shards=3)
    sharded = run(tmp_path / "train", small_teacher(), tmp_path / "sharded.parquet")
    single = run(beton, small_teacher(), tmp_path / "single.parquet")
    assert_same(sharded, single)
    assert sharded.fingerprint == single.fingerprint
