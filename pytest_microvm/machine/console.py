"""Detection of failures that a guest's kernel reports on its console: panic, oops, out of memory.

Findings are not trustworthy: root in the guest can print the same lines, but harms only its own machine.
Formats: mm/oom_kill.c, kernel/panic.c, kernel/hung_task.c, arch/x86/kernel/dumpstack.c of Linux 5.10 to 6.12.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_microvm.untrusted.text import sanitize_line

if TYPE_CHECKING:
    from collections.abc import Iterator

PIDS_WORD = "microvm: too many processes"
"""The agent's message when a fork was refused (pytest_microvm/guest/limits.py)."""

_MAX_LINE = 1024
_MAX_FINDINGS = 20
_MAX_MARKED = 10_000  # lines of one machine that are matched against the full patterns


@dataclass(frozen=True)
class GuestFailure:
    """A failure reported by the guest's kernel (or the agent).

    Args:
        kind: ``memory``, ``pids``, ``runner``, ``panic``, ``oops``, ``hang`` or ``file system``.
        text: A description for users, taken from the guest's message.
        size: Bytes that the killed process held; 0 for other kinds.
    """

    kind: str
    text: str
    size: int = 0


class ConsoleReader:
    """Finds failure reports in a console's byte stream; buffers at most one line."""

    def __init__(self) -> None:
        self.findings: list[GuestFailure] = []
        self._line = b""
        self._patience = _MAX_MARKED

    def feed(self, data: bytes) -> Iterator[GuestFailure]:
        """Process console bytes and yield the findings in them, at most 20 per machine."""
        text = self._line + data
        position, end = 0, text.rfind(b"\n") + 1
        # One search, not one per line: all machines share this thread, and a guest can send only newlines.
        while self._patience and (marked := _MARKED.search(text, position, end)):
            start = max(position, text.rfind(b"\n", position, marked.start()) + 1)
            position = text.find(b"\n", marked.end()) + 1
            self._patience -= 1
            finding = find(
                text[start : min(position - 1, start + _MAX_LINE)].decode("ascii", errors="replace")
            )
            if finding is not None and len(self.findings) < _MAX_FINDINGS:
                self.findings.append(finding)
                yield finding
        self._line = text[end : end + _MAX_LINE]


def find(line: str) -> GuestFailure | None:
    """Return the finding that a console line reports, if any; its text is safe to show."""
    line = sanitize_line(line.strip())
    for marker, kind, pattern in _PATTERNS:
        if marker in line and (match := pattern.search(line)):
            words = match.groupdict()
            if kind == "memory":
                size = (int(words["anon"]) + int(words["shmem"] or 0)) * 1024
                what = f"process {words['pid']} ({words['name']}), which had {size // 1024**2} MiB"
                return GuestFailure(kind, f"the guest's kernel ran out of memory and killed {what}", size)
            if kind == "pids":
                return GuestFailure(kind, "the guest's kernel refused to start another process")
            return GuestFailure(kind, match[0].strip())
    return None


_PATTERNS: tuple[tuple[str, str, re.Pattern[str]], ...] = (
    (
        # "Memory cgroup out of memory" is a limit set inside the guest, not the machine's
        "Out of memory",
        "memory",
        re.compile(
            r"Out of memory[^:]{0,40}: Killed process (?P<pid>\d{1,9}) \((?P<name>[^)]{0,64})\)"
            r".{0,40}?anon-rss:(?P<anon>\d{1,12})kB(?:.{0,40}?shmem-rss:(?P<shmem>\d{1,12})kB)?"
        ),
    ),
    (PIDS_WORD, "pids", re.compile(re.escape(PIDS_WORD))),
    ("a vital process ended", "runner", re.compile(r"a vital process ended \(wait status \d{1,6}\)")),
    ("Kernel panic", "panic", re.compile(r"Kernel panic - not syncing: .{0,200}")),
    ("BUG: ", "oops", re.compile(r"(?<!\w)BUG: .{0,200}")),
    ("Oops: ", "oops", re.compile(r"Oops: .{0,200}")),
    ("general protection fault", "oops", re.compile(r"general protection fault.{0,200}")),
    ("blocked for more than", "hang", re.compile(r"INFO: task .{0,80} blocked for more than .{0,40}")),
    ("-fs error", "file system", re.compile(r"\w{2,8}-fs error .{0,200}")),
)
_MARKED = re.compile(b"|".join(re.escape(marker).encode() for marker, _kind, _pattern in _PATTERNS))
