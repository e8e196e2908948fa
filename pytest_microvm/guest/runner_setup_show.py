"""What ``--setup-show`` and similar options write on pytest's terminal while a test runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TextIO

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator


class SetupShow:
    """A plug-in that leads pytest's terminal to a file, but for outcomes, which the host shows.

    Args:
        terminal: pytest's plug-in for the terminal.
        file: The file.
    """

    def __init__(self, terminal: Any, file: TextIO) -> None:
        self._terminal = terminal
        self._nowhere = terminal._tw._file
        terminal._tw._file = file

    @pytest.hookimpl(hookwrapper=True, tryfirst=True)
    def pytest_runtest_logstart(self) -> Generator[None, Any, None]:
        """Write nothing at a test's begin."""
        yield from self._silently()

    @pytest.hookimpl(hookwrapper=True, tryfirst=True)
    def pytest_runtest_logreport(self) -> Generator[None, Any, None]:
        """Write nothing about an outcome."""
        yield from self._silently()

    @pytest.hookimpl(hookwrapper=True, tryfirst=True)
    def pytest_runtest_logfinish(self) -> Generator[None, Any, None]:
        """Write nothing at a test's end."""
        yield from self._silently()

    def _silently(self) -> Generator[None, Any, None]:
        file, self._terminal._tw._file = self._terminal._tw._file, self._nowhere
        yield
        self._terminal._tw._file = file
