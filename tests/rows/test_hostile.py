"""Artifacts with metadata of any shape are refused in words, never by a traceback."""

import contextlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastprune.base.errors import ArtifactError, InvalidValueError
from fastprune.base.provenance import Fingerprint
from fastprune.beton.manifest import Manifest, read_manifest, write_manifest
from fastprune.rows.score_table import ScoreTable
from fastprune.rows.subset import Subset

_DEEP = "[" * 10**5 + "]" * 10**5
_WHOLE = Fingerprint(4, "ab" * 16, "cd" * 16)

# Replacements of one entry by what a hostile or careless tool might write.
_FINGERPRINTS = [
    [],
    "ab",
    None,
    {"num_rows": 2**70, "structure": "ab" * 16},
    {"num_rows": "4", "structure": "ab" * 16},
    {"num_rows": 4, "structure": "x" * 10**6},
    {"num_rows": 4, "structure": ["ab"]},
]


@pytest.fixture
def subset_path(tmp_path):
    Subset(
        rows=np.array([0, 2]),
        fingerprint=_WHOLE,
        keep_ratio=0.5,
        class_counts=[1, 1],
        class_std=np.array([0.5, 1.5]),
    ).save(tmp_path / "half.npy")
    return tmp_path / "half.npy"


@pytest.fixture
def table_path(tmp_path):
    ScoreTable(
        labels=np.array([0, 0, 1, 1]),
        metrics={"loss": np.arange(4, dtype=np.float32)},
        predictions=np.zeros(4, np.int64),
        class_std=np.array([0.5, np.nan]),
        class_counts=np.array([2, 2]),
        fingerprint=_WHOLE,
    ).save(tmp_path / "scores.parquet")
    return tmp_path / "scores.parquet"


def with_metadata(path, change):
    """Change the JSON in a Parquet file's metadata; a text replaces it whole."""
    table = pq.read_table(path)
    metadata = json.loads(table.schema.metadata[b"fastprune"])
    text = change if isinstance(change, str) else json.dumps(metadata | change)
    pq.write_table(table.replace_schema_metadata({b"fastprune": text}), path)


def with_column(path, name, values):
    """Replace one column of a Parquet file."""
    table = pq.read_table(path)
    column = pa.array(values)
    pq.write_table(table.set_column(table.column_names.index(name), name, column), path)


@pytest.mark.parametrize(
    "change",
    [
        *("[]", "null", '"text"', "3", _DEEP, "{", ""),
        *({"fingerprint": value} for value in _FINGERPRINTS if value is not None),
        {"class_std": 3},
        {"class_std": [1.0, -1.0]},
        {"class_std": [1.0, "2"]},
        {"class_std": [1.0]},
        {"class_counts": [1, -1]},
        {"keep_ratio": 50},
        {"keep_ratio": "half"},
        {"parameters": []},
        {"seed": "0"},
        {"command": ["rm"]},
        {"rows_digest": None},
    ],
    ids=lambda change: str(change)[:40],
)
def test_sidecar_of_another_shape_is_refused(subset_path, change):
    sidecar = subset_path.with_suffix(".json")
    text = (
        change if isinstance(change, str) else json.dumps(json.loads(sidecar.read_text()) | change)
    )
    sidecar.write_text(text)
    with pytest.raises(ArtifactError, match=r"cannot be read: .*Remove it to use the bare"):
        Subset.load(subset_path)


def test_index_file_that_claims_more_rows_than_it_holds_is_refused(tmp_path):
    with (tmp_path / "huge.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<i8", "fortran_order": False, "shape": (10**13,)}
        )
    with pytest.raises(ArtifactError, match="claims 80,000,000,000,000 bytes"):
        Subset.load(tmp_path / "huge.npy")


