"""Credentials that the proxy adds to requests to one host, so that a guest never holds them."""

from __future__ import annotations

import base64
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote_plus

from pytest_microvm.errors import UsageError
from pytest_microvm.network.policy.hosts import canonical_host
from pytest_microvm.network.policy.matching import PORTS
from pytest_microvm.network.proxy.refusal import Refused
from pytest_microvm.settings.credentials import CredentialSpec, Scheme
from pytest_microvm.settings.secret_values import SecretValue
from pytest_microvm.untrusted.redaction import MIN_LENGTH

if TYPE_CHECKING:  # credentials are resolved where nothing is sent
    from pytest_microvm.network.proxy.heads import Origin, RequestHead

_HOST = re.compile(r"(\[[^\]]*\]|[^:]+)(?::([0-9]{1,5}))?")
_VALUE = re.compile(r"[!-~](?:[ -~]*[!-~])?")
# Partial or compressed responses cannot be searched for credentials.
_UNSEARCHABLE = frozenset((b"accept_encoding", b"range", b"if_range", b"sec_websocket_extensions", b"a_im"))


@dataclass(frozen=True)
class Credential:
    """A secret value that the proxy adds to requests to one host.

    Args:
        host: The only host that gets the value.
        port: The host's only port; ``None``: 443.
        value: The value, as read from its source.
        header: The header that carries the value.
        query: The query parameter that carries it instead.
        scheme: The format of the header: ``Bearer VALUE``, ``Basic`` with the value (``user:password``)
            encoded, or the plain value.
        variable: The environment variable in which the guest's programs look for the value.
        placeholder: The content of that variable in the guest; empty before a machine has one.
    """

    host: str
    port: int | None
    value: SecretValue
    header: str | None
    query: str | None
    scheme: Scheme
    variable: str | None
    placeholder: str = ""

    def for_machine(self) -> Credential:
        """Return a copy with a new random placeholder for one machine."""
        return replace(self, placeholder=f"microvm-placeholder-{secrets.token_hex(12)}")

    def covers(self, origin: Origin) -> bool:
        """Return True if the credential is meant for a server, over TLS."""
        return origin.host == self.host and origin.port == (self.port or PORTS["https"])

    @property
    def sent(self) -> str:
        """The encoded value for the header or the query."""
        value = self.value.reveal()
        if self.query is not None:
            return quote(value, safe="")
        if self.scheme == "basic":
            return "Basic " + base64.b64encode(value.encode()).decode()
        return f"Bearer {value}" if self.scheme == "bearer" else value

    def added_to(self, asked: RequestHead) -> RequestHead:
        """Return a request with the value added, replacing the guest's own header or parameter."""
        if self.query is not None:
            pairs = [kept for pair in asked.query[1:].split("&") if (kept := self._without(pair))]
            return replace(asked, query="?" + "&".join([*pairs, f"{self.query}={self.sent}"]))
        assert self.header is not None
        name = self.header.encode("ascii")
        others = [pair for pair in asked.headers if _as_servers_read(pair[0]) != _as_servers_read(name)]
        return replace(asked, headers=(*others, (name, self.sent.encode("ascii"))))

    def _without(self, pair: str) -> str:
        """Remove the credential's parameter from a part of a query between two ``&``.

        Some servers also split at ``;``, and some ignore case.
        """
        assert self.query is not None
        parts = pair.split(";")
        mine = [unquote_plus(part.partition("=")[0]).lower() == self.query.lower() for part in parts]
        return ";".join(part for part, is_mine in zip(parts, mine, strict=True) if not is_mine)


def resolve_credential(spec: CredentialSpec, project: Path | None = None) -> Credential:
    """Read a credential's value from its source and return the credential.

    Args:
        spec: The credential as configured.
        project: The folder from which a command that prints the value may not use any files.

    Raises:
        UsageError: There is no value, it cannot be sent, or the host is invalid.
    """
    name = f"credential for {spec.host}"
    host, port = credential_host(spec)
    value = spec.source.read(name, project)
    text = value.reveal()
    # Shorter values cannot be redacted from arbitrary responses.
    if not _VALUE.fullmatch(text) or len(text) < MIN_LENGTH:
        raise UsageError(
            f"{name}: what {spec.source} gives cannot be sent",
            details=f"it has fewer than {MIN_LENGTH} characters, or others than printable ASCII",
        )
    if spec.scheme == "basic" and ":" not in text:
        raise UsageError(
            f"{name}: what {spec.source} gives is no user:password",
            resolution='scheme = "basic" needs both, with a colon between them',
        )
    return Credential(host, port, value, spec.header, spec.query, spec.scheme, spec.variable)


def for_request(credentials: Iterable[Credential], asked: RequestHead) -> tuple[Credential, ...]:
    """Return the credentials that go with a request.

    Raises:
        Refused: The host has a credential, and the request would send it unencrypted.
    """
    origin = asked.origin
    if origin.scheme == "https":
        return tuple(credential for credential in credentials if credential.covers(origin))
    if any(each.host == origin.host and each.port in (None, origin.port) for each in credentials):
        raise Refused(403, needs_tls(origin.host))
    return ()


def needs_tls(host: str) -> str:
    """Return the reason for refusing an unencrypted request to a host that has a credential."""
    return f"{host} has a credential, which goes over TLS only: use https"


def with_credentials(asked: RequestHead, credentials: tuple[Credential, ...]) -> RequestHead:
    """Return a request with its credentials, and with headers that request a searchable response."""
    if not credentials:
        return asked
    headers = tuple(pair for pair in asked.headers if _as_servers_read(pair[0]) not in _UNSEARCHABLE)
    asked = replace(asked, headers=(*headers, (b"Accept-Encoding", b"identity")))
    for credential in credentials:
        asked = credential.added_to(asked)
    return asked


def _as_servers_read(header: bytes) -> bytes:
    """Normalize a header's name as CGI and WSGI do: ``X_Key`` equals ``X-Key`` (RFC 3875, 4.1)."""
    return header.lower().replace(b"-", b"_")


def credential_host(spec: CredentialSpec) -> tuple[str, int | None]:
    """Return a credential's host, and its port or ``None`` for 443.

    Raises:
        UsageError: The host or port is invalid.
    """
    text, name = spec.host, f"credential for {spec.host}"
    found = _HOST.fullmatch(text)
    port = int(found[2]) if found and found[2] else None
    try:
        if found and (port is None or 0 < port < 65536):  # noqa: PLR2004 - the range of ports
            return canonical_host(found[1]), port
    except ValueError as error:
        raise UsageError(f"{name}: {text} is no host: {error}") from None
    raise UsageError(f"{name}: {text} is no host", resolution="write HOST or HOST:PORT")
