"""A beton at a loading service, as trainers without the file open it: its row table, no images.

The server sends the table (`beton_table`) by Arrow Flight; `open_remote_beton` reads it.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from fastprune.base.checks import MAX_CLASSES
from fastprune.base.errors import InvalidValueError, LoadingError
from fastprune.base.headers import Header
from fastprune.base.provenance import Fingerprint, structure_digest
from fastprune.beton.beton import Beton
from fastprune.beton.row_check import label_faults
from fastprune.service.address import Address, parse_addresses
from fastprune.service.credentials import ClientCredentials
from fastprune.service.wire import ServiceError, ServiceRefusedError, read_message

#: One line a row; `page` is where in the file the row lies.
SCHEMA = pa.schema(
    [
        pa.field("label", pa.int64(), nullable=False),
        pa.field("width", pa.uint16(), nullable=False),
        pa.field("height", pa.uint16(), nullable=False),
        pa.field("page", pa.uint32(), nullable=False),
    ]
)
METADATA_KEY = b"fastprune"

_PATIENCE_SECONDS = 60.0
_FIRST_PAUSE_SECONDS, _MAX_PAUSE_SECONDS = 0.25, 4.0
_TABLE_SECONDS = 60.0
_MAX_MESSAGE_BYTES = 64 << 20  # the names of a million classes
_MAX_ROWS = 1 << 28


class TableHeader(Header):
    """Metadata of the table."""

    fingerprint: Fingerprint
    digest: str  # by which services know the stored images
    class_names: list[str] | None = Field(None, max_length=MAX_CLASSES)
    has_labels: bool
    page_bytes: int = Field(gt=0, lt=2**31)


class _Served(Protocol):
    """A beton that a server has, and the digest of its images; see `dispatcher.Served`."""

    beton: Beton
    digest: str


def find_served(betons: Sequence[_Served], name: str) -> _Served:
    """Find the beton whose path ends in a name.

    Raises:
        ServiceRefusedError: there is none, or more than one.
    """
    parts = PurePath(name).parts
    found = [s for s in betons if parts and s.beton.path.parts[-len(parts) :] == parts and s.digest]
    if len(found) == 1:
        return found[0]
    names = ", ".join(served.beton.path.name for served in betons)
    number = "more than one beton" if found else "no beton"
    raise ServiceRefusedError(f"it serves {number} named {name[:200]!r}, but {names}")


def beton_table(beton: Beton, digest: str) -> pa.Table:
    """Make the table of a beton: labels, sizes and pages of its rows, its names and identity."""
    header = TableHeader(
        fingerprint=beton.fingerprint,
        digest=digest,
        class_names=None if beton.class_names is None else list(beton.class_names),
        has_labels=beton.has_labels,
        page_bytes=beton.page_bytes,
    )
    # The order "pages" depends on where rows lie, and must be the same without the file.
    pages = beton.offsets // beton.page_bytes
    columns = [beton.labels, beton.widths, beton.heights, pages]
    return pa.Table.from_arrays(
        [pa.array(c, field.type) for c, field in zip(columns, SCHEMA, strict=True)],
        schema=SCHEMA.with_metadata({METADATA_KEY: header.model_dump_json().encode()}),
    )


@dataclass(frozen=True, eq=False, repr=False)
class ServedBeton(Beton):
    """A beton whose images stay with the services that have it; they decode all views."""

    url: str = ""  # as it was named
    identity: Fingerprint | None = None
    digest: str = ""  # by which services know the stored images
    names: tuple[str, ...] | None = None  # of the classes
    is_labeled: bool = True

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Name of every class, in the order of the labels."""
        return self.names

    @property
    def has_labels(self) -> bool:
        """Whether the labels are classes."""
        return self.is_labeled

    @property
    def fingerprint(self) -> Fingerprint:
        """The identity of the images."""
        assert self.identity is not None
        return self.identity


class Patience:
    """Pauses between tries, each longer than the last, up to a total time."""

    def __init__(self) -> None:
        self._end = time.monotonic() + _PATIENCE_SECONDS
        self._pause = _FIRST_PAUSE_SECONDS

    def wait(self) -> bool:
        """Pause; return False at once if the time is over."""
        if time.monotonic() + self._pause > self._end:
            return False
        # Trainers that lost a service together should not come back together.
        time.sleep(self._pause * random.uniform(0.75, 1))  # noqa: S311
        self._pause = min(2 * self._pause, _MAX_PAUSE_SECONDS)
        return True


