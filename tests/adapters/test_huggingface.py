"""Hugging Face: its Parquet files and datasets become betons, and subsets become its Parquet."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from fastprune import ScoreTable, Subset, convert, open_beton
from fastprune.adapters.huggingface import export_parquet, write_parquet_shards
from fastprune.base.errors import ArtifactError, ArtifactMismatch, InvalidValueError
from fastprune.base.provenance import Fingerprint
from fastprune.cli import main
from tests.conftest import require_library
from tests.images import write_image_folder

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
require_library("datasets")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

import datasets  # noqa: E402


@pytest.fixture
def beton(tmp_path):
    write_image_folder(tmp_path / "images", classes=3, per_class=4)
    convert(tmp_path / "images", tmp_path / "train.beton")
    return open_beton(tmp_path / "train.beton")


@pytest.fixture
def dataset(beton, tmp_path):
    """What a user of the hub has: images as files in a struct, labels with names."""
    files = sorted((tmp_path / "images").rglob("*.jpg"))
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(beton.class_names))}
    )
    images = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    samples = {"image": images, "label": beton.labels.tolist()}
    return datasets.Dataset.from_dict(samples, features=features)


def scores_of(beton):
    return ScoreTable(
        labels=beton.labels,
        metrics={"centroid": np.linspace(0, 1, 12, dtype=np.float32)},
        predictions=beton.labels,
        class_std=np.ones(3),
        class_counts=np.full(3, 4),
        fingerprint=beton.fingerprint,
    )


def loaded(folder, tmp_path):
    files = sorted(map(str, Path(folder).glob("*.parquet")))
    return datasets.load_dataset(
        "parquet", data_files={"train": files}, cache_dir=str(tmp_path / "cache")
    )["train"]


def assert_same_images(path, beton):
    other = open_beton(path)
    assert other.fingerprint == beton.fingerprint
    assert other.class_names == beton.class_names
    assert other.labels.tolist() == beton.labels.tolist()


def test_parquet_of_datasets_becomes_the_same_beton(dataset, beton, tmp_path):
    dataset.to_parquet(tmp_path / "train.parquet")
    convert(tmp_path / "train.parquet", tmp_path / "out.beton")
    assert_same_images(tmp_path / "out.beton", beton)


def test_a_dataset_in_memory_becomes_the_same_beton(dataset, beton, tmp_path):
    convert(dataset, tmp_path / "out.beton", workers=1)
    assert_same_images(tmp_path / "out.beton", beton)


def test_an_image_folder_of_datasets_is_read_from_its_files(beton, tmp_path):
    dataset = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path / "images"), cache_dir=str(tmp_path / "cache")
    )["train"]
    convert(dataset, tmp_path / "out.beton", workers=1)
    assert_same_images(tmp_path / "out.beton", beton)


def test_a_subset_and_its_scores_are_loaded_by_datasets(beton, tmp_path):
    rows = np.array([0, 5, 6, 11])
    scores = scores_of(beton)
    export_parquet(Subset(rows), tmp_path / "hub", beton=beton, scores=scores)
    found = loaded(tmp_path / "hub", tmp_path)
    assert list(found["row"]) == rows.tolist()
    assert found.features["label"].names == list(beton.class_names)
    assert found.features["centroid"].dtype == "float32"
    np.testing.assert_array_equal(found["centroid"], scores.metric("centroid")[rows])
    sizes = [image.size for image in found["image"]]
    assert sizes == [(int(beton.widths[row]), int(beton.heights[row])) for row in rows]


def test_what_was_exported_is_converted_to_the_same_rows(beton, tmp_path):
    export_parquet(Subset(np.arange(12)), tmp_path / "hub", beton=beton)
    convert(tmp_path / "hub", tmp_path / "out.beton", jpeg="original")
    assert_same_images(tmp_path / "out.beton", beton)


def test_large_subsets_get_several_files(beton, tmp_path):
    size = int(beton.sizes.sum()) // 3
    files = write_parquet_shards(np.arange(12), beton, tmp_path / "hub", shard_bytes=size)
    assert files[0].name == f"train-00000-of-{len(files):05d}.parquet"
    assert len(files) in (3, 4)
    assert sum(pq.read_metadata(file).num_rows for file in files) == 12
    assert list(loaded(tmp_path / "hub", tmp_path)["row"]) == list(range(12))


def test_images_without_labels_have_no_label_column(tmp_path):
    write_image_folder(tmp_path / "images", classes=1, per_class=3)
    convert(tmp_path / "images", tmp_path / "a.beton", unlabeled=True)
    write_parquet_shards(np.arange(3), open_beton(tmp_path / "a.beton"), tmp_path / "hub")
    assert loaded(tmp_path / "hub", tmp_path).column_names == ["image", "row"]


def test_an_export_does_not_replace_a_folder(beton, tmp_path):
    (tmp_path / "hub").mkdir()
    with pytest.raises(ArtifactError, match=r"hub exists"):
        export_parquet(Subset(np.arange(2)), tmp_path / "hub", beton=beton)


def test_scores_of_other_images_and_a_missing_beton_are_refused(beton, tmp_path):
    others = replace(scores_of(beton), fingerprint=Fingerprint(12, "ab" * 16, "cd" * 16))
    with pytest.raises(ArtifactMismatch, match=r"the score table was made.*\nGive the scores"):
        export_parquet(Subset(np.arange(2)), tmp_path / "hub", beton=beton, scores=others)
    with pytest.raises(InvalidValueError, match=r"'huggingface' needs a beton.*--beton"):
        export_parquet(Subset(np.arange(2)), tmp_path / "hub", beton=None)


def test_the_command_line_exports_images_and_scores(beton, tmp_path):
    scores_of(beton).save(tmp_path / "s.parquet")
    Subset(np.array([2, 3])).save(tmp_path / "two.npy")
    arguments = [
        *("export", tmp_path / "two.npy", "-o", tmp_path / "hub", "--format", "huggingface"),
        *("--beton", beton.path, "--scores", tmp_path / "s.parquet"),
    ]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert "centroid" in loaded(tmp_path / "hub", tmp_path).column_names
