"""Asking a running service what it does."""

import socket
from typing import Any

from fastprune.service import wire
from fastprune.service.address import Address, Credentials, find_credentials, parse_address
from fastprune.service.wire import Kind, ServiceError

_SECONDS = 10.0


def ask_status(address: str, *, token: str | None = None) -> dict[str, Any]:
    """What a running service does; see `desk.Desk.status`.

    Args:
        address: of the service.
        token: for one that asks for a token; None for the environment's.

    Raises:
        InvalidValueError: it is no address.
        ServiceError: nobody answers.
    """
    parsed = parse_address(address)
    if parsed.scheme == "unix":
        return _ask_unix(parsed)
    return _ask_flight(parsed, find_credentials(token))


def _ask_unix(address: Address) -> dict[str, Any]:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_SECONDS)
        try:
            connection.connect(address.path)
            connection.sendall(wire.frame(Kind.STATUS))
            with connection.makefile("rb") as incoming:
                header = incoming.read(wire.HEADER.size)
                if len(header) == wire.HEADER.size:
                    kind, length = wire.HEADER.unpack(header)
                    if kind == Kind.STATUS and length <= wire.most_bytes(kind):
                        return wire.read_json(incoming.read(length))
        except OSError as error:
            raise ServiceError(f"no service answers at {address}: {error}.") from error
    raise ServiceError(f"what listens at {address} is no loading service.")


def _ask_flight(address: Address, credentials: Credentials) -> dict[str, Any]:
    from fastprune.service.flight_session import call_options, connect, lost

    with connect(address, credentials, most_bytes=wire.most_bytes(Kind.STATUS)) as client:
        try:
            results = list(client.do_action("status", call_options(credentials, seconds=_SECONDS)))
        except Exception as error:
            raise ServiceError(f"no service answers at {address}: {lost(error)}.") from error
    return wire.read_json(results[0].body.to_pybytes() if results else b"")
