"""Credentials: how they are written, and what the proxy adds to requests so that a guest never holds them."""

from __future__ import annotations

import base64
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args
from urllib.parse import quote, unquote_plus

from pytest_microvm.errors import UsageError
from pytest_microvm.network.hosts import canonical_host
from pytest_microvm.network.matching import PORTS
from pytest_microvm.network.refusal import Refused
from pytest_microvm.secret_values import KINDS, SecretValue, Source, parse_source

if TYPE_CHECKING:  # credentials are parsed where nothing is sent
    from pytest_microvm.network.heads import Asked, Origin

Scheme = Literal["bearer", "basic", "raw"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
MIN_LENGTH = 4
"""Characters of the shortest value: a shorter one could not be taken out of what a server sends back."""

_KEYS = ("host", "value", "header", "query", "scheme", "variable")
_PAIR = re.compile(rf",(?=(?:{'|'.join((*_KEYS, *KINDS))})=)")
_HOST = re.compile(r"(\[[^\]]*\]|[^:]+)(?::([0-9]{1,5}))?")
_HEADER = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,100}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,200}")
_PARAMETER = re.compile(r"[A-Za-z0-9._~\[\]-]{1,100}")
_VALUE = re.compile(r"[!-~](?:[ -~]*[!-~])?")
# They are about the connection, the framing or the server, which is decided elsewhere.
_FORBIDDEN = frozenset(
    ("host", "connection", "content-length", "transfer-encoding", "upgrade", "te", "trailer", "expect")
)
# A part of a response, or a compressed one, cannot be searched for what it must not hold.
_UNSEARCHABLE = frozenset(
    (b"accept-encoding", b"range", b"if-range", b"sec-websocket-extensions", b"a-im", b"te")
)


