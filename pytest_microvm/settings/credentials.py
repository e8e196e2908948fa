"""Credentials: values that the proxy adds to a machine's requests to one host, on their way out.

The machine never holds the value: it gets a placeholder in the variable that its tool expects.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from pytest_microvm.errors import UsageError
from pytest_microvm.settings.secret_values import KINDS, SecretSource, parse_source

Scheme = Literal["bearer", "basic", "raw"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)

_TEXTS = {
    "host": (r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]{1,253})(:[0-9]{1,5})?", "HOST or HOST:PORT"),
    "header": (r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}", "a header's name"),  # token of RFC 9110, 5.6.2
    "query": (r"[A-Za-z0-9._~-]{1,64}", "a query parameter's name"),
    "variable": (r"[A-Za-z_][A-Za-z0-9_]{0,127}", "a variable's name"),
}
# Headers of the connection, the framing or the server, which other code sets.
_NEVER = frozenset(
    [
        *("host", "connection", "content-length", "transfer-encoding", "upgrade", "te", "trailer", "expect"),
        *("keep-alive", "cookie2"),
    ]
)
_KEYS = ("host", "header", "query", "scheme", "value", "variable")
_PAIR = re.compile(rf",(?=(?:{'|'.join((*_KEYS, *KINDS))})=)")
_FORM = '{host = "api.example.com", value = {env = "TOKEN"}, variable = "API_TOKEN"}'


@dataclass(frozen=True)
class CredentialSpec:
    """A credential as configured, without its value.

    Args:
        host: The only host that receives it: ``api.example.com``, or with a port other than 443.
        source: The source of its value.
        header: The request header that carries it; ``None``: none.
        query: The query parameter that carries it; ``None``: none.
        scheme: ``bearer``: ``Bearer VALUE``; ``basic``: the value is ``user:password``; ``raw``: unchanged.
        variable: The variable in which the machine finds a placeholder; ``None``: none.
    """

    host: str
    source: SecretSource
    header: str | None = "Authorization"
    query: str | None = None
    scheme: Scheme = "bearer"
    variable: str | None = None


def parse_credentials(value: object, where: str) -> tuple[CredentialSpec, ...]:
    """Parse a list of credentials, each a table or a text ``host=...,env=...``.

    Args:
        value: The list to parse.
        where: The place that ``value`` comes from, for errors.

    Raises:
        UsageError: One of them is invalid.
    """
    if isinstance(value, (str, Mapping)) or not isinstance(value, (list, tuple)):
        raise UsageError(
            f"{where}: invalid credentials: expected a list, got {type(value).__name__}",
            resolution=f"write [{_FORM}]",
        )
    return tuple(
        each if isinstance(each, CredentialSpec) else parse_credential(each, where) for each in value
    )


def parse_credential(value: object, where: str) -> CredentialSpec:
    """Parse a credential, a table or a text such as ``host=api.example.com,env=TOKEN``.

    Raises:
        UsageError: It is invalid. The error omits input that may be the value itself.
    """
    table = _table(value, where) if isinstance(value, str) else value
    if not isinstance(table, Mapping):
        raise UsageError(
            f"{where}: invalid credential: expected a table or text, got {type(value).__name__}",
            resolution=f"write {_FORM}",
        )
    for key in table:
        if key not in _KEYS:
            raise UsageError(f"{where}: unknown key {key!r}", resolution="known keys: " + ", ".join(_KEYS))
    source = parse_source(table.get("value"), f"{where}: value")
    host = _text(table, "host", where)
    if host is None:
        raise UsageError(
            f"{where}: invalid credential: expected a host, got none", resolution=f"write {_FORM}"
        )
    header, query = _text(table, "header", where), _text(table, "query", where)
    if query is not None and (header is not None or "scheme" in table):
        raise UsageError(
            f"{where}: invalid credential: expected a header or a query parameter, got both",
            resolution="remove query, or header and scheme",
        )
    if header is None and query is None:
        header = "Authorization"
    if header is not None and (header.lower() in _NEVER or header.lower().startswith("proxy-")):
        raise UsageError(
            f"{where}: invalid header: expected one that no connection sets itself, got {header!r}",
            resolution="name the API's own header",
        )
    return CredentialSpec(
        host=host.lower(),
        source=source,
        header=header,
        query=query,
        scheme=_scheme(table.get("scheme"), header, where),
        variable=_text(table, "variable", where),
    )


def _table(text: str, where: str) -> Mapping[str, object]:
    """Parse ``host=...,env=...`` into a table; a comma separates pairs only if a known key follows it."""
    table: dict[str, object] = {}
    for pair in _PAIR.split(text):
        key, equals, value = pair.partition("=")
        if not equals or key not in (*_KEYS, *KINDS) or key == "value" or key in table:
            raise UsageError(
                f"{where}: invalid credential: expected KEY=VALUE,KEY=VALUE, each key once",
                details="the text is not shown, as it may contain the secret",
                resolution="write it like host=api.example.com,env=TOKEN,variable=API_TOKEN",
            )
        table[key] = value
    table["value"] = {kind: table.pop(kind) for kind in KINDS if kind in table}
    return table


def _text(table: Mapping[str, object], key: str, where: str) -> str | None:
    value = table.get(key)
    pattern, expected = _TEXTS[key]
    if value is None:
        return None
    if not isinstance(value, str) or not re.fullmatch(pattern, value, re.ASCII):
        raise UsageError(
            f"{where}: invalid {key}: expected {expected}",
            details="the value is not shown, as it may be a misplaced secret",
            resolution=f"write it like {_FORM}",
        )
    return value


def _scheme(value: object, header: str | None, where: str) -> Scheme:
    if value is None:
        return "bearer" if header is not None and header.lower() == "authorization" else "raw"
    for known in SCHEMES:
        if value == known:
            return known
    raise UsageError(
        f"{where}: invalid scheme: expected one of {', '.join(SCHEMES)}, got {value!r}",
        resolution="write one of these",
    )
