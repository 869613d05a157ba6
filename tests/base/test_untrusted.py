"""Files that anyone may have written are read with bounds, or refused in words."""

import os
import socket

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastprune.base.untrusted import (
    MAX_DEPTH,
    member,
    numbers,
    parquet_metadata,
    parse_json,
    parse_toml,
    read_bytes,
    read_npy,
    read_npz_member,
    read_text,
)


@pytest.fixture
def fifo(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    return tmp_path / "fifo"


def test_fifo_is_refused_and_not_waited_for(fifo):
    with pytest.raises(ValueError, match="it is a FIFO, but must be a regular file"):
        read_bytes(fifo)


def test_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="it is a folder, but must be a regular file"):
        read_bytes(tmp_path)


def test_socket_cannot_be_opened(tmp_path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        with pytest.raises(OSError, match="No such device"):
            read_bytes(tmp_path / "socket")


def test_file_larger_than_the_bound_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(bytes(11))
    with pytest.raises(ValueError, match="more than 10 bytes"):
        read_bytes(tmp_path / "file", max_bytes=10)
    assert read_bytes(tmp_path / "file", max_bytes=11) == bytes(11)


def test_bytes_that_are_no_utf8_are_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="utf-8"):
        read_text(tmp_path / "file")


@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 10**5])
def test_json_that_is_nested_too_deeply_is_refused(depth):
    with pytest.raises(ValueError, match="nested"):
        parse_json("[" * depth + "]" * depth)
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH)


@pytest.mark.parametrize("text", ["a = " + "[" * 10**5 + "]" * 10**5, ".".join("a" * 1000) + "=1"])
def test_toml_that_is_nested_too_deeply_is_refused(text):
    with pytest.raises(ValueError, match="nested"):
        parse_toml(text)


@pytest.mark.parametrize("record", [[], "text", None, 3])
def test_record_that_is_no_object_is_refused(record):
    with pytest.raises(ValueError, match="must hold an object"):
        member(record, "seed", int)


@pytest.mark.parametrize("value", ["1", True, 1.5, None, [], {}])
def test_entry_of_another_type_is_refused(value):
    with pytest.raises(ValueError, match=r"its 'seed' is .*, but must be an integer"):
        member({"seed": value}, "seed", int)


def test_number_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="its 'seconds' is inf, but must be a number or null"):
        member(parse_json('{"seconds": 1e999}'), "seconds", float, None)


def test_entry_may_be_missing_only_where_null_is_allowed():
    assert member({}, "seed", int, None) is None
    with pytest.raises(ValueError, match="it has no 'seed'"):
        member({}, "seed", int)


def test_null_in_a_list_of_numbers_is_nan():
    assert np.array_equal(numbers({"std": [1, None]}, "std", max_count=2), [1, np.nan], True)


@pytest.mark.parametrize("value", [-1, "1", True, [1], 10**400, float("nan")])
def test_list_with_anything_but_finite_numbers_is_refused(value):
    with pytest.raises(ValueError, match="must hold finite numbers >= 0"):
        numbers({"std": [1.0, value]}, "std", max_count=9)


def test_list_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="has 3 numbers, but at most 2 fit"):
        numbers({"std": [1, 1, 1]}, "std", max_count=2)


def write_npy(path, shape, content=b"", descr="<i8"):
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": descr, "fortran_order": False, "shape": shape}
        )
        file.write(content)
    return path


@pytest.mark.parametrize("shape", [(10**13,), (2**40, 2**40), (3,), (-1,)])
def test_npy_that_claims_more_than_it_holds_is_refused(tmp_path, shape):
    with pytest.raises(ValueError, match=r"claims .* bytes of shape .*, but 16 follow"):
        read_npy(write_npy(tmp_path / "a.npy", shape, bytes(16)))


def test_npy_with_objects_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Python objects"):
        read_npy(write_npy(tmp_path / "a.npy", (1,), b"x", descr="|O"))


def test_npy_whose_header_is_nested_is_refused(tmp_path):
    header = b"(" * 5000 + b")" * 5000 + b"\n"
    length = len(header).to_bytes(2, "little")
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x01\x00" + length + header)
    with pytest.raises(ValueError, match="eader"):
        read_npy(tmp_path / "a.npy")


def test_whole_npy_is_read(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(6).reshape(2, 3))
    assert read_npy(tmp_path / "a.npy").tolist() == [[0, 1, 2], [3, 4, 5]]


def test_array_of_an_npz_is_read(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", indices=np.arange(3))
    assert read_npz_member(tmp_path / "a.npz", "indices").tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="no array 'rows'"):
        read_npz_member(tmp_path / "a.npz", "rows")


def test_npz_that_unpacks_to_more_than_the_bound_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("fastprune.base.untrusted.MAX_BYTES", 1000)
    np.savez_compressed(tmp_path / "a.npz", indices=np.zeros(1000))
    with pytest.raises(ValueError, match="more than 1,000 bytes"):
        read_npz_member(tmp_path / "a.npz", "indices")


@pytest.mark.parametrize("cut", [10, 100, 200])
def test_npz_that_was_cut_is_refused(tmp_path, cut):
    np.savez_compressed(tmp_path / "a.npz", indices=np.arange(300))
    (tmp_path / "b.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:-cut])
    with pytest.raises(ValueError, match=r"no \.npz file"):
        read_npz_member(tmp_path / "b.npz", "indices")


def test_parquet_without_the_metadata_is_refused(tmp_path):
    pq.write_table(pa.table({"a": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="has no metadata 'fastprune'"):
        parquet_metadata(tmp_path / "a.parquet", b"fastprune")


def test_file_that_is_no_parquet_is_refused(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(ValueError, match="is no Parquet file"):
        parquet_metadata(tmp_path / "a.parquet", b"fastprune")
