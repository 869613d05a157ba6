"""Classes numbered as in another beton."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastprune import convert, open_beton
from fastprune.base.errors import (
    ArtifactError,
    ConversionError,
    ForeignManifestWarning,
    InvalidValueError,
)
from fastprune.beton.check import write_missing_manifest
from fastprune.beton.manifest import manifest_path
from tests.images import jpeg_bytes, write_image_folder


@pytest.fixture
def train(tmp_path):
    """Three classes."""
    convert(write_image_folder(tmp_path / "train"), tmp_path / "train.beton", jpeg="original")
    return tmp_path / "train.beton"


def flat(tmp_path, classes):
    """A flat folder with an image of each of these classes."""
    (tmp_path / "val").mkdir()
    for number in range(len(classes)):
        (tmp_path / "val" / f"{number}.jpg").write_bytes(jpeg_bytes(number))
    text = "".join(f"{number}.jpg {name}\n" for number, name in enumerate(classes))
    (tmp_path / "val.txt").write_text(text)
    return {"images": tmp_path / "val", "labels": tmp_path / "val.txt"}


@pytest.mark.parametrize("suffix", ["", ".manifest.parquet"])
def test_a_flat_folder_that_lacks_a_class_is_numbered_as_the_training_set(train, tmp_path, suffix):
    folder = flat(tmp_path, ["class_02", "class_00", "class_02"])
    names_from = train.with_name(train.name + suffix)
    convert(beton_path=tmp_path / "val.beton", classes_from=names_from, **folder)
    val = open_beton(tmp_path / "val.beton")
    assert val.labels.tolist() == [2, 0, 2]
    assert val.class_names == open_beton(train).class_names


def test_a_folder_that_lacks_a_class_is_numbered_as_the_training_set(train, tmp_path):
    folder = write_image_folder(tmp_path / "val")
    (folder / "class_01").rename(tmp_path / "elsewhere")
    convert(folder, tmp_path / "val.beton", classes_from=train)
    assert np.unique(open_beton(tmp_path / "val.beton").labels).tolist() == [0, 2]


def test_a_class_that_the_training_set_lacks_is_refused(train, tmp_path):
    folder = flat(tmp_path, ["class_02", "class_07"])
    with pytest.raises(
        ConversionError, match=r"class class_07 .* Name the beton of the same classes"
    ):
        convert(beton_path=tmp_path / "val.beton", classes_from=train, **folder)


def test_numbers_are_no_names(train, tmp_path):
    folder = flat(tmp_path, ["0", "2"])
    with pytest.raises(InvalidValueError, match=r"has numbers\. Leave it out"):
        convert(beton_path=tmp_path / "val.beton", classes_from=train, **folder)


def test_a_split_without_labels_is_refused_and_not_given_the_last_class(train, tmp_path):
    image = {"bytes": jpeg_bytes(0), "path": "0.jpg"}
    names = {"names": ["class_02", "class_00"], "_type": "ClassLabel"}
    for labels, wrong in (([0, -1], -1), ([0, 2], 2)):
        table = pa.table({"image": [image, image], "label": labels}).replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": {"label": names}}})}
        )
        pq.write_table(table, tmp_path / "test.parquet")
        match = rf"test\.parquet#1: its label is {wrong}, but .* \[0, 2\).*leave classes_from out"
        with pytest.raises(ConversionError, match=match):
            convert(tmp_path / "test.parquet", tmp_path / "val.beton", classes_from=train)


def test_a_dataset_cannot_be_numbered_by_names(train, tmp_path):
    dataset = [(jpeg_bytes(0), 0)]
    with pytest.raises(InvalidValueError, match=r"is a dataset, .*leave it out"):
        convert(dataset, tmp_path / "val.beton", classes_from=train)


def test_the_manifest_of_another_beton_numbers_no_classes(train, tmp_path):
    other = tmp_path / "other.beton"
    convert(**flat(tmp_path, ["class_00", "class_01"]), beton_path=other)
    manifest_path(other).replace(manifest_path(train))
    with (
        pytest.warns(ForeignManifestWarning, match="made for another beton"),
        pytest.raises(ArtifactError, match=r"no manifest of its own\) has no class names"),
    ):
        convert(other.parent / "val", tmp_path / "val.beton", classes_from=train)


def test_resume_with_other_names_is_refused(train, tmp_path):
    folder = flat(tmp_path, ["class_02", "class_00"])
    (tmp_path / "val" / "1.jpg").write_bytes(b"")
    other = tmp_path / "other.beton"
    more = write_image_folder(tmp_path / "other", classes=4)
    convert(more, other, jpeg="original")
    job = {**folder, "beton_path": tmp_path / "val.beton"}
    with pytest.raises(ConversionError, match="it is empty"):
        convert(**job, classes_from=train, keep_partial=True)
    with pytest.raises(ConversionError, match="cannot be resumed: its images were"):
        convert(**job, classes_from=other, resume=True)


def test_a_manifest_without_names_cannot_number_classes(train, tmp_path):
    manifest_path(train).unlink()
    write_missing_manifest(train)
    folder = flat(tmp_path, ["class_02"])
    with pytest.raises(ArtifactError, match=r"has no class names.* Name a beton that"):
        convert(beton_path=tmp_path / "val.beton", classes_from=train, **folder)
