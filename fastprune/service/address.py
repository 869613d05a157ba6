"""Addresses of loading services, and what a client shows them to be let in."""

import ipaddress
import os
import re
import ssl
from dataclasses import dataclass, field
from pathlib import Path

from fastprune.base.errors import InvalidValueError
from fastprune.base.untrusted import read_bytes, read_text
from fastprune.service import wire

_FLIGHT = re.compile(r"(grpc|grpc\+tls)://(\[[0-9a-fA-F:.]+\]|[\w.-]+):(\d{1,5})(?:/(.*))?")
# A comma may be part of a path; the next address begins with a scheme.
_BETWEEN = re.compile(r",\s*(?=unix:|grpc:|grpc\+tls:)")
_TOKEN = re.compile(r"[!-~]{16,1024}")
_MOST_FILE_BYTES = 1 << 20


@dataclass(frozen=True)
class Address:
    """Where a service listens.

    Attributes:
        scheme: "unix", "grpc" (plain text) or "grpc+tls".
        path: of the socket; empty for the other schemes.
        host: a name or an IP address, in brackets if of version 6; empty for "unix".
        port: 0 for "unix".
        beton: the beton named behind the port; empty where none is.
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
        """Whether what is sent there never leaves this machine, for all that the address says."""
        if self.scheme == "unix" or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False


def parse_address(text: str) -> Address:
    """Read one address.

    Raises:
        InvalidValueError: it is none.
    """
    if text.startswith("unix:"):
        return Address("unix", path=wire.socket_path(text))
    found = _FLIGHT.fullmatch(text)
    if found is None or int(found[3]) > 65535:
        raise InvalidValueError(
            f"{text!r} is no address of a loading service. Write unix:PATH, such as "
            "unix:/run/fastprune.sock, or grpc+tls://HOST:PORT for one on another machine."
        )
    return Address(found[1], host=found[2], port=int(found[3]), beton=found[4] or "")


def parse_addresses(text: str) -> tuple[Address, ...]:
    """Read addresses with commas between them.

    Raises:
        InvalidValueError: one of them is none.
    """
    return tuple(parse_address(part) for part in _BETWEEN.split(text.strip()))


def names_remote_beton(beton: object) -> bool:
    """Whether a beton is one that a service has: grpc+tls://HOST:PORT/NAME."""
    return isinstance(beton, str) and beton.startswith(("grpc://", "grpc+tls://"))


@dataclass(frozen=True)
class Credentials:
    """What a client shows a service; no representation of it shows a secret.

    Attributes:
        token: sent with each call.
        authorities: PEM, whose certificates of servers are believed; None for the system's.
        certificate: PEM, the client's own.
        key: PEM, of that certificate.
    """

    token: str | None = field(default=None, repr=False)
    authorities: bytes | None = field(default=None, repr=False)
    certificate: bytes | None = field(default=None, repr=False)
    key: bytes | None = field(default=None, repr=False)

    def require_safe(self, address: Address) -> None:
        """Refuse to send a token where others can read it.

        Raises:
            InvalidValueError: the address is of plain text and of another machine.
        """
        if self.token and address.scheme == "grpc" and not address.is_loopback:
            raise InvalidValueError(
                f"a token would cross the network to {address} in plain text. Use "
                f"grpc+tls://{address.host}:{address.port}, or leave the token out."
            )


def find_credentials(token: str | None) -> Credentials:
    """Gather what the environment names.

    FASTPRUNE_SERVICE_TOKEN is the token where none is given; FASTPRUNE_SERVICE_CA,
    FASTPRUNE_SERVICE_CERT and FASTPRUNE_SERVICE_KEY are PEM files. Without the first of these,
    servers need a certificate that the system believes.

    Args:
        token: None for the environment's, if there is one; "" for none.

    Raises:
        InvalidValueError: a file cannot be read, or the token is none.
    """
    if token is None:
        token = os.environ.get("FASTPRUNE_SERVICE_TOKEN")
    certificate, key = (_pem(f"FASTPRUNE_SERVICE_{name}") for name in ("CERT", "KEY"))
    if (certificate is None) != (key is None):
        raise InvalidValueError(
            "a client certificate needs its key. Set both FASTPRUNE_SERVICE_CERT and "
            "FASTPRUNE_SERVICE_KEY, or neither."
        )
    authorities = _pem("FASTPRUNE_SERVICE_CA")
    system = ssl.get_default_verify_paths().cafile
    if authorities is None and system is not None:
        authorities = Path(system).read_bytes()
    return Credentials(checked_token(token) if token else None, authorities, certificate, key)


def read_token(path: str | Path) -> str:
    """Read a token, the first line of a file.

    Raises:
        InvalidValueError: it cannot be read, or holds no token.
    """
    try:
        text = read_text(path, max_bytes=_MOST_FILE_BYTES)
    except (OSError, ValueError) as error:
        raise InvalidValueError(f"the token file {path} cannot be read: {error}.") from error
    return checked_token(text.strip().partition("\n")[0].strip(), name=f"the token in {path}")


def checked_token(token: str, *, name: str = "the service token") -> str:
    """Return a token that can be sent.

    Raises:
        InvalidValueError: it is too short to be a secret, or cannot be part of a header.
    """
    # The text of the error must not show it.
    if not _TOKEN.fullmatch(token):
        raise InvalidValueError(
            f"{name} must be 16 to 1,024 printable ASCII characters without spaces. Make one with: "
            "openssl rand -hex 32"
        )
    return token


def _pem(variable: str) -> bytes | None:
    """The file that an environment variable names."""
    path = os.environ.get(variable)
    if not path:
        return None
    try:
        return read_bytes(path, max_bytes=_MOST_FILE_BYTES)
    except (OSError, ValueError) as error:
        raise InvalidValueError(f"{variable}={path} cannot be read: {error}.") from error
