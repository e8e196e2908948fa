"""The debugger of a test (pdb, ``breakpoint()``), on a terminal that the host lends while the test runs.

pytest suspends its capturing for the debugger, and goes back to the process's own streams. So the terminal
takes the place of these: whatever pytest, pdb or another debugger does with them, it finds the terminal.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import sys
import tempfile
from typing import TYPE_CHECKING, Any

import pytest
from _pytest.debugging import pytestPDB

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

_WAIT = 120.0  # seconds for the host to lend a terminal
_STREAMS = (("in_", "stdin", 0), ("out", "stdout", 1), ("err", "stderr", 2))


class Debugger:
    """The plug-in that gets a terminal when a debugger starts.

    Args:
        config: pytest's configuration.
        look: How the host's pytest writes to its terminal: ``hasmarkup`` and ``code_highlight``.

    Attributes:
        shown: Whether the debugger has shown the failure of the current test.
    """

    def __init__(self, config: pytest.Config, look: dict[str, bool]) -> None:
        self.shown = False
        self._config = config
        self._terminal: Any = config.pluginmanager.get_plugin("terminalreporter")
        if (
            self._terminal is not None
        ):  # at once: pytest colours the explanation of an assertion when it fails
            vars(self._terminal._tw).update(look)
        self._ask: Callable[[dict[str, Any]], None] | None = None
        self._lent: socket.socket | None = None
        self._files: dict[str, Any] = {}
        begin = pytestPDB._init_pdb.__func__  # type: ignore[attr-defined]

        def begin_on_terminal(cls: Any, method: str, *args: Any, **kwargs: Any) -> Any:
            self._attach()
            return begin(cls, method, *args, **kwargs)

        pytestPDB._init_pdb = classmethod(begin_on_terminal)  # type: ignore[assignment]

    def begin(self, ask: Callable[[dict[str, Any]], None]) -> None:
        """A test begins: ``ask`` sends the host a record."""
        self._ask, self.shown = ask, False

    def end(self) -> None:
        """The test has ended: give the terminal back."""
        self._ask = None
        lent, self._lent = self._lent, None
        if lent is not None:
            for stream in ("stdout", "stderr"):
                with contextlib.suppress(OSError, ValueError):
                    self._files[stream].flush()
            lent.close()

    @pytest.hookimpl(hookwrapper=True, tryfirst=True)
    def pytest_exception_interact(self) -> Generator[None, Any, None]:
        """Get a terminal before ``--pdb`` shows the failure there."""
        if self._terminal is None or not self._config.getoption("usepdb", False):
            yield
            return
        self._attach()
        writer = self._terminal._tw
        before, writer._file = writer._file, self._files.get("stdout", writer._file)
        yield
        writer._file = before
        self.shown = True

    def _attach(self) -> None:
        if self._ask is None or self._lent is not None:
            return
        with tempfile.TemporaryDirectory(prefix="microvm-") as folder:
            path = os.path.join(folder, "debugger")
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
                listening.bind(path)
                listening.listen(1)
                listening.settimeout(_WAIT)
                self._ask({"k": "debug", "socket": path})
                self._lent, _address = listening.accept()
        capture: Any = self._config.pluginmanager.get_plugin("capturemanager")
        self._take(_received(self._lent), getattr(capture, "_global_capturing", None))

    def _take(self, streams: list[int], captured: Any) -> None:
        """Put the terminal in the place of this process's streams, or where capturing has saved these."""
        for (name, stream, number), lent in zip(_STREAMS, streams):  # noqa: B905 - Python 3.8
            file = self._files[stream] = os.fdopen(lent, "r" if number == 0 else "w", buffering=1)
            saved = getattr(captured, name, None)
            if saved is not None and hasattr(saved, "targetfd_save"):
                os.dup2(lent, saved.targetfd_save)
                saved.syscapture._old = file
            if getattr(saved, "_state", "suspended") == "suspended":
                os.dup2(lent, number)
                setattr(sys, stream, file)


def _received(connection: socket.socket) -> list[int]:
    streams = array.array("i")
    _data, ancillary, _flags, _address = connection.recvmsg(1, socket.CMSG_SPACE(3 * streams.itemsize))
    for _level, _kind, data in ancillary:
        streams.frombytes(data[: 3 * streams.itemsize])
    return list(streams)
