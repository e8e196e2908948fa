"""Keep a guest from reading its credentials in what servers send back: the values are blanked out.

What replaces a value is as long as it is, so that lengths that were announced stay true.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable

from pytest_microvm.network.proxy.credentials import Credential
from pytest_microvm.network.proxy.refusal import Refused
from pytest_microvm.untrusted.redaction import RedactedStream, Redactor

# Values of headers that say how what follows is encoded.
_SEARCHABLE = {
    b"content-encoding": (b"", b"identity"),
    b"transfer-encoding": (b"", b"identity", b"chunked"),
    b"sec-websocket-extensions": (b"",),
}


class Echoes:
    """Blanks credentials out of one response.

    Args:
        credentials: Those that went with the request.
    """

    def __init__(self, credentials: Iterable[Credential]) -> None:
        values = {value for credential in credentials for value in _values(credential)}
        self._redactor = Redactor(values, keep_length=True)
        self._stream = RedactedStream(self._redactor)

    def __bool__(self) -> bool:
        return bool(self._redactor)

    def blanked(self, text: bytes) -> bytes:
        """Return a text that is all there (a header's value) without the values."""
        return self._redactor.raw(text)

    def feed(self, data: bytes) -> bytes:
        """Return what can be sent on now that ``data`` came; at the end (none) what was held back."""
        if not self:
            return data
        return self._stream.feed(data) if data else self._stream.end()

    def check(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Refuse a response, or a WebSocket, that cannot be searched.

        Raises:
            Refused: It is compressed, although that was not asked for.
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
