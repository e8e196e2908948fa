"""Failures in tox's own words: it ends an environment, or the whole run, with a line about each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tox.report import HandledError
from tox.tox_env.errors import Fail

from pytest_microvm.errors import MicroVMError


def check_name(name: str) -> None:
    """Check the name of an environment, since tox starts lines of its output with it.

    Raises:
        HandledError: The name contains control sequences or commands of a CI system.
    """
    from pytest_microvm.untrusted.text import sanitize_line  # noqa: PLC0415 - see tox/plugin.py

    if sanitize_line(f"{name}:") != f"{name}:":
        raise HandledError(f"invalid environment name: expected printable text, got {name!r}")


@contextmanager
def in_tox_words() -> Iterator[None]:
    """Convert errors into tox's own."""
    try:
        yield
    except MicroVMError as error:
        raise Fail(str(error)) from error
