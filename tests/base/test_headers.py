"""Files that anyone may have written are read with bounds, or refused in words."""

import json
import os
import socket
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import Field

from fastprune.base.errors import ArtifactError, BetonError
from fastprune.base.files import read_bytes, read_text
from fastprune.base.headers import (
    MAX_DEPTH,
    Header,
    NumberPerClass,
    SealedHeader,
    parquet_metadata,
    parse_header,
    parse_json,
    parse_toml,
    read_header,
    read_npy,
    read_npz_member,
    read_parquet_header,
    with_digest,
)
from fastprune.base.provenance import Fingerprint


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


class Example(Header):
    seed: int
    seconds: float | None = None
    names: tuple[str, ...] = ()
    class_std: NumberPerClass = Field(default_factory=list)
    images: Fingerprint | None = None
    settings: dict[str, Any] = Field(default_factory=dict)


class SealedExample(SealedHeader):
    seed: int


def refused(record, match, model=Example):
    with pytest.raises(
        ArtifactError, match=rf"^a\.json cannot be read: {match}\. Make it again\.$"
    ):
        parse_header(
            record if isinstance(record, str) else json.dumps(record),
            model,
            name="a.json",
            cure="Make it again.",
        )


@pytest.mark.parametrize(("record", "kind"), [([], "a list"), ("3", "3"), (None, "null")])
def test_header_that_is_not_an_object_is_refused(record, kind):
    refused(record, f"it is {kind}, but must be an object")


@pytest.mark.parametrize(
    ("value", "shown"),
    [("1", "'1'"), (True, "true"), (1.5, "1.5"), (None, "null"), ([], "a list"), ({}, "an object")],
)
def test_value_of_another_type_is_refused(value, shown):
    refused({"seed": value}, f"its 'seed' is {shown}, but must be an integer")


@pytest.mark.parametrize("text", ["NaN", "Infinity", "1e999", "1" + "0" * 400])
def test_number_that_is_not_finite_is_refused(text):
    refused(f'{{"seed": 1, "seconds": {text}}}', "its 'seconds' is .{1,40}, but must be a finite.*")


def test_key_may_be_missing_only_where_the_model_has_a_default():
    refused({"seconds": 1}, "it has no 'seed'")
    assert parse_header('{"seed": 1}', Example, name="", cure="").seconds is None


def test_unknown_key_is_refused():
    refused({"seed": 1, "sede": 2}, "its 'sede' is unknown")
    refused({"seed": 1, "images": {"num_rows": 1, "structure": "0" * 32, "x": 1}}, ".*'images.x'.*")


def test_nested_key_is_named_in_full():
    refused(
        {"seed": 1, "images": {"num_rows": 0, "structure": "0" * 32}},
        r"its 'images\.num_rows' is 0, but must be greater than 0",
    )


def test_lists_are_read_as_tuples_and_null_in_a_number_per_class_as_nan():
    text = '{"seed": 1, "names": ["a"], "class_std": [1, null]}'
    header = parse_header(text, Example, name="a.json", cure="")
    assert header.names == ("a",)
    assert np.array_equal(np.array(header.class_std, np.float64), [1, np.nan], equal_nan=True)


@pytest.mark.parametrize("value", [-1, "1", True, [1], float("nan")])
def test_number_per_class_holds_finite_numbers_of_at_least_0(value):
    refused({"seed": 1, "class_std": [1.0, value]}, r"its 'class_std\.1' is .*, but must be .*")


def test_number_per_class_is_bounded():
    refused(
        {"seed": 1, "class_std": [None] * 1_000_001}, "its 'class_std' is a list, .* 1000000 .*"
    )


def test_changed_value_of_a_sealed_header_is_refused():
    sealed = with_digest({"seed": 1})
    assert parse_header(json.dumps(sealed), SealedExample, name="", cure="").seed == 1
    assert parse_header('{"seed": 1}', SealedExample, name="", cure="").seed == 1
    refused(sealed | {"seed": 2}, "it was changed since it was written.*", SealedExample)


@pytest.mark.parametrize("text", ["", "{", "\ufeff{}", '{"seed": 1}}', "[" * 10**5])
def test_header_that_is_not_json_is_refused(text):
    refused(text, ".*")


def test_header_is_read_from_a_file_or_refused_with_its_name_and_the_cure(tmp_path, fifo):
    (tmp_path / "a.json").write_text('{"seed": 1}')
    assert read_header(tmp_path / "a.json", Example, cure="") == Example(seed=1)
    for path, reason in [
        (tmp_path / "b.json", "does not exist"),
        (fifo, "cannot be read: it is a FIFO, but must be a regular file"),
    ]:
        with pytest.raises(ArtifactError, match=rf"^{path} {reason}\. Make it again\.$"):
            read_header(path, Example, cure="Make it again.")
    with pytest.raises(BetonError, match="has more than 5 bytes"):
        read_header(tmp_path / "a.json", Example, cure="", max_bytes=5, error=BetonError)


def test_header_in_the_metadata_of_a_parquet_file_is_read(tmp_path):
    table = pa.table({"a": [1]}).replace_schema_metadata({b"fastprune": '{"seed": 1}'})
    pq.write_table(table, tmp_path / "a.parquet")
    path = tmp_path / "a.parquet"
    assert read_parquet_header(path, b"fastprune", Example, cure="").seed == 1
    with pytest.raises(ArtifactError, match=r"it has no metadata 'other'\. Make it again\.$"):
        read_parquet_header(path, b"other", Example, cure="Make it again.")


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
    monkeypatch.setattr("fastprune.base.headers.MAX_BYTES", 1000)
    np.savez_compressed(tmp_path / "a.npz", indices=np.zeros(1000))
    with pytest.raises(ValueError, match="more than 1,000 bytes"):
        read_npz_member(tmp_path / "a.npz", "indices")


@pytest.mark.parametrize("cut", [10, 100, 200])
def test_npz_that_was_cut_is_refused(tmp_path, cut):
    np.savez_compressed(tmp_path / "a.npz", indices=np.arange(300))
    (tmp_path / "b.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:-cut])
    with pytest.raises(ValueError, match=r"not a \.npz file"):
        read_npz_member(tmp_path / "b.npz", "indices")


def test_parquet_without_the_metadata_is_refused(tmp_path):
    pq.write_table(pa.table({"a": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="has no metadata 'fastprune'"):
        parquet_metadata(tmp_path / "a.parquet", b"fastprune")


def test_file_that_is_no_parquet_is_refused(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(ValueError, match="is not a Parquet file"):
        parquet_metadata(tmp_path / "a.parquet", b"fastprune")