@pytest.mark.parametrize(
    "change",
    [
        *("[]", "null", '"text"', _DEEP, "{"),
        *({"fingerprint": value} for value in _FINGERPRINTS),
        {"class_std": [0.5]},
        {"class_std": [0.5, -1.0]},
        {"class_std": [0.5, 1e999]},
        {"class_std": "ab"},
        {"class_counts": [2]},
        {"class_counts": [2, 1]},
        {"class_counts": [2, 2] + [0] * 10**6},
        {"teacher": None},
        {"view": "center"},
        {"seconds": "1"},
    ],
    ids=lambda change: str(change)[:40],
)
def test_score_table_with_metadata_of_another_shape_is_refused(table_path, change):
    with_metadata(table_path, change)
    with pytest.raises(ArtifactError, match=r"cannot be read: .*Make it with"):
        ScoreTable.load(table_path)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("label", [0, 0, 1, 10**9]),
        ("label", [0, 0, -1, 1]),
        ("label", [0.0, 0.0, 1.0, 1.0]),
        ("label", ["a", "b", "c", "d"]),
        ("prediction", [0.5, 0.0, 0.0, 0.0]),
        ("loss", ["a", "b", "c", "d"]),
    ],
)
def test_score_table_with_columns_of_another_type_is_refused(table_path, name, values):
    with_column(table_path, name, values)
    with pytest.raises(ArtifactError, match=r"scores\.parquet cannot be read: "):
        ScoreTable.load(table_path)


@pytest.mark.parametrize("name", ["scores.csv", "scores", "scores.npy"])
def test_score_table_under_another_suffix_is_refused(table_path, tmp_path, name):
    table = ScoreTable.load(table_path)
    with pytest.raises(InvalidValueError, match=r"a score table is a \.parquet file, but .*scores"):
        table.save(tmp_path / name)
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize(
    "change",
    [
        *("[]", "null", _DEEP),
        *({"fingerprint": value} for value in _FINGERPRINTS),
        {"class_names": "ab"},
        {"class_names": [1, 2]},
        {"counts": []},
        {"settings": None},
        {"version": 1},
    ],
    ids=lambda change: str(change)[:40],
)
def test_manifest_with_metadata_of_another_shape_is_refused(tmp_path, change):
    path = tmp_path / "a.beton.manifest.parquet"
    batch = pa.RecordBatch.from_pydict({"row": [0, 1, 2, 3]})
    write_manifest(Manifest(path, _WHOLE, ("a", "b"), {"copied": 4}), [batch])
    with_metadata(path, change)
    with pytest.raises(ArtifactError, match=r"manifest\.parquet cannot be read: .*Make it again"):
        read_manifest(path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # some headers become old names of types
def test_index_file_with_any_damaged_header_is_refused(subset_path):
    whole, rows = subset_path.read_bytes(), Subset.load(subset_path).rows
    for position in range(len(whole)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            subset_path.write_bytes(damaged)
            # Its spaces may become others; NumPy's parser has errors of its own for the rest.
            with contextlib.suppress(ArtifactError, InvalidValueError):
                assert np.array_equal(Subset.load(subset_path).rows, rows)


def test_sidecar_that_was_changed_is_refused_unless_its_digest_is_removed(subset_path):
    path = subset_path.with_suffix(".json")
    sidecar = json.loads(path.read_text())
    sidecar["class_std"][0] += 0.25
    path.write_text(json.dumps(sidecar))
    with pytest.raises(ArtifactError, match=r"was changed since .* without its 'digest'"):
        Subset.load(subset_path)
    expected = sidecar["class_std"][0]
    del sidecar["digest"]
    path.write_text(json.dumps(sidecar))
    assert Subset.load(subset_path).class_std[0] == expected


def test_score_table_whose_class_std_was_changed_is_refused(table_path):
    table = pq.read_table(table_path)
    metadata = json.loads(table.schema.metadata[b"fastprune"])
    metadata["class_std"][0] += 0.25
    changed = table.replace_schema_metadata({"fastprune": json.dumps(metadata)})
    pq.write_table(changed, table_path)
    with pytest.raises(ArtifactError, match="was changed since it was written"):
        ScoreTable.load(table_path)
