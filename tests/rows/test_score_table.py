import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastprune.base.errors import ArtifactError, InvalidValueError
from fastprune.base.provenance import Fingerprint
from fastprune.rows.score_table import ScoreTable


@pytest.fixture
def table():
    return ScoreTable(
        labels=np.array([0, 2, 0], dtype=np.int64),
        metrics={
            "centroid": np.array([0.5, np.pi, 2.0], dtype=np.float32),
            "loss": np.array([1e-30, 7.0, 0.1], dtype=np.float32),
        },
        predictions=np.array([0, 2, 1], dtype=np.int64),
        class_std=np.array([1.25, np.nan, 0.1]),
        class_counts=np.array([2, 0, 1], dtype=np.int64),
        fingerprint=Fingerprint(3, "a" * 32, "b" * 32),
        teacher={"network": "resnet20"},
        view={"image_size": 64},
        seconds=12.5,
    )


def test_table_comes_back_bit_for_bit(tmp_path, table):
    table.save(tmp_path / "scores.parquet")
    loaded = ScoreTable.load(tmp_path / "scores.parquet")
    for name in ("labels", "predictions", "class_std", "class_counts"):
        saved, found = getattr(table, name), getattr(loaded, name)
        assert found.dtype == saved.dtype
        np.testing.assert_array_equal(found, saved)
    assert list(loaded.metrics) == ["centroid", "loss"]
    for name, values in table.metrics.items():
        assert loaded.metrics[name].dtype == np.float32
        np.testing.assert_array_equal(loaded.metrics[name], values)
    assert (loaded.fingerprint, loaded.teacher, loaded.view) == (
        table.fingerprint,
        table.teacher,
        table.view,
    )
    assert loaded.seconds == 12.5


def test_ordinary_tools_read_the_columns(tmp_path, table):
    table.save(tmp_path / "scores.parquet")
    columns = pq.read_table(tmp_path / "scores.parquet").column_names
    assert columns == ["row", "label", "prediction", "centroid", "loss"]


def test_unknown_metric_is_refused_with_the_known_ones(table):
    with pytest.raises(InvalidValueError, match=r"metric 'el2n' .* it has centroid, loss"):
        table.metric("el2n")


def test_missing_table_is_named_with_the_cure(tmp_path):
    with pytest.raises(ArtifactError, match=r"nowhere\.parquet does not exist\. Make it with"):
        ScoreTable.load(tmp_path / "nowhere.parquet")


def test_file_that_is_no_parquet_is_named(tmp_path):
    (tmp_path / "scores.parquet").write_bytes(b"text")
    with pytest.raises(ArtifactError, match=r"scores\.parquet cannot be read: "):
        ScoreTable.load(tmp_path / "scores.parquet")


def test_parquet_of_somebody_else_is_named(tmp_path):
    pq.write_table(pa.table({"row": [0, 1]}), tmp_path / "scores.parquet")
    with pytest.raises(ArtifactError, match=r"scores\.parquet cannot be read: "):
        ScoreTable.load(tmp_path / "scores.parquet")


def test_sorted_or_filtered_table_is_refused(tmp_path, table):
    table.save(tmp_path / "scores.parquet")
    written = pq.read_table(tmp_path / "scores.parquet")
    for changed in (written.sort_by("loss"), written.slice(0, 2)):
        pq.write_table(changed, tmp_path / "changed.parquet")
        with pytest.raises(ArtifactError, match=r"one line for each of the 3 rows .* Sort it by"):
            ScoreTable.load(tmp_path / "changed.parquet")


def test_a_flipped_bit_in_any_column_is_noticed(tmp_path, table):
    path = tmp_path / "scores.parquet"
    table.save(path)
    whole = path.read_bytes()
    group = pq.read_metadata(path).row_group(0)
    for number in range(group.num_columns):
        column = group.column(number)
        start = column.dictionary_page_offset or column.data_page_offset
        damaged = bytearray(whole)
        damaged[start + column.total_compressed_size - 1] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(
            ArtifactError, match=r"(?s)scores\.parquet cannot be read: .*Make it with"
        ):
            ScoreTable.load(path)
