"""FiftyOne: scores as fields of samples, and a view back as a subset, on its JSON export.

The export is written down here as its documentation and its importer have it: the package itself
needs a database server to make one.
"""

import json

import numpy as np
import pytest

from fastprune import ScoreTable, Subset, convert, open_beton
from fastprune.base.errors import ArtifactError, InvalidValueError
from fastprune.selection.fiftyone import ExportedSamples, add_scores, subset_of_view
from tests.images import write_image_folder


@pytest.fixture
def beton(tmp_path):
    write_image_folder(tmp_path / "images", classes=2, per_class=3)
    convert(tmp_path / "images", tmp_path / "train.beton")
    return open_beton(tmp_path / "train.beton")


@pytest.fixture
def scores(beton):
    return ScoreTable(
        labels=beton.labels,
        metrics={"centroid": np.arange(6, dtype=np.float32)},
        predictions=beton.labels,
        class_std=np.array([1.0, 2.0]),
        class_counts=np.array([3, 3]),
        fingerprint=beton.fingerprint,
    )


def export(folder, files):
    """A FiftyOneDataset: samples with relative paths, and the declarations of their fields."""
    folder.mkdir()
    samples = [{"_id": {"$oid": f"{i:024x}"}, "filepath": f} for i, f in enumerate(files)]
    field = {
        "name": "filepath",
        "ftype": "fiftyone.core.fields.StringField",
        "db_field": "filepath",
    }
    (folder / "samples.json").write_text(json.dumps({"samples": samples}))
    (folder / "metadata.json").write_text(json.dumps({"sample_fields": [field], "version": "1"}))
    return ExportedSamples(folder)


@pytest.fixture
def samples(tmp_path, beton):
    files = beton.manifest.table()["source"].to_pylist()[::-1]
    return export(tmp_path / "export", [f"../images/{file}" for file in files])


def test_scores_become_fields_of_the_samples_of_their_files(samples, scores, beton, tmp_path):
    assert add_scores(samples, scores, beton, tmp_path / "export" / ".." / "images") == 6
    samples.save()
    content = json.loads((tmp_path / "export" / "samples.json").read_text())["samples"]
    assert [sample["row"] for sample in content] == [5, 4, 3, 2, 1, 0]
    assert [sample["centroid"] for sample in content] == [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]
    declared = json.loads((tmp_path / "export" / "metadata.json").read_text())["sample_fields"]
    assert [(field["name"], field["ftype"].rpartition(".")[2]) for field in declared] == [
        ("filepath", "StringField"),
        ("row", "IntField"),
        ("centroid", "FloatField"),
    ]


def test_a_subset_marks_the_kept_samples(samples, scores, beton, tmp_path):
    add_scores(samples, scores, beton, tmp_path / "images", subset=Subset(np.array([0, 4])))
    assert samples.values("kept") == [False, True, False, False, False, True]


def test_a_view_comes_back_as_a_subset(beton, scores, tmp_path):
    view = export(tmp_path / "view", ["../images/class_01/002.jpg", "../images/class_00/001.jpg"])
    subset = subset_of_view(view, beton, tmp_path / "images", scores=scores)
    assert subset.rows.tolist() == [1, 5]
    assert subset.class_std.tolist() == [1.0, 2.0]
    assert subset.class_counts == [1, 1]
    subset.save(tmp_path / "two.npy")
    assert Subset.load(tmp_path / "two.npy").fingerprint == beton.fingerprint


def test_samples_of_other_files_get_no_score(beton, scores, tmp_path):
    files = ["../images/class_01/002.jpg", "/elsewhere/a.jpg"]
    mixed = export(tmp_path / "mixed", files)
    assert add_scores(mixed, scores, beton, tmp_path / "images") == 1
    assert mixed.values("centroid") == [5.0, None]
    with pytest.raises(InvalidValueError, match=r"/elsewhere/a\.jpg is no file"):
        subset_of_view(mixed, beton, tmp_path / "images")


def test_a_folder_that_was_not_converted_is_refused(samples, scores, beton, tmp_path):
    with pytest.raises(InvalidValueError, match=r"no sample is a file of .*other"):
        add_scores(samples, scores, beton, tmp_path / "other")


def test_an_empty_view_is_refused(beton, tmp_path):
    with pytest.raises(InvalidValueError, match=r"it shows no sample"):
        subset_of_view(export(tmp_path / "none", []), beton, tmp_path / "images")


def test_what_is_no_export_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"as FiftyOne exports it.*FiftyOneDataset"):
        ExportedSamples(tmp_path)
