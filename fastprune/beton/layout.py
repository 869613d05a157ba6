"""The beton format as little-endian numpy dtypes, and nothing else.

@0   header, 24 bytes
@24  one descriptor of 1,041 bytes per field
@..  metadata: one record per row, aligned like a C struct
@..  pages of image data; no allocation crosses a page
@alloc_table_ptr .. end of file: the allocation table, {sample_id, ptr, size} per allocation
"""

import json
import math
import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

VERSION = 2
MIN_PAGE_BYTES = 1 << 21  # the least that ffcv's allocator takes
MAX_PAGE_BYTES = 1 << 31  # the largest power of two that the header's <u4 holds
DEFAULT_PAGE_BYTES = 1 << 23

# DALI's webdataset reader takes any file whose samples start on multiples of this.
ALIGNMENT = 512

JPG, RAW = 0, 1

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ]
)
# ffcv/types.py: a field's name and arguments have fixed room, however little of it the type needs.
DESCRIPTOR = np.dtype([("type_id", "u1"), ("name", "u1", 16), ("arguments", "u1", 1024)])
# Unsorted, and without a count: bytes appended to a file become entries.
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])

IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
_BYTES = np.dtype([("ptr", "<u8"), ("size", "<u8")])
_ARRAY_ARGUMENTS = np.dtype([("shape", "<u8", 32), ("type_length", "<u8")])

KINDS = {0: "float", 1: "int", 2: "image", 3: "bytes", 4: "ndarray", 5: "json", 6: "tensor"}
_TYPE_IDS = {kind: type_id for type_id, kind in KINDS.items()}
_RECORDS = {
    "float": np.dtype("<f8"),
    "int": np.dtype("<i8"),
    "image": IMAGE,
    "bytes": _BYTES,
    "ndarray": np.dtype("<u8"),
    "json": _BYTES,
    "tensor": np.dtype("<u8"),
}
_PLAIN_TYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248]|c8|c16)")
# The member of a record that holds the file offset; None where the record is the offset.
_POINTERS = {"image": "data_ptr", "bytes": "ptr", "json": "ptr", "ndarray": None, "tensor": None}


@dataclass(frozen=True)
class Field:
    """One column of a beton.

    Attributes:
        name: at most 16 ASCII characters.
        kind: one of `KINDS`.
        arguments: the 1,024 bytes that the field's type keeps in its descriptor.
    """

    name: str
    kind: str
    arguments: bytes = bytes(1024)

    @property
    def has_data(self) -> bool:
        """Whether every row has an allocation of this field in the pages."""
        return self.kind in _POINTERS


def align_up(offset: int, multiple: int) -> int:
    """Return the first multiple that is not below the offset."""
    return -(-offset // multiple) * multiple


def metadata_dtype(fields: tuple[Field, ...]) -> np.dtype[np.void]:
    """Return the record of one row: f0, f1, ... for the fields in order."""
    # align=True as ffcv does it: a row is a C struct, 24 bytes for (image, label).
    return np.dtype([("", _RECORDS[field.kind]) for field in fields], align=True)


def metadata_start(num_fields: int) -> int:
    """Return the offset of the first row's record, in bytes."""
    return HEADER.itemsize + num_fields * DESCRIPTOR.itemsize


def pointers(
    metadata: NDArray[np.void], fields: tuple[Field, ...], index: int
) -> NDArray[np.uint64]:
    """Return the (N,) file offsets of a field that has data, as a view into the metadata."""
    column = metadata[f"f{index}"]
    key = _POINTERS[fields[index].kind]
    offsets: NDArray[np.uint64] = column if key is None else column[key]
    return offsets


def array_bytes(field: Field) -> int | None:
    """Return the bytes of each value of an ndarray or tensor field; None if it is damaged."""
    arguments = np.frombuffer(field.arguments, _ARRAY_ARGUMENTS, 1)[0]
    # Unused dimensions are zero; Python's integers do not wrap around, however absurd the sides.
    shape = [int(side) for side in arguments["shape"] if side]
    text = field.arguments[_ARRAY_ARGUMENTS.itemsize :][: int(arguments["type_length"])]
    try:
        [(_, type_name)] = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return None
    if not isinstance(type_name, str) or not _PLAIN_TYPE.fullmatch(type_name):
        return None
    return np.dtype(type_name).itemsize * math.prod(shape)


def pack_descriptors(fields: tuple[Field, ...]) -> bytes:
    """Pack the descriptors of the fields, in order."""
    descriptors = np.zeros(len(fields), DESCRIPTOR)
    for descriptor, field in zip(descriptors, fields, strict=True):
        name = field.name.encode("ascii")
        descriptor["type_id"] = _TYPE_IDS[field.kind]
        descriptor["name"][: len(name)] = np.frombuffer(name, "u1")
        descriptor["arguments"] = np.frombuffer(field.arguments, "u1")
    return descriptors.tobytes()


def pack_header(num_fields: int, page_bytes: int, num_rows: int, table_offset: int) -> bytes:
    """Pack the first 24 bytes."""
    return np.array([(VERSION, num_fields, page_bytes, num_rows, table_offset)], HEADER).tobytes()
