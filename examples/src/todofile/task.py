"""One task and its line: ``x (A) 2024-05-01 call the bank +money``."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from datetime import date

_LINE = re.compile(
    r"(?P<done>x )?(?:\((?P<priority>[A-Z])\) )?(?:(?P<due>\d{4}-\d\d-\d\d) )?(?P<text>\S.*)", re.ASCII
)


class TaskError(ValueError):
    """A line that is not a task."""


@dataclass(frozen=True, order=True)
class Task:
    """What is to be done; compared by urgency."""

    done: bool
    priority: str
    due: date
    text: str

    @classmethod
    def parse(cls, line: str) -> Task:
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise TaskError(f"not a task: {line!r}")
        try:
            due = date.fromisoformat(match["due"]) if match["due"] else date.max
        except ValueError as error:
            raise TaskError(f"not a date: {match['due']}") from error
        return cls(bool(match["done"]), match["priority"] or "~", due, match["text"])

    @property
    def projects(self) -> frozenset[str]:
        return frozenset(word[1:] for word in self.text.split() if word.startswith("+"))

    def finished(self) -> Task:
        return replace(self, done=True)

    def __str__(self) -> str:
        parts = [
            "x" if self.done else "",
            f"({self.priority})" if self.priority != "~" else "",
            self.due.isoformat() if self.due != date.max else "",
            self.text,
        ]
        return " ".join(part for part in parts if part)