def open_remote_beton(url: str, token: str | None = None) -> ServedBeton:
    """Open a beton at the first service that has it.

    Args:
        url: grpc+tls://HOST:PORT/NAME; several separated by commas.
        token: for services that ask for one; None for the environment's.

    Raises:
        InvalidValueError: the URL names no beton, or different ones.
        LoadingError: no service has it.
    """
    addresses, credentials = parse_addresses(url), ClientCredentials.find(token)
    names = {address.beton for address in addresses}
    if len(names) > 1 or "" in names:
        raise InvalidValueError(
            f"{url!r} must name one beton at each address, such as "
            "grpc+tls://host:8815/train.beton."
        )
    patience = Patience()
    while True:
        errors: dict[Address, ServiceError] = {}
        for address in addresses:
            try:
                return _fetch(url, address, credentials)
            except ServiceError as error:
                errors[address] = error
        if is_final(errors) or not patience.wait():
            raise unavailable(url, errors)


def is_final(errors: dict[Address, ServiceError]) -> bool:
    """Whether another try is futile, because every service answered and refused."""
    return all(isinstance(error, ServiceRefusedError) for error in errors.values())


def unavailable(name: object, errors: dict[Address, ServiceError]) -> LoadingError:
    """Make the error that names each service, why it cannot be used, and what to do."""
    reasons = "; ".join(f"{address}: {str(error).rstrip('.')}" for address, error in errors.items())
    return LoadingError(
        f"{name} cannot be loaded, because no loading service gives it ({reasons}). Start one "
        "where the beton is, with `fastprune serve BETON --listen ADDRESS`, then resume; a "
        "loader's state_dict also fits one that reads the beton itself."
    )


def _fetch(url: str, address: Address, credentials: ClientCredentials) -> ServedBeton:
    """Open a beton at one service.

    Raises:
        ServiceError: the service does not send its table, or the table contradicts itself.
    """
    from pyarrow import flight

    from fastprune.service.flight_connection import as_service_error, call_options, make_client

    options = call_options(credentials, seconds=_TABLE_SECONDS)
    with make_client(address, credentials, max_bytes=_MAX_MESSAGE_BYTES) as client:
        try:
            reader = client.do_get(flight.Ticket(address.beton.encode()), options)
            if not reader.schema.equals(SCHEMA, check_metadata=False):
                raise ValueError("its columns are others")
            metadata = (reader.schema.metadata or {}).get(METADATA_KEY, b"")
            header = read_message(metadata, TableHeader)
            columns = _read_columns(reader, header.fingerprint.num_rows)
            return _make_beton(url, address, columns, header)
        except (ValueError, ServiceError) as error:
            raise ServiceError(f"its table is not understood ({error})") from error
        except Exception as error:
            raise as_service_error(error) from error


def _read_columns(reader: Any, num_rows: int) -> dict[str, NDArray[Any]]:
    """Read a table of exactly as many rows as its header announced, which bounds the memory.

    Raises:
        ValueError: it has others.
    """
    if num_rows > _MAX_ROWS:
        raise ValueError(f"it has {num_rows:,} rows")
    columns = {field.name: np.empty(num_rows, field.type.to_pandas_dtype()) for field in SCHEMA}
    num_read = 0
    for chunk in reader:
        batch = chunk.data
        batch.validate()
        if num_read + batch.num_rows > num_rows or any(c.null_count for c in batch.columns):
            raise ValueError("it has more rows than announced, or lacks values")
        for name, column in zip(SCHEMA.names, batch.columns, strict=True):
            columns[name][num_read : num_read + batch.num_rows] = column.to_numpy()
        num_read += batch.num_rows
    if num_read < num_rows:
        raise ValueError("it ends too soon")
    return columns


def _make_beton(
    url: str, address: Address, columns: dict[str, NDArray[Any]], header: TableHeader
) -> ServedBeton:
    """Make the beton of a table.

    Raises:
        ValueError: the table contradicts itself.
    """
    labels, widths, heights = (columns[name] for name in ("label", "width", "height"))
    structure, names = structure_digest(labels, widths, heights), header.class_names
    if header.fingerprint.structure != structure:
        raise ValueError("its fingerprint is another one's")
    if labels.min() < 0 or label_faults(labels):
        raise ValueError("a label is not a class")
    if names is not None and int(labels.max()) >= len(names):
        raise ValueError("it has fewer class names than labels")
    return ServedBeton(
        path=Path(f"{address.host}:{address.port}/{address.beton}"),
        labels=labels,
        widths=widths,
        heights=heights,
        modes=np.zeros(len(labels), np.uint8),
        offsets=columns["page"].astype(np.int64) * header.page_bytes,
        sizes=np.zeros(len(labels), np.int64),
        fields=(),
        page_bytes=header.page_bytes,
        content=np.empty(0, np.uint8),
        files=(),
        structure=structure,
        manifest=None,
        url=url,
        service=",".join(map(str, parse_addresses(url))),
        identity=header.fingerprint,
        digest=header.digest,
        names=None if names is None else tuple(names),
        is_labeled=header.has_labels,
    )
