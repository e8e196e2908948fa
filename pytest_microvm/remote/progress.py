"""Show what is being prepared: on one line of a terminal, or line by line in a log."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_microvm.remote.backend import Progress
from pytest_microvm.remote.sanitize import sanitize_line


class TerminalProgress:
    """Call it with what is being done now.

    Args:
        config: Its terminal reporter, if it has one, is written to.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
        self._quiet = config.option.verbose < 0 or hasattr(config, "workerinput")
        self._wrote = False

    def __call__(self, doing: str) -> None:
        """Show ``doing``."""
        reporter = self._reporter
        if reporter is None or self._quiet:
            return
        text = "microvm: " + sanitize_line(doing)
        terminal = reporter.isatty  # a method since pytest 9, a property before
        if terminal() if callable(terminal) else terminal:
            reporter.rewrite(text, erase=True)
            self._wrote = True
        else:
            if reporter._tw.width_of_current_line:  # noqa: SLF001 - pytest wrote "collecting ... "
                reporter.line("")
            reporter.write_line(text)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._wrote:
            self._reporter.rewrite("", erase=True)
            self._reporter.rewrite("")
