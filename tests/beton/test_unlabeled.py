"""Images without classes: converted from any folder, opened by stock FFCV, refused where needed."""

import io
import shutil
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from fastprune import check_beton, convert, open_beton
from fastprune.base.errors import ConversionError, InvalidValueError
from fastprune.beton.compact import compact
from fastprune.cli import main
from tests.images import jpeg_bytes, picture, write_image_folder


def sources_of(path):
    beton = open_beton(path)
    assert not beton.has_labels
    assert beton.class_names is None
    assert not beton.labels.any()
    assert check_beton(path, deep=True) == []
    return beton.manifest.table()["source"].to_pylist()


@pytest.fixture
def flat(tmp_path):
    folder = tmp_path / "flat"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.jpg").write_bytes(jpeg_bytes(number))
    return folder


def test_a_folder_without_class_folders_becomes_a_beton(flat, tmp_path):
    convert(flat, tmp_path / "a.beton", unlabeled=True)
    assert sources_of(tmp_path / "a.beton") == [f"{number}.jpg" for number in range(5)]


def test_folders_of_any_depth_are_read_and_are_no_classes(flat, tmp_path):
    (flat / "b" / "c").mkdir(parents=True)
    (flat / "b" / "c" / "z.jpg").write_bytes(jpeg_bytes(9))
    (flat / "a").mkdir()  # an empty folder is no class that lacks images
    (flat / "notes.txt").write_text("no image")
    convert(flat, tmp_path / "a.beton", unlabeled=True)
    assert sources_of(tmp_path / "a.beton")[-1] == "b/c/z.jpg"
    assert open_beton(tmp_path / "a.beton").num_rows == 6


def test_labels_of_class_folders_are_thrown_away(tmp_path):
    folder = write_image_folder(tmp_path / "images")
    convert(folder, tmp_path / "with.beton")
    convert(folder, tmp_path / "without.beton", unlabeled=True)
    assert (
        sources_of(tmp_path / "without.beton")
        == open_beton(tmp_path / "with.beton").manifest.table()["source"].to_pylist()
    )


def test_tars_need_no_class_files(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(3):
            data = jpeg_bytes(number)
            info = tarfile.TarInfo(f"{number}.jpg")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    convert(tmp_path / "a.tar", tmp_path / "a.beton", unlabeled=True)
    assert len(sources_of(tmp_path / "a.beton")) == 3


def test_parquet_files_need_no_label_column(tmp_path):
    images = [{"bytes": jpeg_bytes(number), "path": None} for number in range(3)]
    pq.write_table(pa.table({"image": images}), tmp_path / "a.parquet")
    convert(tmp_path / "a.parquet", tmp_path / "a.beton", unlabeled=True)
    assert len(sources_of(tmp_path / "a.beton")) == 3


@pytest.mark.parametrize("as_sample", [lambda i: i, lambda i: (i, 7), lambda i: {"image": i}])
def test_samples_of_a_dataset_may_be_images_alone(as_sample, tmp_path):
    dataset = [as_sample(picture(number)) for number in range(3)]
    convert(dataset, tmp_path / "a.beton", unlabeled=True)
    assert len(sources_of(tmp_path / "a.beton")) == 3


def test_shards_and_compacted_betons_have_no_labels_either(flat, tmp_path):
    convert(flat, tmp_path / "shards", unlabeled=True, shards=2)
    assert not open_beton(tmp_path / "shards").has_labels
    convert(flat, tmp_path / "a.beton", unlabeled=True)
    np.save(tmp_path / "subset.npy", np.array([1, 3]))
    compact(tmp_path / "a.beton", tmp_path / "b.beton", subset=tmp_path / "subset.npy")
    assert not open_beton(tmp_path / "b.beton").has_labels


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "empty" / "inner").mkdir(parents=True)
    with pytest.raises(ConversionError, match=r"empty holds no images .*Name a folder that does"):
        convert(tmp_path / "empty", tmp_path / "a.beton", unlabeled=True)


def test_labels_and_none_contradict_each_other(flat, tmp_path):
    with pytest.raises(InvalidValueError, match=r"labels \(list.txt\).*--labels, --no-labels"):
        convert(flat, tmp_path / "a.beton", labels="list.txt", unlabeled=True)
    with pytest.raises(InvalidValueError, match=r"classes_from \(b\).*--classes-from, --no-labels"):
        convert(flat, tmp_path / "a.beton", classes_from="b", unlabeled=True)


def test_stock_ffcv_opens_it(flat, tmp_path):
    pytest.importorskip("ffcv")
    from ffcv.loader import Loader, OrderOption

    convert(flat, tmp_path / "a.beton", unlabeled=True)
    loader = Loader(
        str(tmp_path / "a.beton"), batch_size=5, num_workers=1, order=OrderOption.SEQUENTIAL
    )
    assert loader.reader.num_samples == 5
    assert list(loader.pipeline_specs) == ["image", "label"]


def test_the_command_line_leaves_labels_out(flat, tmp_path):
    out = tmp_path / "a.beton"
    result = CliRunner().invoke(main, ["convert", str(flat), str(out), "--no-labels"])
    assert result.exit_code == 0, result.output
    assert not open_beton(out).has_labels
    shown = CliRunner().invoke(main, ["info", str(out)]).output
    assert "classes               0" in shown
    shutil.rmtree(flat)
