"""Scoring without labels: clusters of features in the place of classes."""

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from fastprune import ScoreTable, Subset, convert, open_beton, score
from fastprune.base.errors import ArtifactError, InvalidValueError
from fastprune.cli import main
from fastprune.difficulty.clusters import spherical_kmeans
from fastprune.networks import build_network, save_weights
from fastprune.report.scores import report_scores
from fastprune.selection.subsets import make_subset
from tests.difficulty.betons import small_teacher
from tests.difficulty.test_score import _Interrupted, _StopsAfter
from tests.images import write_image_folder

SIDE = 32


@pytest.fixture(scope="module")
def beton(tmp_path_factory):
    folder = tmp_path_factory.mktemp("beton")
    write_image_folder(folder / "images", classes=3, per_class=8)
    convert(folder / "images", folder / "train.beton", unlabeled=True)
    return folder / "train.beton"


def run(beton, teacher, out, **options):
    settings = {"image_size": SIDE, "batch_size": 4, "num_workers": 1, "num_clusters": 4}
    return score(beton, teacher, out, **(settings | options))


def headless(name="resnet8"):
    torch.manual_seed(0)
    return build_network(name, num_classes=0)


def test_difficulty_is_the_distance_to_the_center_of_the_own_cluster(beton, tmp_path):
    table = run(beton, headless(), tmp_path / "scores.parquet", keep_features=True, seed=5)
    features = np.load(tmp_path / "scores.features.npy")
    clusters = spherical_kmeans(features, 4, seed=5)
    assert list(table.metrics) == ["prototype"]
    assert np.array_equal(table.metric("prototype"), clusters.distances)
    assert np.array_equal(table.clusters, clusters.assignments)
    assert table.clustering["num_clusters"] == 4
    assert table.clustering["seed"] == 5
    assert (table.predictions == -1).all()


def test_the_table_survives_its_file(beton, tmp_path):
    table = run(beton, headless(), tmp_path / "scores.parquet")
    loaded = ScoreTable.load(tmp_path / "scores.parquet")
    assert np.array_equal(loaded.groups, table.clusters)
    assert loaded.clustering == table.clustering
    assert loaded.group_counts.sum() == 24


def test_batches_and_threads_change_no_bit(beton, tmp_path):
    one = run(beton, headless(), tmp_path / "a.parquet")
    other = run(beton, headless(), tmp_path / "b.parquet", num_workers=2)
    assert one.clusters.tobytes() == other.clusters.tobytes()
    assert one.metric("prototype").tobytes() == other.metric("prototype").tobytes()


def test_a_classifier_adds_the_metrics_that_need_no_label(beton, tmp_path):
    table = run(beton, small_teacher(num_classes=7), tmp_path / "scores.parquet", num_classes=7)
    assert list(table.metrics) == ["prototype", "entropy", "confidence", "logit_std"]
    assert np.isfinite(table.metric("entropy")).all()


def test_a_checkpoint_says_how_many_classes_its_teacher_has(beton, tmp_path):
    metadata = {"network": "resnet8", "num_classes": "7"}
    save_weights(small_teacher(num_classes=7), tmp_path / "t.safetensors", metadata=metadata)
    table = run(beton, None, tmp_path / "a.parquet", checkpoint=tmp_path / "t.safetensors")
    assert table.teacher["num_classes"] == 7


def test_a_timm_teacher_needs_no_head(beton, tmp_path):
    pytest.importorskip("timm")
    name = "timm:efficientvit_m0"
    save_weights(headless(name), tmp_path / "t.safetensors")
    table = run(
        beton,
        name,
        tmp_path / "a.parquet",
        checkpoint=tmp_path / "t.safetensors",
        image_size=64,
    )
    assert table.teacher["num_classes"] == 0
    assert set(table.clusters) == {0, 1, 2, 3}


def test_labels_are_not_looked_at(beton, tmp_path):
    write_image_folder(tmp_path / "images", classes=3, per_class=8)
    convert(tmp_path / "images", tmp_path / "labeled.beton")
    labeled = run(tmp_path / "labeled.beton", headless(), tmp_path / "a.parquet")
    assert (
        labeled.clusters.tolist()
        == run(beton, headless(), tmp_path / "b.parquet").clusters.tolist()
    )
    assert labeled.labels.max() == 2
    assert np.array_equal(labeled.groups, labeled.clusters)


def test_a_killed_pass_is_resumed_with_another_number_of_clusters(beton, tmp_path):
    out = tmp_path / "scores.parquet"
    with pytest.raises(_Interrupted):
        run(beton, _StopsAfter(headless(), 4), out)
    table = run(beton, _StopsAfter(headless(), 4), out, num_clusters=3)
    expected = run(beton, headless(), tmp_path / "b.parquet", num_clusters=3)
    assert table.clusters.tolist() == expected.clusters.tolist()


