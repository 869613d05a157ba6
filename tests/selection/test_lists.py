"""Lists from elsewhere: rows that are left out, and subsets as other tools' folders and indices."""

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from torch.utils.data import Subset as TorchSubset
from torchvision.datasets import ImageFolder

from fastprune import Subset, convert, open_beton
from fastprune.base.errors import ArtifactError, InvalidValueError
from fastprune.cli import main
from fastprune.selection.exporters import export_subset
from fastprune.selection.importers import read_excluded
from tests.images import write_image_folder
from tests.selection.tables import score_table

ISSUES = np.isin(np.arange(10), [2, 3, 7])


def table(path, **columns):
    write = pyarrow.csv.write_csv if path.suffix == ".csv" else pq.write_table
    write(pa.table(columns), path)
    return path


# What is excluded


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_cleanlabs_issues_are_a_line_per_row(suffix, tmp_path):
    quality = np.linspace(0, 1, 10)
    path = table(tmp_path / f"issues{suffix}", is_label_issue=ISSUES, label_quality=quality)
    assert read_excluded(path, 10).tolist() == [2, 3, 7]


@pytest.mark.parametrize("index", ["", "Unnamed: 0", "row", "index"])
def test_fewer_lines_need_the_index_of_the_table(index, tmp_path):
    columns = {index: [7, 2, 5], "is_label_issue": [True, True, False]}
    assert read_excluded(table(tmp_path / "a.csv", **columns), 10).tolist() == [2, 7]


def test_what_pandas_saves_is_read(tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"is_label_issue": ISSUES, "label_quality": np.linspace(0, 1, 10)})
    for issues in (frame, frame[frame.is_label_issue]):
        issues.to_csv(tmp_path / "issues.csv")
        issues.to_parquet(tmp_path / "issues.parquet")
        for suffix in ("csv", "parquet"):
            assert read_excluded(tmp_path / f"issues.{suffix}", 10).tolist() == [2, 3, 7]


def test_a_table_of_rows_alone_means_all_of_them(tmp_path):
    assert read_excluded(table(tmp_path / "a.parquet", row=[5, 1]), 10).tolist() == [1, 5]


@pytest.mark.parametrize("rows", [[7, 2, 3], ISSUES])
def test_a_npy_holds_rows_or_a_mark_per_row(rows, tmp_path):
    np.save(tmp_path / "a.npy", np.array(rows))
    assert read_excluded(tmp_path / "a.npy", 10).tolist() == [2, 3, 7]


def test_an_empty_list_excludes_nothing(tmp_path):
    (tmp_path / "a.txt").write_text("")
    assert read_excluded(tmp_path / "a.txt", 10).tolist() == []


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        ({"is_label_issue": [True]}, InvalidValueError, r"marks 1 rows.*are of 10.*row or index"),
        ({"quality": [0.5]}, ArtifactError, r"neither a column 'is_label_issue'.*quality.*index"),
        ({"is_label_issue": [0.5] * 10}, ArtifactError, r"must hold true and false"),
        ({"is_label_issue": [None] + [True] * 9}, ArtifactError, r"has 1 empty lines"),
        ({"row": [3, 10]}, InvalidValueError, r"lists row 10.*rows 0 to 9"),
        ({"row": [-1]}, InvalidValueError, r"lists row -1"),
        ({"row": ["a"]}, InvalidValueError, r"must list rows or file names"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(columns, error, message, tmp_path):
    with pytest.raises(error, match=message):
        read_excluded(table(tmp_path / "a.parquet", **columns), 10)


def test_a_mask_of_other_images_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", ISSUES)
    with pytest.raises(InvalidValueError, match=r"marks 10 rows, but the scores are of 12"):
        read_excluded(tmp_path / "a.npy", 12)


@pytest.mark.parametrize("mask", [np.array(True), np.ones((10, 2), bool)])
def test_a_mask_of_another_shape_is_refused(mask, tmp_path):
    np.save(tmp_path / "mask.npy", mask)
    with pytest.raises(InvalidValueError, match="must list rows or file names, but it lists bool"):
        read_excluded(tmp_path / "mask.npy", 10)


def test_a_file_that_is_no_table_is_refused(tmp_path):
    (tmp_path / "a.parquet").write_text("no")
    with pytest.raises(ArtifactError, match=r"cannot be read as parquet"):
        read_excluded(tmp_path / "a.parquet", 10)


def test_select_leaves_issues_out(tmp_path):
    scores = score_table()
    scores.save(tmp_path / "s.parquet")
    issues = np.arange(200) % 4 == 1
    table(tmp_path / "issues.csv", is_label_issue=issues)
    result = run(
        *("select", tmp_path / "s.parquet", "-o", tmp_path / "half.npy", "--keep", 0.5),
        *("--exclude", tmp_path / "issues.csv"),
    )
    assert result.exit_code == 0, result.output
    subset = Subset.load(tmp_path / "half.npy")
    assert len(subset.rows) == 75
    assert not issues[subset.rows].any()
    assert subset.parameters["excluded_rows"] == 50


def test_excluded_names_need_the_images(beton, tmp_path):
    (tmp_path / "bad.txt").write_text("class_01/002.jpg\n")
    assert read_excluded(tmp_path / "bad.txt", 6, beton=beton).tolist() == [5]
    with pytest.raises(InvalidValueError, match=r"lists file names.*--beton"):
        read_excluded(tmp_path / "bad.txt", 6)


# Subsets for other tools


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def beton(tmp_path):
    write_image_folder(tmp_path / "images", classes=2, per_class=3)
    convert(tmp_path / "images", tmp_path / "train.beton")
    return open_beton(tmp_path / "train.beton")


ROWS = Subset(np.array([1, 5]))


def test_indices_are_those_of_the_images_own_dataset(tmp_path):
    write_image_folder(tmp_path / "images", classes=2, per_class=3)
    (tmp_path / "images" / "class_00" / "000.jpg").write_bytes(b"damaged")
    convert(tmp_path / "images", tmp_path / "a.beton", shuffle_seed=1, on_error="skip")
    beton = open_beton(tmp_path / "a.beton")
    export_subset(Subset(np.array([0, 3])), tmp_path / "i.npy", "indices", beton=beton)
    indices = np.load(tmp_path / "i.npy")
    dataset = ImageFolder(str(tmp_path / "images"))
    kept = [dataset.samples[index][0] for index in TorchSubset(dataset, indices).indices]
    sources = beton.manifest.table()["source"].to_pylist()
    assert sorted(kept) == sorted(str(tmp_path / "images" / sources[row]) for row in (0, 3))


@pytest.mark.parametrize("file_format", ["indices", "names"])
def test_formats_of_files_need_the_beton(file_format, tmp_path):
    with pytest.raises(InvalidValueError, match=rf"'{file_format}' needs a beton.*--beton"):
        export_subset(ROWS, tmp_path / "out", file_format)
