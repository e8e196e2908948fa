"""A request that does not go out: why, as an HTTP response and as a line of the log."""

from __future__ import annotations

import re
from http import HTTPStatus

_NO_HEADER = re.compile(r"[^ -~]")
_LONGEST = 500  # characters of a reason in a header


class Refused(Exception):
    """A request is not passed on, or what it asks for cannot be reached.

    Args:
        status: The HTTP status to answer with; 502 if it was allowed, and the server is at fault.
        reason: Why, for people, in one line.
        rule: The rule that decided.
        allow: The host to write into ``network`` to allow it; empty where that would not help.
    """

    def __init__(self, status: int, reason: str, rule: str | None = None, allow: str = "") -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.rule = rule
        self.allow = allow

    @property
    def denied(self) -> bool:
        """Whether it is refused here; otherwise it was allowed, and failed."""
        return self.status != HTTPStatus.BAD_GATEWAY

    def response(self) -> bytes:
        """Return the whole response, after which the connection ends."""
        line = f"microvm: {'denied' if self.denied else 'failed'}: {self.reason}"
        text = f"{line}\n"
        if self.allow:
            text += f'To allow it, on the host: network = ["{self.allow}"]\n'
        content = text.encode(errors="replace")
        # Of a refused tunnel most programs show nothing but this.
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
