"""Progress messages of a remote suite's preparation, shown through pytest's own terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from pytest_microvm.terminal.progress import Progress
from pytest_microvm.untrusted.text import sanitize_line

if TYPE_CHECKING:
    from typing_extensions import Self

_PREFIX = "microvm: "


class TerminalProgress:
    """A progress display: call it with the current step; inside ``with``, a terminal shows it on one line.

    Args:
        config: pytest's configuration, whose terminal reporter, if any, is written to.
    """

    def __init__(self, config: pytest.Config) -> None:
        reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
        self._reporter = reporter
        self._quiet = reporter is None or config.option.verbose < 0 or hasattr(config, "workerinput")
        self._line: Progress | None = None
        if not self._quiet:
            found = reporter.isatty  # a method since pytest 9, a property before
            if found() if callable(found) else found:
                self._line = Progress(reporter._tw._file, terminal=True, prefix=_PREFIX)  # noqa: SLF001
        self._inside = 0

    def __enter__(self) -> Self:
        self._inside += 1
        if self._line is not None:
            self._line.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._inside -= 1
        if self._line is not None:
            self._line.__exit__(*error)

    def __call__(self, doing: str) -> None:
        """Show the step ``doing``."""
        if self._quiet:
            return
        if self._reporter._tw.width_of_current_line:  # noqa: SLF001 - pytest wrote "collecting ... ", or dots
            self._reporter.line("")
        if self._line is not None and self._inside:
            self._line(sanitize_line(doing))
        else:
            self._reporter.write_line(_PREFIX + sanitize_line(doing))
