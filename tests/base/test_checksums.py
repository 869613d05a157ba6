import os

import numpy as np
import pytest

from fastprune.base.checksums import crc32c, crc32c_of_range, is_intact

# RFC 3720, B.4: 32 bytes of zeros, and of ascending values.
ZEROS, ASCENDING = 0x8A9136AA, 0x46DD794E


@pytest.mark.parametrize(
    "kind", [bytes, bytearray, memoryview, lambda data: np.frombuffer(data, np.uint8)]
)
def test_checksum_is_crc32c_for_every_kind_of_buffer(kind):
    assert crc32c(kind(bytes(32))) == ZEROS
    assert crc32c(kind(bytes(range(32)))) == ASCENDING


def test_checksum_can_be_continued():
    assert crc32c(bytes(range(10, 32)), crc32c(bytes(range(10)))) == ASCENDING


def test_range_of_a_file_is_summed_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("fastprune.base.checksums._CHUNK_BYTES", 5)
    (tmp_path / "file").write_bytes(b"before" + bytes(range(32)) + b"behind")
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    try:
        assert crc32c_of_range(descriptor, 6, 32) == ASCENDING
        assert crc32c_of_range(descriptor, 38, 100) == crc32c(b"behind")
    finally:
        os.close(descriptor)


def test_data_is_compared_with_its_checksum_where_there_is_one():
    assert is_intact(bytes(32), ZEROS)
    assert is_intact(bytes(32), np.uint32(ZEROS))
    assert is_intact(bytes(32), None)
    assert not is_intact(bytes(31), ZEROS)
