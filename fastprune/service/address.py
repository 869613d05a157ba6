"""Addresses of loading services: unix:PATH, grpc://HOST:PORT and grpc+tls://HOST:PORT[/BETON]."""

import ipaddress
import re
from dataclasses import dataclass

from fastprune.base.errors import InvalidValueError

_FLIGHT = re.compile(r"(grpc|grpc\+tls)://(\[[0-9a-fA-F:.]+\]|[\w.-]+):(\d{1,5})(?:/(.*))?")
# A path may contain commas; the next address begins with a scheme.
_SEPARATOR = re.compile(r",\s*(?=unix:|grpc:|grpc\+tls:)")
_MAX_SOCKET_PATH_BYTES = 107  # sun_path holds 108 with the final zero


@dataclass(frozen=True)
class Address:
    """Where a service listens.

    Attributes:
        scheme: "unix", "grpc" (plain text) or "grpc+tls".
        path: of the socket; "" for the other schemes.
        host: a name or an IP address, in brackets if version 6; "" for "unix".
        port: 0 for "unix".
        beton: the beton named behind the port; "" if none is.
    """

    scheme: str
    path: str = ""
    host: str = ""
    port: int = 0
    beton: str = ""

    def __str__(self) -> str:
        if self.scheme == "unix":
            return f"unix:{self.path}"
        return f"{self.scheme}://{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether nothing sent there can leave this machine, judged by the address alone."""
        if self.scheme == "unix" or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False


def parse_address(text: str) -> Address:
    """Parse one address.

    Raises:
        InvalidValueError: it has another form, or a path too long for a socket.
    """
    scheme, _, path = text.partition(":")
    if scheme == "unix" and path:
        if len(path.encode()) > _MAX_SOCKET_PATH_BYTES:
            raise InvalidValueError(
                f"{path} is too long for a socket ({len(path.encode())} bytes, at most "
                f"{_MAX_SOCKET_PATH_BYTES}). Use a shorter path."
            )
        return Address("unix", path=path)
    found = _FLIGHT.fullmatch(text)
    if found is None or int(found[3]) > 65535:
        raise InvalidValueError(
            f"{text!r} is not an address of a loading service. Write unix:PATH, such as "
            "unix:/run/fastprune.sock, or grpc+tls://HOST:PORT for one on another machine."
        )
    return Address(found[1], host=found[2], port=int(found[3]), beton=found[4] or "")


def parse_addresses(text: str) -> tuple[Address, ...]:
    """Parse addresses separated by commas; raises as `parse_address`."""
    return tuple(parse_address(part) for part in _SEPARATOR.split(text.strip()))
