"""CRC-32C: the checksum of images, of blocks of rows, and of files."""

import os
from typing import Any

import google_crc32c
import numpy as np

_CHUNK_BYTES = 1 << 20


def crc32c(data: Any, crc: int = 0) -> int:
    """CRC-32C of any contiguous buffer; `crc` continues from the bytes before it."""
    if not isinstance(data, bytes | np.ndarray):
        # The library refuses writable buffers other than arrays.
        data = np.frombuffer(data, np.uint8)
    return int(google_crc32c.extend(crc, data))


def crc32c_of_range(descriptor: int, offset: int, num_bytes: int) -> int:
    """CRC-32C of a range of an open file; of fewer bytes if the file ends early."""
    # In chunks: a range may be a whole shard of many gigabytes.
    crc, end = 0, offset + num_bytes
    while offset < end and (chunk := os.pread(descriptor, min(_CHUNK_BYTES, end - offset), offset)):
        crc, offset = crc32c(chunk, crc), offset + len(chunk)
    return crc


def is_intact(data: Any, expected: int | None) -> bool:
    """Compare data with its stored CRC-32C; data without one (None) counts as intact."""
    return expected is None or crc32c(data) == int(expected)
