"""Headers of files, declared as strict models and read within bounds.

Recipes, sidecars, metadata of manifests and score tables, label files and .npy files come from
users and their tools. They are read up to a bounded size and depth, and every key is declared with
its type and range, so that damage ends in one error that names file, key, value and cure.
"""

import hashlib
import io
import json
import math
import os
import re
import tokenize
import tomllib
import zipfile
import zlib
from pathlib import Path
from typing import Annotated, Any, BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fastprune.base.checks import MAX_CLASSES
from fastprune.base.errors import ArtifactError
from fastprune.base.files import MAX_BYTES, open_regular, read_bytes

# Our own files nest four deep. Deep structures end in RecursionError when printed or compared.
MAX_DEPTH = 32

#: What NumPy's parser of .npy headers raises on damage, beside ValueError.
BAD_HEADER = (SyntaxError, tokenize.TokenError)

#: What every model of a file's header is configured with: no conversions, no unknown keys.
STRICT = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

#: A number >= 0 per class, null for NaN; `np.array(_, np.float64)` makes it an array.
NumberPerClass = Annotated[
    list[Annotated[float, Field(ge=0)] | None], Field(max_length=MAX_CLASSES)
]

_DIGEST_BYTES = 16
_SHOWN_CHARACTERS = 40  # of a value in an error, which stays one line
# In JSON's words; pydantic's own texts serve for the other kinds.
_EXPECTED = {
    "int_type": "be an integer",
    "float_type": "be a number",
    "bool_type": "be true or false",
    "string_type": "be text",
    "list_type": "be a list",
    "tuple_type": "be a list",
    "dict_type": "be an object",
    "model_type": "be an object",
    "dataclass_type": "be an object",
    "finite_number": "be a finite number",
}


class Header(BaseModel):
    """Base of the models that describe a file's header; one field per key, every key declared."""

    model_config = STRICT


class SealedHeader(Header):
    """A header whose values are tied by a digest, see `with_digest`; one without it is accepted."""

    digest: str | None = None


Model = TypeVar("Model", bound=BaseModel)


def read_header(
    path: str | Path,
    model: type[Model],
    *,
    cure: str,
    max_bytes: int = MAX_BYTES,
    error: type[ArtifactError] = ArtifactError,
) -> Model:
    """Read a JSON file as a model; `cure` ends the error and tells how to get a good file.

    Raises:
        ArtifactError: the file is missing, cannot be read or does not fit the model. A missing file
            is the error's `__cause__`, a FileNotFoundError. `error` names a subclass to raise.
    """
    try:
        text = read_bytes(path, max_bytes=max_bytes)
    except FileNotFoundError as missing:
        raise error(f"{path} does not exist. {cure}") from missing
    except (OSError, ValueError) as fault:
        reason = fault.strerror if isinstance(fault, OSError) else fault
        raise error(f"{path} cannot be read: {reason}. {cure}") from fault
    return parse_header(text, model, name=path, cure=cure, error=error)


def parse_header(
    text: str | bytes,
    model: type[Model],
    *,
    name: str | Path,
    cure: str,
    error: type[ArtifactError] = ArtifactError,
) -> Model:
    """Parse the JSON of a header as a model; raises as `read_header`, naming the file `name`."""
    try:
        return parse_model(text, model)
    except ValueError as fault:
        raise error(f"{name} cannot be read: {fault}. {cure}") from fault


def read_parquet_header(
    path: str | Path,
    key: bytes,
    model: type[Model],
    *,
    cure: str,
    error: type[ArtifactError] = ArtifactError,
) -> Model:
    """Read the JSON in the metadata of a Parquet file as a model; as `read_header`."""
    try:
        return parse_model(parquet_metadata(path, key), model)
    except FileNotFoundError as missing:
        raise error(f"{path} does not exist. {cure}") from missing
    except (OSError, ValueError) as fault:
        raise error(f"{path} cannot be read: {fault}. {cure}") from fault


def parse_model(text: str | bytes, model: type[Model]) -> Model:
    """Parse JSON as a model, for callers who word the error themselves.

    Raises:
        ValueError: the text does not fit; the message continues "FILE cannot be read:".
    """
    # Parsed twice: pydantic bounds the depth at about 200, and accepts JSON's lists as tuples only
    # when it parses the text itself.
    record = parse_json(text)
    try:
        parsed = model.model_validate_json(text)
    except ValidationError as error:
        raise ValueError(describe(error)) from None
    if issubclass(model, SealedHeader):
        _require_unchanged(record)
    return parsed


