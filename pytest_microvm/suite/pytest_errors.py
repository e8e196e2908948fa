"""Errors of this package as pytest shows them."""

from __future__ import annotations

import pytest

from pytest_microvm.errors import MicroVMError
from pytest_microvm.untrusted.text import sanitize


class as_pytest_errors:  # noqa: N801 - reads as the statement it is
    """Convert this package's errors to ``pytest.UsageError``, which pytest shows as text with exit code 4."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, MicroVMError):
            raise pytest.UsageError(sanitize(str(error))) from None
