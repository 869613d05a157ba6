"""Who may come in at an address that other machines reach."""

import hmac
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from fastprune.base.errors import InvalidValueError
from fastprune.base.untrusted import read_bytes, read_text
from fastprune.service.address import Address, checked_token

_MOST_FILE_BYTES = 1 << 20


@dataclass(frozen=True)
class Locks:
    """Certificates and tokens of a server; no representation of it shows a secret.

    Attributes:
        certificate: PEM, the server's, with the chain to its authority.
        key: PEM, of that certificate.
        authorities: PEM, whose certificates of clients are believed; None to ask for none.
        tokens: any of which lets a client in; empty to ask for none.
        insecure: whether what is open to others was meant so.
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
        """Read the files that hold them.

        Raises:
            InvalidValueError: a file cannot be read or is no certificate, or one is missing that
                another one needs.
        """
        if (certificate is None) != (key is None):
            raise InvalidValueError(
                "a certificate needs its key. Name both --tls-cert and --tls-key, or neither."
            )
        read = [None if p is None else _read(p) for p in (certificate, key, authorities)]
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            # gRPC would start no server, and not say why.
            if certificate is not None:
                context.load_cert_chain(certificate, key)
            if authorities is not None:
                context.load_verify_locations(authorities)
        except ssl.SSLError as error:
            raise InvalidValueError(
                f"{certificate}, {key} or {authorities} is not PEM, or they do not belong together "
                f"({error}). Name a certificate, its key and an authority."
            ) from error
        return cls(read[0], read[1], read[2], _read_tokens(tokens), insecure)

    def require_closed(self, address: Address) -> None:
        """Refuse an address that would be open to anybody on the network.

        Raises:
            InvalidValueError: it would be, or lacks its certificate.
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
                f"grpc+tls://{address.host}:{address.port} with --tls-cert and --tls-key, or say "
                "--insecure on a network where nobody else is."
            )
        if self.authorities is None and not self.tokens:
            raise InvalidValueError(
                f"{address} would serve whoever reaches it. Ask for a token (--token-file) or a "
                "client certificate (--client-ca), or say --insecure."
            )

    def fits(self, headers: Sequence[str]) -> bool:
        """Whether one of a call's authorization headers has one of the tokens."""
        if not self.tokens:
            return True
        found = False
        for header in headers:
            for token in self.tokens:
                # Every pair is compared, in a time that depends on no content.
                found |= hmac.compare_digest(header.encode(), f"Bearer {token}".encode())
        return found


def _read_tokens(path: Path | None) -> tuple[str, ...]:
    """The tokens in a file, one in a line."""
    if path is None:
        return ()
    try:
        lines = read_text(path, max_bytes=_MOST_FILE_BYTES).split()
    except (OSError, ValueError) as error:
        raise InvalidValueError(f"--token-file {path} cannot be read: {error}.") from error
    if not lines:
        raise InvalidValueError(f"{path} holds no token. Make one: openssl rand -hex 32 > {path}")
    return tuple(checked_token(line, name=f"a token in {path}") for line in lines)


def _read(path: Path) -> bytes:
    try:
        return read_bytes(path, max_bytes=_MOST_FILE_BYTES)
    except (OSError, ValueError) as error:
        raise InvalidValueError(f"{path} cannot be read: {error}. Name a PEM file.") from error