def test_quotas_go_by_cluster(beton, tmp_path):
    table = run(beton, headless(), tmp_path / "scores.parquet")
    subset = make_subset(table, keep_ratio=0.5, allow_empty_classes=True)
    assert subset.metric == "prototype"
    assert subset.parameters["clusters"] == 4
    kept = np.bincount(table.clusters[subset.rows], minlength=4)
    assert subset.class_counts == kept.tolist()
    assert np.abs(kept - table.group_counts / 2).max() < 1
    equal = make_subset(table, keep_ratio=0.25, quota="equal", allow_empty_classes=True)
    assert (
        max(equal.class_counts) - min(equal.class_counts)
        <= max(0, max(equal.class_counts) - table.group_counts.min()) + 1
    )
    subset.save(tmp_path / "half.npy")
    assert Subset.load(tmp_path / "half.npy").class_std is None


def test_an_empty_cluster_is_named_as_one(beton, tmp_path):
    table = run(beton, headless(), tmp_path / "scores.parquet")
    with pytest.raises(InvalidValueError, match=r"keep no row of \d clusters"):
        make_subset(table, keep_ratio=0.05, strategy="random")


def test_equal_quotas_need_classes_or_clusters(beton, tmp_path):
    from fastprune.selection.importers import import_scores

    np.save(tmp_path / "aum.npy", np.arange(24.0))
    table = import_scores(tmp_path / "aum.npy", open_beton(beton))
    assert len(make_subset(table, keep_ratio=0.5).rows) == 12
    with pytest.raises(InvalidValueError, match=r"quota 'equal' .*have none.*--unsupervised"):
        make_subset(table, keep_ratio=0.5, quota="equal")


def test_more_clusters_than_rows_are_refused_before_the_pass(beton, tmp_path):
    with pytest.raises(InvalidValueError, match=r"num_clusters \(25\).*rows of .*, 24"):
        run(beton, headless(), tmp_path / "scores.parquet", num_clusters=25)
    assert list(tmp_path.iterdir()) == []


def test_scoring_by_labels_refuses_images_without_any(beton, tmp_path):
    with pytest.raises(InvalidValueError, match=r"converted without labels.*--unsupervised K"):
        run(beton, small_teacher(), tmp_path / "scores.parquet", num_clusters=None)


def test_a_cache_needs_a_teacher_with_logits(beton, tmp_path):
    with pytest.raises(InvalidValueError, match=r"cache .* no classifier.*--teacher-classes"):
        run(beton, headless(), tmp_path / "a.parquet", cache=tmp_path / "c", num_views=2, views=2)


def test_clusters_outside_of_their_number_are_refused(beton, tmp_path):
    table = run(beton, headless(), tmp_path / "scores.parquet")
    table.clustering["num_clusters"] = 2
    table.save(tmp_path / "scores.parquet")
    with pytest.raises(ArtifactError, match=r"'cluster' numbers are not in \[0, 2\)"):
        ScoreTable.load(tmp_path / "scores.parquet")


def test_the_report_names_clusters(beton, tmp_path):
    table = run(beton, headless(), tmp_path / "scores.parquet")
    make_subset(table, keep_ratio=0.5, allow_empty_classes=True).save(tmp_path / "half.npy")
    report_scores(
        tmp_path / "scores.parquet",
        tmp_path / "page.html",
        subset_path=tmp_path / "half.npy",
        beton_path=beton,
    )
    text = (tmp_path / "page.html").read_text()
    assert "cluster 3, hardest" in text
    assert "top-1" not in text


def test_the_command_line_scores_and_selects_without_labels(beton, tmp_path):
    save_weights(headless(), tmp_path / "t.safetensors", metadata={"network": "resnet8"})

    def command(*arguments):
        return CliRunner().invoke(main, [str(argument) for argument in arguments])

    scored = command(
        *("score", beton, "-o", tmp_path / "s.parquet", "--unsupervised", 4),
        *("--teacher-checkpoint", tmp_path / "t.safetensors", "--image-size", SIDE),
    )
    assert scored.exit_code == 0, scored.output
    assert "4 clusters, mean distance" in scored.stdout
    selected = command(
        *("select", tmp_path / "s.parquet", "-o", tmp_path / "half.npy", "--keep", 0.5),
        "--allow-empty-classes",
    )
    assert selected.exit_code == 0, selected.output
    assert "kept 12 of 24 rows" in selected.stdout
    assert '"num_clusters": 4' in command("info", tmp_path / "s.parquet", "--json").stdout
    refused = command(
        *("score", beton, "-o", tmp_path / "b.parquet", "--unsupervised", 99),
        *("--teacher-checkpoint", tmp_path / "t.safetensors"),
    )
    assert refused.exit_code == 1
    assert "--unsupervised (99)" in refused.output
