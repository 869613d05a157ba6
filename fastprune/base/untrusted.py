"""Read small files that anyone may have written: bounded in size and depth, checked for type.

Recipes, sidecars, the metadata of manifests and score tables, label files and .npy files come from
users and their tools. Whatever is wrong with one is a `ValueError` or an `OSError` with a text that
fits behind the file's name; the caller adds the name and the cure.
"""

import io
import json
import math
import os
import stat
import sys
import tokenize
import tomllib
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

# A sidecar of 1,000,000 classes takes 40 MB; nothing else that is read whole comes close.
MAX_BYTES = 128 << 20
# Our own files nest four deep. Deep structures end in RecursionError when printed or compared.
MAX_DEPTH = 32

# What NumPy lets through, beside ValueError, of the parsers of a damaged .npy header.
BAD_HEADER = (SyntaxError, tokenize.TokenError)

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)
_JSON_NAMES = {
    dict: "an object",
    list: "a list",
    str: "text",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def kind_of_file(mode: int) -> str:
    """Name what a file is by its mode: "a regular file", "a FIFO", ..."""
    return next((name for is_kind, name in _KINDS if is_kind(mode)), "a regular file")


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading; a device or a pipe is refused instead of waited for.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is no regular file.
    """
    # Opening a FIFO without O_NONBLOCK waits for a writer, perhaps for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise ValueError(f"it is {kind_of_file(mode)}, but must be a regular file")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: str | Path, *, max_bytes: int = MAX_BYTES) -> bytes:
    """Read a whole regular file of bounded size.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no regular file, or larger than `max_bytes`.
    """
    with open_regular(path) as file:
        # One byte more than allowed: files in /proc have a size of 0, others may grow.
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"it has more than {max_bytes:,} bytes")
    return content


def read_text(path: str | Path, *, max_bytes: int = MAX_BYTES) -> str:
    """Read a whole UTF-8 text file of bounded size, with or without a byte order mark.

    Raises:
        OSError: it cannot be read.
        ValueError: as `read_bytes`, or it is no UTF-8.
    """
    return read_bytes(path, max_bytes=max_bytes).decode("utf-8-sig")


def read_json(path: str | Path) -> Any:
    """Read a JSON file; see `parse_json`."""
    return parse_json(read_bytes(path))


def parse_json(text: str | bytes) -> Any:
    """Parse JSON of bounded depth.

    Raises:
        ValueError: it is no JSON, or nested too deeply.
    """
    try:
        return _of_bounded_depth(json.loads(text))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_toml(text: str) -> dict[str, Any]:
    """Parse TOML of bounded depth.

    Raises:
        ValueError: it is no TOML, or nested too deeply.
    """
    try:
        settings: dict[str, Any] = _of_bounded_depth(tomllib.loads(text))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return settings


def member(record: Any, key: str, *types: type | None) -> Any:
    """Return one entry of a JSON object if it has one of these types.

    Args:
        record: what should be an object.
        key: of the entry.
        types: of JSON: dict, list, str, int, float (integers fit too), bool; None for null. Where
            null is allowed, the entry may be missing.

    Raises:
        ValueError: the record is no object, or the entry is missing or of another type.
    """
    if not isinstance(record, dict):
        raise ValueError(f"it holds {_json_name(record)}, but must hold an object")
    if key not in record and None not in types:
        raise ValueError(f"it has no {key!r}")
    value = record.get(key)
    for kind in types:
        if kind is None and value is None:
            return value
        accepted = (int, float) if kind is float else kind or ()
        # True is an int to Python, and json.loads takes NaN and Infinity for numbers.
        if isinstance(value, accepted) and (kind is bool or not isinstance(value, bool)):
            if isinstance(value, float) and not math.isfinite(value):
                break
            return value
    wanted = " or ".join(_JSON_NAMES[kind or type(None)] for kind in types)
    raise ValueError(f"its {key!r} is {_json_name(value)}, but must be {wanted}")


def numbers(record: Any, key: str, *, max_count: int) -> NDArray[np.float64]:
    """Return a list of finite numbers >= 0 in a JSON object; null stands for NaN.

    Args:
        record: what should be an object.
        key: of the list.
        max_count: the longest list that makes sense.

    Returns:
        (n,) float64.

    Raises:
        ValueError: it is no such list.
    """
    values = member(record, key, list)
    if len(values) > max_count:
        raise ValueError(f"its {key!r} has {len(values):,} numbers, but at most {max_count:,} fit")
    for value in values:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        # JSON's integers have no bound, a float64 has.
        if value is not None and not (is_number and 0 <= value <= sys.float_info.max):
            shown = repr(value)[:40]
            raise ValueError(f"its {key!r} holds {shown}, but must hold finite numbers >= 0")
    return np.array(values, np.float64)


def read_npy(path: str | Path) -> NDArray[Any]:
    """Read a .npy file without pickles, if it is as long as its header claims.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no .npy file, holds objects, or is shorter than its header claims.
    """
    with open_regular(path) as file:
        return _parse_npy(file, os.fstat(file.fileno()).st_size)


def read_npz_member(path: str | Path, name: str) -> NDArray[Any]:
    """Read one array of a .npz file without pickles.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no .npz file, has no such array, or unpacks to more than `MAX_BYTES`.
    """
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            info = archive.getinfo(f"{name}.npy")
            with archive.open(info) as packed:
                # What the archive says of its sizes is as little to be trusted as the rest.
                content = packed.read(MAX_BYTES + 1)
    except KeyError:
        raise ValueError(f"it has no array {name!r}") from None
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:
        raise ValueError(f"it is no .npz file ({error})") from None
    if len(content) > MAX_BYTES:
        raise ValueError(f"its {name!r} has more than {MAX_BYTES:,} bytes")
    return _parse_npy(io.BytesIO(content), len(content))


def _parse_npy(file: BinaryIO, num_bytes: int) -> NDArray[Any]:
    """Parse a .npy file, once its header is known to claim no more than there is."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"its format version is {version}, but (1, 0) and (2, 0) are read")
    read_header = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    try:
        shape, _, dtype = read_header(file)
    except (*BAD_HEADER, RecursionError, MemoryError, TypeError, OverflowError) as error:
        raise ValueError(f"its header cannot be read ({error!r})") from None
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are never read")
    # Python's integers: a claim of 2**80 bytes must not wrap around to one that fits. NumPy would
    # allocate all of it before it reads the first byte.
    claimed = math.prod(shape) * dtype.itemsize
    stored = num_bytes - file.tell()
    if claimed > stored or min(shape, default=0) < 0:
        raise ValueError(
            f"its header claims {claimed:,} bytes of shape {shape}, but {stored:,} follow"
        )
    file.seek(0)
    array: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
    return array


def parquet_metadata(path: str | Path, key: bytes) -> Any:
    """Parse the JSON in the metadata of a Parquet file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no Parquet, has no such metadata, or its JSON is bad.
    """
    import pyarrow as pa  # here, because recipes need none of it
    import pyarrow.parquet as pq

    open_regular(path).close()
    try:
        metadata = pq.read_schema(path).metadata or {}
    except pa.ArrowException as error:
        raise ValueError(f"it is no Parquet file ({error})") from None
    if key not in metadata:
        raise ValueError(f"it has no metadata {key.decode()!r}")
    return parse_json(metadata[key])


def _json_name(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return _JSON_NAMES.get(type(value), type(value).__name__)


def _of_bounded_depth(value: Any) -> Any:
    """Return what was parsed, if it is not nested too deeply; walked level by level."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            part
            for parent in level
            if isinstance(parent, dict | list)
            for part in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(part, dict | list)
        ]
        if not level:
            return value
    raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
