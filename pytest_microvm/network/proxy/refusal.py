"""Refused and failed requests, with the reason as an HTTP response and as a log line."""

from __future__ import annotations

import re
from http import HTTPStatus

_NO_HEADER = re.compile(r"[^ -~]")
_LONGEST = 500  # characters of a reason in a header


class Refused(Exception):
    """A request is not forwarded, or its server cannot be reached.

    Args:
        status: The HTTP status of the response; 502 if the request was allowed and the server failed.
        reason: The reason for people, in one line.
        rule: The rule that decided.
        allow: The rule for ``network`` that would allow the request; empty if none would.
    """

    def __init__(self, status: int, reason: str, rule: str | None = None, allow: str = "") -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.rule = rule
        self.allow = allow

    @property
    def denied(self) -> bool:
        """True if the proxy refused the request; False if it was allowed and failed."""
        return self.status != HTTPStatus.BAD_GATEWAY

    def response(self) -> bytes:
        """Return the complete response, after which the connection ends."""
        line = f"microvm: {'denied' if self.denied else 'failed'}: {self.reason}"
        text = f"{line}\n"
        if self.allow:
            text += f'To allow it, on the host: network = ["{self.allow}"]\n'
        content = text.encode(errors="replace")
        # For a refused tunnel, most programs show only the reason phrase.
        phrase = _NO_HEADER.sub("?", line)[:_LONGEST].strip()
        head = [
            f"HTTP/1.1 {self.status} {phrase}",
            "Content-Type: text/plain; charset=utf-8",
            f"Content-Length: {len(content)}",
            "Connection: close",
        ]
        if self.denied:
            head.append(f"X-Microvm-Denied: {_NO_HEADER.sub('?', self.reason)[:_LONGEST].strip()}")
        return "\r\n".join([*head, "", ""]).encode("ascii") + content