def describe(error: ValidationError) -> str:
    """Name the first fault that a model found: its key, the value, and what it must be."""
    fault = error.errors(include_url=False)[0]
    kind, message = fault["type"], fault["msg"]
    key = ".".join(map(str, fault["loc"]))
    if kind == "missing":
        return f"it has no {key!r}"
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"its {key!r} is unknown"
    subject = f"its {key!r}" if key else "it"
    if kind == "value_error":
        # The text of a validator of ours.
        message = str(fault["ctx"]["error"])
        return f"{subject} {message}" if key else message
    expected = _EXPECTED.get(kind) or re.sub(r"^\w+ should ", "", message)
    return f"{subject} is {_shown(fault['input'])}, but must {expected}"


def _shown(value: Any) -> str:
    """A value for an error's text; JSON's objects and lists by their kind."""
    kinds = {dict: "an object", list: "a list", bool: str(value).lower(), type(None): "null"}
    return kinds.get(type(value), repr(value)[:_SHOWN_CHARACTERS])


def with_digest(record: dict[str, Any]) -> dict[str, Any]:
    """Add the digest of a record of JSON values to it; `SealedHeader` compares it."""
    return record | {"digest": _record_digest(record)}


def _require_unchanged(record: dict[str, Any]) -> None:
    """Raise ValueError if a value changed since `with_digest`, by damage or by hand."""
    if record.get("digest") is not None and record["digest"] != _record_digest(record):
        raise ValueError(
            "it was changed since it was written; without its 'digest' it is taken as it is"
        )


def _record_digest(record: dict[str, Any]) -> str:
    """BLAKE2b-128 over the JSON of all entries but the digest, in their order."""
    entries = {name: value for name, value in record.items() if name != "digest"}
    return hashlib.blake2b(json.dumps(entries).encode(), digest_size=_DIGEST_BYTES).hexdigest()


def parse_json(text: str | bytes) -> Any:
    """Parse JSON; raise ValueError if it is damaged or nested too deeply."""
    try:
        return _of_bounded_depth(json.loads(text))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_toml(text: str) -> dict[str, Any]:
    """Parse TOML; raise ValueError if it is damaged or nested too deeply."""
    try:
        settings: dict[str, Any] = _of_bounded_depth(tomllib.loads(text))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return settings


def _of_bounded_depth(value: Any) -> Any:
    """Return a parsed value unless it is nested too deeply."""
    # Level by level, because recursion would hit Python's own limit on the values to be refused.
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


def parquet_metadata(path: str | Path, key: bytes) -> bytes:
    """Read one entry of a Parquet file's metadata.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not Parquet, or has no such metadata.
    """
    import pyarrow as pa  # here, because recipes need none of it
    import pyarrow.parquet as pq

    # Arrow would wait for the writer of a FIFO.
    open_regular(path).close()
    try:
        metadata = pq.read_schema(path).metadata or {}
    except pa.ArrowException as error:
        raise ValueError(f"it is not a Parquet file ({error})") from None
    if key not in metadata:
        raise ValueError(f"it has no metadata {key.decode()!r}")
    value: bytes = metadata[key]
    return value


def read_npy(path: str | Path) -> NDArray[Any]:
    """Read a .npy file without pickles, if it is as long as its header claims.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a .npy file, holds objects, or is shorter than its header claims.
    """
    with open_regular(path) as file:
        return _parse_npy(file, os.fstat(file.fileno()).st_size)


def read_npz_member(path: str | Path, name: str) -> NDArray[Any]:
    """Read one array of a .npz file without pickles.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a .npz file, has no such array, or unpacks to more than `MAX_BYTES`.
    """
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            info = archive.getinfo(f"{name}.npy")
            with archive.open(info) as packed:
                # The sizes that the archive claims may be wrong, so the stream is bounded itself.
                content = packed.read(MAX_BYTES + 1)
    except KeyError:
        raise ValueError(f"it has no array {name!r}") from None
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:
        raise ValueError(f"it is not a .npz file ({error})") from None
    if len(content) > MAX_BYTES:
        raise ValueError(f"its {name!r} has more than {MAX_BYTES:,} bytes")
    return _parse_npy(io.BytesIO(content), len(content))


def _parse_npy(file: BinaryIO, num_bytes: int) -> NDArray[Any]:
    """Parse a .npy file after checking that its header claims no more than is there."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"its format version is {version}, but (1, 0) and (2, 0) are read")
    read_array_header = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    try:
        shape, _, dtype = read_array_header(file)
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
