"""The amount that a test has printed, measured before pytest reads it into memory."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest


class OutputMeter:
    """Measures the captured output of tests; the excess is discarded.

    Attributes:
        printed: Bytes that the present test has printed so far.
    """

    def __init__(self) -> None:
        self.printed = 0
        self._limit = 0

    @property
    def exceeded(self) -> bool:
        """True if the test has printed more than it may."""
        return self.printed > self._limit

    def begin(self, limit: int) -> None:
        """Start to count for the next test, which may print ``limit`` bytes."""
        self._limit, self.printed = limit, 0

    def install(self, config: pytest.Config) -> None:
        """Measure the output of each test phase before pytest reads it.

        This is not a hook around the phase, because that would appear in tracebacks of ``--tb=native``.
        """
        manager: Any = config.pluginmanager.getplugin("capturemanager")
        capture = getattr(manager, "_global_capturing", None)
        if capture is None:  # -p no:capture: a test's output goes to the console
            return
        files = [getattr(each, "tmpfile", None) for each in (capture.out, capture.err)]
        read = manager.read_global_capture

        def measured() -> Any:
            for file in files:
                if file is not None:
                    self._measure(file)
            return read()

        manager.read_global_capture = measured

    def _measure(self, file: Any) -> None:
        """Add the size of ``file`` to the test's output; empty the file if the limit is exceeded."""
        with contextlib.suppress(OSError, ValueError):  # no file descriptor (--capture=sys)
            self.printed += os.fstat(file.fileno()).st_size
            if self.exceeded:
                os.ftruncate(file.fileno(), 0)
