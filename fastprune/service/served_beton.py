"""A beton that a loading service has and this machine has not: its columns, without its images."""

import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fastprune.base.checks import MAX_CLASSES
from fastprune.base.errors import InvalidValueError, LoadingError
from fastprune.base.provenance import Fingerprint, structure_digest
from fastprune.base.untrusted import member, parse_json
from fastprune.beton.beton import Beton
from fastprune.beton.row_check import label_faults
from fastprune.service.address import (
    Address,
    Credentials,
    find_credentials,
    parse_addresses,
)
from fastprune.service.wire import ServiceError, ServiceRefusedError

#: One row's line in the table of a beton; `page` is where in the file it lies.
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
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.25, 4.0
_INFO_SECONDS, _TABLE_SECONDS = 10.0, 60.0
_MOST_MESSAGE_BYTES = 64 << 20  # the names of a million classes
_MOST_ROWS = 1 << 28


@dataclass(frozen=True, eq=False, repr=False)
class RemoteBeton(Beton):
    """A beton whose images stay with the services that have it; they decode all views.

    Attributes:
        url: as it was named.
        addresses: of the services.
        identity: fingerprint of the images, with the content.
        digest: what the services know the stored images by.
        names: of the classes.
        is_labeled: whether the labels are classes.
    """

    url: str = ""
    addresses: tuple[Address, ...] = ()
    identity: Fingerprint | None = None
    digest: str = ""
    names: tuple[str, ...] | None = None
    is_labeled: bool = True

    def __reduce__(self) -> tuple[Any, ...]:
        # Opened anew, with the token of the environment: none is written anywhere.
        return open_remote_beton, (self.url,)

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
    """Pauses between tries, longer each time, until it is over."""

    def __init__(self) -> None:
        self._end = time.monotonic() + _PATIENCE_SECONDS
        self._pause = _FIRST_PAUSE_SECONDS

    def wait(self) -> bool:
        """Pause; False at once when it is over."""
        if time.monotonic() + self._pause > self._end:
            return False
        # Trainers that lost a service together do not come back together.
        time.sleep(self._pause * random.uniform(0.75, 1))  # noqa: S311
        self._pause = min(2 * self._pause, _LONGEST_PAUSE_SECONDS)
        return True


def open_remote_beton(url: str, token: str | None = None) -> RemoteBeton:
    """Fetch labels, sizes and class names of a beton, from the first service that has it.

    Args:
        url: grpc+tls://HOST:PORT/NAME; several with commas between them.
        token: for services that ask for one; None for the environment's.

    Raises:
        InvalidValueError: the URL names no beton, or different ones.
        LoadingError: no service gives it.
    """
    addresses, credentials = parse_addresses(url), find_credentials(token)
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
                return _fetched(url, addresses, address, credentials)
            except ServiceError as error:
                errors[address] = error
        are_final = all(isinstance(error, ServiceRefusedError) for error in errors.values())
        if are_final or not patience.wait():
            raise unavailable(url, errors)


def unavailable(name: object, errors: dict[Address, ServiceError]) -> LoadingError:
    """Say that no service can be used, why each cannot, and what to do."""
    reasons = "; ".join(f"{address}: {str(error).rstrip('.')}" for address, error in errors.items())
    return LoadingError(
        f"{name} cannot be loaded, for no loading service gives it ({reasons}). Start one where "
        "the beton is, with `fastprune serve BETON --listen ADDRESS`, then resume; a loader's "
        "state_dict also fits one that reads the beton itself."
    )


def _fetched(
    url: str, addresses: tuple[Address, ...], address: Address, credentials: Credentials
) -> RemoteBeton:
    """Open a beton at one service.

    Raises:
        ServiceError: it does not give it, or what it gives is none.
    """
    from pyarrow import flight

    from fastprune.service.flight_session import call_options, connect, lost

    options = [call_options(credentials, seconds=s) for s in (_INFO_SECONDS, _TABLE_SECONDS)]
    descriptor = flight.FlightDescriptor.for_path(address.beton)
    with connect(address, credentials, most_bytes=_MOST_MESSAGE_BYTES) as client:
        try:
            info = client.get_flight_info(descriptor, options[0])
            if not 0 < info.total_records <= _MOST_ROWS or len(info.endpoints) != 1:
                raise ServiceError("its table is not understood")
            reader = client.do_get(info.endpoints[0].ticket, options[1])
            columns, metadata = _columns(reader, info.total_records)
        except ServiceError:
            raise
        except Exception as error:
            raise lost(error) from error
    try:
        return _beton(url, addresses, address, columns, parse_json(metadata))
    except ValueError as error:
        raise ServiceError(f"its table is not understood ({error})") from error


def _columns(reader: Any, num_rows: int) -> tuple[dict[str, NDArray[Any]], bytes]:
    """Read the table as arrays, of as many rows as were announced and not one more."""
    if not reader.schema.equals(SCHEMA, check_metadata=False):
        raise ServiceError("its table is not understood")
    columns = {field.name: np.empty(num_rows, field.type.to_pandas_dtype()) for field in SCHEMA}
    num_read = 0
    for chunk in reader:
        batch = chunk.data
        batch.validate()
        if num_read + batch.num_rows > num_rows or any(c.null_count for c in batch.columns):
            raise ServiceError("its table is not understood")
        for name, column in zip(SCHEMA.names, batch.columns, strict=True):
            columns[name][num_read : num_read + batch.num_rows] = column.to_numpy()
        num_read += batch.num_rows
    if num_read < num_rows:
        raise ServiceError("its table ends too soon")
    return columns, (reader.schema.metadata or {}).get(METADATA_KEY, b"")


def _beton(
    url: str,
    addresses: tuple[Address, ...],
    address: Address,
    columns: dict[str, NDArray[Any]],
    fields: Any,
) -> RemoteBeton:
    """Make the beton of what a service says of it.

    Raises:
        ValueError: it contradicts itself.
    """
    labels, widths, heights = (columns[name] for name in ("label", "width", "height"))
    identity = Fingerprint.from_dict(member(fields, "fingerprint", dict))
    names = member(fields, "class_names", list, None)
    structure = structure_digest(labels, widths, heights)
    if identity.structure != structure or identity.num_rows != len(labels):
        raise ValueError("its fingerprint is another one's")
    if labels.min() < 0 or label_faults(labels):
        raise ValueError("a label is no class")
    if names is not None and not int(labels.max()) < len(names) <= MAX_CLASSES:
        raise ValueError("its classes are not those of its labels")
    page_bytes = member(fields, "page_bytes", int)
    if not 0 < page_bytes < 2**31:
        raise ValueError(f"its pages are of {page_bytes} bytes")
    return RemoteBeton(
        path=Path(f"{address.host}:{address.port}/{address.beton}"),
        labels=labels,
        widths=widths,
        heights=heights,
        modes=np.zeros(len(labels), np.uint8),
        offsets=columns["page"].astype(np.int64) * page_bytes,
        sizes=np.zeros(len(labels), np.int64),
        fields=(),
        page_bytes=page_bytes,
        content=np.empty(0, np.uint8),
        files=(),
        structure=structure,
        manifest=None,
        service=",".join(map(str, addresses)),
        url=url,
        addresses=addresses,
        identity=identity,
        digest=member(fields, "digest", str),
        names=None if names is None else tuple(map(str, names)),
        is_labeled=member(fields, "has_labels", bool),
    )
