"""What looking for secrets can cost the host: the worst texts that are known, a megabyte of each."""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Callable

from measure import promise

from pytest_microvm.untrusted.redaction import RedactedStream, Redactor

SIZE = 1_000_000  # characters
PIECE = 65536
TOKEN = "ghp_A1b2C3d4E5f6G7h8I9j0K1l2M3n4O5p6Q7r8"  # noqa: S105 - no real one
ODD = 's3cr3t/Tok+en=42&x y<z>"q'
LINES = [hashlib.sha256(b"%d" % number).hexdigest() for number in range(900)]
SECRETS = {
    "one token": [TOKEN],
    "one with what encodings escape": [ODD],
    "one that is nearly all zeros": ["0" * 63 + "1"],
    "a key in PEM": ["-----BEGIN KEY-----\n" + "\n".join(LINES[:27]) + "\n-----END KEY-----\n"],
    "a hundred": [line[:40] for line in LINES[:100]],
    "900 lines": ["\n".join(LINES)],
}


def main() -> list[dict[str, object]]:
    """Measure, print, and return what was promised."""
    results = []
    for name, values in SECRETS.items():
        redactor = Redactor(values)
        slowest = max(
            (seconds(way, redactor, (text * (SIZE // len(text) + 1))[:SIZE]), what)
            for what, text in texts(values[0]).items()
            for way in (redacted, streamed)
        )
        results.append(promise(f"1 M characters against {name} ({slowest[1]})", slowest[0], 0.5, " s"))
    return results


def texts(value: str) -> dict[str, str]:
    """Return what is repeated to be expensive where ``value`` is looked for."""
    return {
        "ordinary": "an ordinary line of a log\n",
        "one character": value[0],
        "its beginning": value[:4],
        "more of it": value[:6],
        "nearly all": value[:-1],
        "itself": value + "\n",
        "base64": base64.b64encode(value.encode()).decode()[:-6],
        "dots": "a...",
        "ellipses": "a\N{HORIZONTAL ELLIPSIS}",
        "beginnings and dots": value[:6] + "...",
        "nearly a beginning and dots": value[:6] + "X...",
        "beginnings, then dots": value[:6] * 41 + "...",
        "dots and ends": "...X" + value.strip()[-6:] * 4,
    }


def redacted(redactor: Redactor, text: str) -> None:
    """Redact a text, as in reports."""
    redactor.text(text)


def streamed(redactor: Redactor, text: str) -> None:
    """Redact a stream, as of a command's output."""
    stream, data = RedactedStream(redactor), text.encode()
    for start in range(0, len(data), PIECE):
        stream.feed(data[start : start + PIECE])
    stream.end()


def seconds(way: Callable[[Redactor, str], None], redactor: Redactor, text: str) -> float:
    """Return the CPU time that a text takes."""
    begin = time.process_time()
    way(redactor, text)
    return time.process_time() - begin


if __name__ == "__main__":
    main()
