"""Redact credentials in responses, so that a guest cannot read them when a server echoes them.

A replacement is as long as the value, so that announced lengths stay valid.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable

from pytest_microvm.network.proxy.credentials import Credential
from pytest_microvm.network.proxy.refusal import Refused
from pytest_microvm.untrusted.redaction import RedactedStream, Redactor

# Allowed values of headers that describe the encoding of the body.
_SEARCHABLE = {
    b"content-encoding": (b"", b"identity"),
    b"transfer-encoding": (b"", b"identity", b"chunked"),
    b"sec-websocket-extensions": (b"",),
}


class Echoes:
    """Redactor of credentials in one response.

    Args:
        credentials: The credentials sent with the request.
    """

    def __init__(self, credentials: Iterable[Credential]) -> None:
        values = {value for credential in credentials for value in _values(credential)}
        self._redactor = Redactor(values, keep_length=True)
        self._stream = RedactedStream(self._redactor)

    def __bool__(self) -> bool:
        return bool(self._redactor)

    def blanked(self, text: bytes) -> bytes:
        """Return a complete text, such as a header's value, with the credentials redacted."""
        return self._redactor.raw(text)

    def feed(self, data: bytes) -> bytes:
        """Return the redacted bytes to forward after ``data``; for b"" (the end), the held-back rest."""
        if not self:
            return data
        return self._stream.feed(data) if data else self._stream.end()

    def check(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Reject a response or WebSocket that cannot be searched.

        Raises:
            Refused: It is compressed, which the request did not ask for.
        """
        if self:
            for name, value in headers:
                allowed = _SEARCHABLE.get(name.lower())
                if allowed is not None and value.lower() not in allowed:
                    raise Refused(502, "the response is compressed, so its credential could be hidden in it")


def _values(credential: Credential) -> set[str]:
    value = credential.value.reveal()
    found = {value, credential.sent}
    if credential.scheme == "basic":
        found |= {value.partition(":")[2], base64.b64encode(value.encode()).decode()}
    return found
