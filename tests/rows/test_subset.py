import dataclasses
import errno

import numpy as np
import pytest

from fastprune.base.errors import ArtifactError, InvalidValueError
from fastprune.base.provenance import Fingerprint
from fastprune.rows.subset import Subset, checked_rows


@pytest.fixture
def subset():
    return Subset(
        rows=np.array([1, 4, 7], dtype=np.int64),
        fingerprint=Fingerprint(10, "a" * 32, "b" * 32),
        keep_ratio=0.3,
        metric="centroid",
        strategy="medium",
        parameters={"quota": "proportional"},
        seed=0,
        class_counts=[2, 1],
        class_std=np.array([1.5, np.nan]),
        command="fastprune select scores.parquet --keep 0.3 -o subset.npy",
        score_seconds=12.5,
    )


def test_subset_comes_back_as_it_was_saved(tmp_path, subset):
    subset.save(tmp_path / "subset.npy")
    loaded = Subset.load(tmp_path / "subset.npy")
    for field in dataclasses.fields(Subset):
        saved, found = getattr(subset, field.name), getattr(loaded, field.name)
        if isinstance(saved, np.ndarray):
            assert found.dtype == saved.dtype
            np.testing.assert_array_equal(found, saved)
        else:
            assert found == saved


def test_index_file_is_plain_numpy(tmp_path, subset):
    subset.save(tmp_path / "subset.npy")
    rows = np.load(tmp_path / "subset.npy", allow_pickle=False)
    assert rows.dtype == np.int64
    assert rows.tolist() == [1, 4, 7]


def test_same_subset_gives_the_same_bytes(tmp_path, subset):
    subset.save(tmp_path / "a.npy")
    subset.save(tmp_path / "b.npy")
    for suffix in (".npy", ".json"):
        first, second = (tmp_path / f"{name}{suffix}" for name in "ab")
        assert first.read_bytes() == second.read_bytes()


def test_bare_index_file_loads_without_a_sidecar(tmp_path):
    np.save(tmp_path / "bare.npy", np.array([0, 2]))
    subset = Subset.load(tmp_path / "bare.npy")
    assert subset.rows.tolist() == [0, 2]
    assert subset.fingerprint is None


def test_sidecar_of_other_rows_is_refused(tmp_path, subset):
    subset.save(tmp_path / "subset.npy")
    np.save(tmp_path / "subset.npy", np.array([1, 4, 8]))
    with pytest.raises(ArtifactError, match=r"subset\.json describes other rows than"):
        Subset.load(tmp_path / "subset.npy")


def test_damaged_sidecar_is_refused_with_the_cure(tmp_path, subset):
    subset.save(tmp_path / "subset.npy")
    (tmp_path / "subset.json").write_text("{")
    with pytest.raises(ArtifactError, match="Remove it to use the bare rows"):
        Subset.load(tmp_path / "subset.npy")


def test_pickled_index_file_is_refused(tmp_path):
    np.save(tmp_path / "subset.npy", np.array([{"rows": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ArtifactError, match=r"subset\.npy is not a numpy index file"):
        Subset.load(tmp_path / "subset.npy")


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"PK\x03\x04", b"[1, 2]"])
def test_file_that_is_no_index_file_is_named(tmp_path, content):
    (tmp_path / "subset.npy").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"subset\.npy is not a numpy index file"):
        Subset.load(tmp_path / "subset.npy")


def test_subset_not_named_npy_is_refused(tmp_path, subset):
    with pytest.raises(InvalidValueError, match=r"subset\.txt has another suffix"):
        subset.save(tmp_path / "subset.txt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([True, False], "integer rows, but it holds bool"),
        ([0.0, 1.0], "integer rows, but it holds float64"),
        ([[0, 1]], r"of shape \(1, 2\)"),
        (np.array([], dtype=np.int64), "holds no rows"),
        ([0, 0, 1], r"entry 1 \(0\) follows 0"),
        ([0, 3, 2], r"entry 2 \(2\) follows 3"),
        ([-1, 3], "holds row -1"),
        ([0, 10], r"holds row 10, but rows must be in \[0, 10\)"),
    ],
)
def test_rows_that_cannot_index_the_beton_are_refused(rows, message):
    with pytest.raises(InvalidValueError, match=message):
        checked_rows(rows, name="rows", num_rows=10)


def test_unsigned_rows_are_taken():
    rows = checked_rows(np.array([0, 9], dtype=np.uint32), name="rows", num_rows=10)
    assert rows.dtype == np.int64


def test_rows_that_cannot_be_written_leave_no_sidecar(tmp_path, subset, monkeypatch):
    def full_disk(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", full_disk)
    with pytest.raises(ArtifactError, match=r"cannot write .*subset\.npy: No space left"):
        subset.save(tmp_path / "subset.npy")
    assert list(tmp_path.iterdir()) == []
