"""The programs that tests start as a user does: ``pytest-microvm`` and pytest of this Python."""

import sys
from pathlib import Path

MICROVM = (str(Path(sys.executable).with_name("pytest-microvm")),)
"""The beginning of a command line of ``pytest-microvm``."""

PYTEST = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider")
"""The beginning of a command line of pytest that leaves no ``.pytest_cache`` behind."""