@dataclass(frozen=True)
class Credential:
    """A value that the proxy adds to requests to one host.

    Args:
        host: The only host it goes to.
        port: Its only port; ``None``: 443.
        value: The value, as it was found.
        header: The header it goes into.
        query: Or the parameter of the query.
        scheme: How the header is written: ``Bearer VALUE``, ``Basic`` with the value (``user:password``)
            encoded, or as it is.
        variable: The variable of the guest in which programs look for it.
        placeholder: What that variable holds instead; empty before a machine has one.
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
        """Return the same with a placeholder for one machine, made up anew."""
        return replace(self, placeholder=f"microvm-placeholder-{secrets.token_hex(12)}")

    def covers(self, origin: Origin) -> bool:
        """Tell whether it goes to a server, over TLS."""
        return origin.host == self.host and origin.port == (self.port or PORTS["https"])

    @property
    def sent(self) -> str:
        """What is sent for it, in the header or the query."""
        value = self.value.reveal()
        if self.query is not None:
            return quote(value, safe="")
        if self.scheme == "basic":
            return "Basic " + base64.b64encode(value.encode()).decode()
        return f"Bearer {value}" if self.scheme == "bearer" else value

    def added_to(self, asked: Asked) -> Asked:
        """Return a request with the value in it; what the guest wrote in its place is dropped."""
        if self.query is not None:
            pairs = [pair for pair in asked.query[1:].split("&") if pair and not self._is_parameter(pair)]
            return replace(asked, query="?" + "&".join([*pairs, f"{self.query}={self.sent}"]))
        assert self.header is not None
        name = self.header.encode("ascii")
        others = [pair for pair in asked.headers if pair[0].lower() != name.lower()]
        return replace(asked, headers=(*others, (name, self.sent.encode("ascii"))))

    def _is_parameter(self, pair: str) -> bool:
        return unquote_plus(pair.partition("=")[0]) == self.query


@dataclass(frozen=True)
class CredentialSpec:
    """A credential as it was written: where its value is, and not the value.

    Args:
        host: See :class:`Credential`, as for all others.
        port: Its only port.
        source: Where the value is found.
        header: The header.
        query: The parameter.
        scheme: How the header is written.
        variable: The variable of the guest.
    """

    host: str
    port: int | None
    source: Source
    header: str | None
    query: str | None
    scheme: Scheme
    variable: str | None

    def resolve(self) -> Credential:
        """Read the value.

        Raises:
            UsageError: There is none, or it cannot be sent.
        """
        name = f"credential for {self.host}"
        value = self.source.read(name)
        text = value.reveal()
        if not _VALUE.fullmatch(text) or len(text) < MIN_LENGTH:
            raise UsageError(
                f"{name}: what {self.source} gives cannot be sent",
                details=f"it has fewer than {MIN_LENGTH} characters, or others than printable ASCII",
            )
        if self.scheme == "basic" and ":" not in text:
            raise UsageError(
                f"{name}: what {self.source} gives is no user:password",
                resolution='scheme = "basic" needs both, with a colon between them',
            )
        return Credential(self.host, self.port, value, self.header, self.query, self.scheme, self.variable)


def parse_credential(value: object, where: str) -> CredentialSpec:
    """Return the credential that was written.

    Args:
        value: A table such as ``{host = "api.example.com", value = {env = "TOKEN"}}``, or text such as
            ``host=api.example.com,env=TOKEN,variable=API_TOKEN``.
        where: What it was written in, for errors.

    Raises:
        UsageError: It is none.
    """
    table = _table(value, where)
    if unknown := sorted(set(table) - set(_KEYS)):
        raise _wrong(where, f"unknown key {unknown[0]!r}", f"the keys are {', '.join(_KEYS)}")
    if "host" not in table or "value" not in table:
        raise _wrong(where, "a host and a value are needed", "")
    for key in ("host", "header", "query", "scheme", "variable"):
        if not isinstance(table.get(key, "x"), str):
            raise _wrong(where, f"{key} is not text", "")
    header, query, scheme = _place(table, where)
    variable = table.get("variable")
    if variable is not None and not _VARIABLE.fullmatch(str(variable)):
        raise _wrong(where, "variable is no variable's name", "")
    host, port = _host(str(table["host"]), where)
    source = parse_source(table["value"], where)
    return CredentialSpec(
        host, port, source, header, query, scheme, None if variable is None else str(variable)
    )


def for_request(credentials: Iterable[Credential], asked: Asked) -> tuple[Credential, ...]:
    """Return the credentials that go with a request.

    Raises:
        Refused: There are some for its host, and it would show them to everybody on the way.
    """
    origin = asked.origin
    if origin.scheme == "https":
        return tuple(credential for credential in credentials if credential.covers(origin))
    if any(each.host == origin.host and each.port in (None, origin.port) for each in credentials):
        raise Refused(403, f"{origin.host} has a credential, which goes over TLS only: use https")
    return ()


def with_credentials(asked: Asked, credentials: tuple[Credential, ...]) -> Asked:
    """Return a request as it goes out: with the credentials, and asking for what can be searched for them."""
    if not credentials:
        return asked
    headers = tuple(pair for pair in asked.headers if pair[0].lower() not in _UNSEARCHABLE)
    asked = replace(asked, headers=(*headers, (b"Accept-Encoding", b"identity")))
    for credential in credentials:
        asked = credential.added_to(asked)
    return asked


def _table(value: object, where: str) -> dict[str, object]:
    if isinstance(value, Mapping):
        return {str(key): item for key, item in value.items()}
    if not isinstance(value, str):
        raise _wrong(where, "it is neither a table nor text", "")
    table: dict[str, object] = {}
    for pair in _PAIR.split(value):
        key, equals, text = pair.partition("=")
        key = key.strip()
        if not equals or key not in (*_KEYS, *KINDS) or key == "value" or key in table:
            # What was written is not shown: it may be the secret itself.
            raise _wrong(where, "it is not a list of key=value, each key once", "")
        table[key] = text
    found = [kind for kind in KINDS if kind in table]
    if len(found) != 1:
        raise _wrong(where, f"one of {', '.join(KINDS)} must say where the value is", "")
    table["value"] = {found[0]: table.pop(found[0])}
    return table


def _host(text: str, where: str) -> tuple[str, int | None]:
    found = _HOST.fullmatch(text.strip())
    port = int(found[2]) if found and found[2] else None
    try:
        if found and (port is None or 0 < port < 65536):  # noqa: PLR2004 - the ports there are
            return canonical_host(found[1]), port
    except ValueError as error:
        raise _wrong(where, f"its host is none: {error}", "") from None
    raise _wrong(where, "its host is neither HOST nor HOST:PORT", "")


def _place(table: Mapping[str, object], where: str) -> tuple[str | None, str | None, Scheme]:
    """Return where the value goes: a header or a parameter, and how it is written."""
    header, query = table.get("header"), table.get("query")
    default = "bearer" if header is None or str(header).lower() == "authorization" else "raw"
    scheme = next((known for known in SCHEMES if known == table.get("scheme", default)), None)
    if scheme is None:
        raise _wrong(where, "there is no such scheme", f"the schemes are {', '.join(SCHEMES)}")
    if query is not None:
        if header is not None or "scheme" in table:
            raise _wrong(where, "it goes either into a header or into the query", "write one of both")
        if not _PARAMETER.fullmatch(str(query)):
            raise _wrong(where, "query is no parameter's name", "")
        return None, str(query), "raw"
    name = "Authorization" if header is None else str(header)
    if not _HEADER.fullmatch(name) or name.lower() in _FORBIDDEN or name.lower().startswith("proxy-"):
        raise _wrong(where, "header is no header's name that could be added", "")
    return name, None, scheme


def _wrong(where: str, why: str, resolution: str) -> UsageError:
    example = 'write {host = "api.example.com", value = {env = "TOKEN"}}, or host=api.example.com,env=TOKEN'
    return UsageError(f"{where}: this is no credential: {why}", resolution=resolution or example)
