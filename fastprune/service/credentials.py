"""Tokens and certificates: what clients show to services, and what services ask of clients.

Secrets are left out of every representation, error text and log line.
"""

import hmac
import os
import re
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from fastprune.base.errors import InvalidValueError
from fastprune.base.files import read_bytes, read_text
from fastprune.service.address import Address

_TOKEN = re.compile(r"[!-~]{16,1024}")
_MAX_FILE_BYTES = 1 << 20


@dataclass(frozen=True)
class ClientCredentials:
    """Shown by a client to a service.

    Attributes:
        token: sent with each call.
        authorities: PEM, CAs trusted to sign server certificates; None for the system's.
        certificate: PEM, the client's own.
        key: PEM, of that certificate.
    """

    token: str | None = field(default=None, repr=False)
    authorities: bytes | None = field(default=None, repr=False)
    certificate: bytes | None = field(default=None, repr=False)
    key: bytes | None = field(default=None, repr=False)

    @classmethod
    def find(cls, token: str | None) -> Self:
        """Gather the credentials that the environment names.

        FASTPRUNE_SERVICE_TOKEN is the token if none is given. FASTPRUNE_SERVICE_CA,
        FASTPRUNE_SERVICE_CERT and FASTPRUNE_SERVICE_KEY are PEM files.

        Args:
            token: None for the environment's; "" for none.

        Raises:
            InvalidValueError: a file cannot be read, or the token cannot be one.
        """
        if token is None:
            token = os.environ.get("FASTPRUNE_SERVICE_TOKEN")
        authorities, certificate, key = (
            _read_named(f"FASTPRUNE_SERVICE_{name}") for name in ("CA", "CERT", "KEY")
        )
        if (certificate is None) != (key is None):
            raise InvalidValueError(
                "a client certificate needs its key. Set both FASTPRUNE_SERVICE_CERT and "
                "FASTPRUNE_SERVICE_KEY, or neither."
            )
        system = ssl.get_default_verify_paths().cafile
        if authorities is None and system is not None:
            # gRPC brings a list of its own, which lacks the CAs that an administrator added.
            authorities = Path(system).read_bytes()
        return cls(checked_token(token) if token else None, authorities, certificate, key)

    def require_safe(self, address: Address) -> None:
        """Refuse to send a token where others can read it.

        Raises:
            InvalidValueError: the address is plain text and on another machine.
        """
        if self.token and address.scheme == "grpc" and not address.is_loopback:
            raise InvalidValueError(
                f"a token would cross the network to {address} in plain text. Use "
                f"grpc+tls://{address.host}:{address.port}, or leave the token out."
            )


@dataclass(frozen=True)
class ServerCredentials:
    """Certificate of a server, and what it asks of clients.

    Attributes:
        certificate: PEM, the server's, with the chain to its CA.
        key: PEM, of that certificate.
        authorities: PEM, CAs trusted to sign client certificates; None to ask for none.
        tokens: each of which admits a client; empty to ask for none.
        insecure: whether addresses open to everyone are intended.
    """

    certificate: bytes | None = field(default=None, repr=False)
    key: bytes | None = field(default=None, repr=False)
    authorities: bytes | None = field(default=None, repr=False)
    tokens: tuple[str, ...] = field(default=(), repr=False)
    insecure: bool = False

    @classmethod
    def read(
        cls,
        certificate: Path | None,
        key: Path | None,
        authorities: Path | None,
        tokens: Path | None,
        *,
        insecure: bool = False,
    ) -> Self:
        """Read the files.

        Raises:
            InvalidValueError: a file cannot be read or is not PEM, or one is missing that another
                one needs.
        """
        if (certificate is None) != (key is None):
            raise InvalidValueError(
                "a certificate needs its key. Name both --tls-cert and --tls-key, or neither."
            )
        content = [
            None if path is None else _read(path, f"{path} cannot be read: ")
            for path in (certificate, key, authorities)
        ]
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            # Tried here, because gRPC would fail to start without a reason.
            if certificate is not None:
                context.load_cert_chain(certificate, key)
            if authorities is not None:
                context.load_verify_locations(authorities)
        except ssl.SSLError as error:
            raise InvalidValueError(
                f"{certificate}, {key} or {authorities} is not PEM, or they do not belong together "
                f"({error}). Name a certificate, its key and a CA."
            ) from error
        lines = [] if tokens is None else read_tokens(tokens)
        return cls(content[0], content[1], content[2], tuple(lines), insecure)

    def require_closed(self, address: Address) -> None:
        """Refuse an address that would be open to everyone on the network.

        Raises:
            InvalidValueError: it would be, or it lacks its certificate.
        """
        if address.scheme == "grpc+tls" and self.certificate is None:
            raise InvalidValueError(
                f"{address} needs a certificate. Name --tls-cert and --tls-key."
            )
        if address.is_loopback or self.insecure:
            return
        if address.scheme == "grpc":
            raise InvalidValueError(
                f"{address} is plain text that others can read and change. Use "
                f"grpc+tls://{address.host}:{address.port} with --tls-cert and --tls-key, or pass "
                "--insecure on a network that you share with no one."
            )
        if self.authorities is None and not self.tokens:
            raise InvalidValueError(
                f"{address} would serve everyone who reaches it. Ask for a token (--token-file) or "
                "a client certificate (--client-ca), or pass --insecure."
            )

    def accepts(self, headers: Sequence[str]) -> bool:
        """Whether one of a call's authorization headers carries one of the tokens."""
        if not self.tokens:
            return True
        found = False
        for header in headers:
            for token in self.tokens:
                # Every pair is compared, so that the time reveals nothing about the tokens.
                found |= hmac.compare_digest(header.encode(), f"Bearer {token}".encode())
        return found


def read_tokens(path: str | Path) -> list[str]:
    """Read the tokens in a file, one a line.

    Raises:
        InvalidValueError: the file cannot be read, or a line cannot be a token.
    """
    try:
        lines = read_text(path, max_bytes=_MAX_FILE_BYTES).split("\n")
    except (OSError, ValueError) as error:
        raise InvalidValueError(f"the token file {path} cannot be read: {error}.") from error
    tokens = [line.strip() for line in lines if line.strip()]
    if not tokens:
        raise InvalidValueError(f"{path} holds no token. Make one: openssl rand -hex 32 > {path}")
    return [checked_token(token, name=f"a token in {path}") for token in tokens]


def checked_token(token: str, *, name: str = "the service token") -> str:
    """Return a token that can be sent.

    Raises:
        InvalidValueError: it is too short for a secret, or cannot be part of a header.
    """
    # The error text must not show it.
    if not _TOKEN.fullmatch(token):
        raise InvalidValueError(
            f"{name} must be 16 to 1,024 printable ASCII characters without spaces. Make one with: "
            "openssl rand -hex 32"
        )
    return token


def _read_named(variable: str) -> bytes | None:
    """Read the PEM file that an environment variable names."""
    path = os.environ.get(variable)
    return _read(Path(path), f"{variable}={path} cannot be read: ") if path else None


def _read(path: Path, prefix: str) -> bytes:
    try:
        return read_bytes(path, max_bytes=_MAX_FILE_BYTES)
    except (OSError, ValueError) as error:
        raise InvalidValueError(f"{prefix}{error}. Name a PEM file.") from error
