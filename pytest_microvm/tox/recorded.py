"""Compare what tox would install with what it recorded about an environment; nothing is installed."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from tox.tox_env.errors import Fail
from tox.tox_env.info import Info
from tox.tox_env.python.pip.pip_install import Pip
from tox.tox_env.python.pip.req.file import RequirementsFile

from pytest_microvm.errors import UsageError
from pytest_microvm.untrusted.nofollow import read_below

_NOT_COMPARED = ("env", "referenced_env", "redaction_format")  # of this computer, and of tox's version
_MOST = 200  # requirement files
_LONGEST = 1024 * 1024  # bytes of one requirement file
_SHOWN = 5  # differences of each kind
_WIDTH = 120  # characters of one


class EnvironmentRecord(Info):
    """tox's record of an environment, which must match: nothing is written to it.

    Args:
        content: The record.
        stale: Makes an error from a description of the difference.
    """

    def __init__(self, content: Mapping[str, Any], stale: Callable[[str], UsageError]) -> None:
        self._content = dict(content)
        self._stale = stale

    @contextmanager
    def compare(
        self, value: Any, section: str, sub_section: str | None = None
    ) -> Generator[tuple[bool, Any], None, None]:
        """Compare a new value with the recorded one.

        Raises:
            UsageError: They differ.
        """
        old = self._content.get(section)
        if sub_section is not None:
            old = old.get(sub_section) if isinstance(old, dict) else None
        new = _compared(value)
        if _compared(old) != new and (old is not None or _listed(new)):
            raise self._stale(f"{sub_section or section}: {_difference(new, _compared(old))}")
        yield True, old


class RecordedPip(Pip):
    """tox's pip installer for such an environment: compares requirements with its record."""

    def install(self, arguments: Any, section: str, of_type: str) -> None:
        """Compare an installation with the record.

        Raises:
            UsageError: They differ.
            Fail: A requirement cannot be read.
        """
        root = self._env.core.get("tox_root", Path)
        for file in (arguments, self.constraints):
            if isinstance(file, RequirementsFile):
                _keep_inside(file, root)
        super().install(arguments, section, of_type)


def _keep_inside(file: RequirementsFile, root: Path) -> None:
    """Let requirements include only files of the project in ``root``: no URL, and none behind a link."""
    reads = count(1)

    def read(url: str) -> str:
        path = os.path.relpath(root / url, root)
        if "://" in url:  # it may have a password
            raise Fail("a requirement file is at a URL, which is not fetched: put the file into the project")
        if path.startswith(os.pardir):
            raise Fail(f"the requirement file {path} is not in the project: copy it there")
        if next(reads) > _MOST:
            raise Fail(f"more than {_MOST} requirement files")
        try:
            content = read_below(root, path, _LONGEST)
        except (UsageError, OSError) as error:
            raise Fail(str(error)) from error
        if content is None:
            raise Fail(f"the requirement file {path} does not exist")
        return content.decode("utf-8-sig", errors="replace")

    try:
        parser = file._req_parser  # noqa: SLF001 - tox reads included files with it, and has no other seam
        parser._get_file_content  # noqa: B018, SLF001 - fail if tox does not have it: nothing would be kept
        parser._get_file_content = read  # type: ignore[method-assign] # noqa: SLF001
    except AttributeError as error:
        raise Fail(f"cannot see which files this version of tox reads ({error}): use another one") from None


def _compared(value: Any) -> dict[str, Any]:
    """Return the part of a recorded value that must match; older versions of tox recorded only a list."""
    if isinstance(value, list):
        return {"req": value}
    return {k: v for k, v in value.items() if k not in _NOT_COMPARED} if isinstance(value, dict) else {}


def _listed(value: Mapping[str, Any]) -> set[str]:
    return {
        text for part in value.values() if isinstance(part, list) for text in part if isinstance(text, str)
    }


def _difference(new: Mapping[str, Any], old: Mapping[str, Any]) -> str:
    kinds = {
        "now also": _listed(new) - _listed(old),
        "no longer": _listed(old) - _listed(new),
    }
    found = [f"{kind} {_shown(texts)}" for kind, texts in kinds.items() if texts]
    return "; ".join(found) or "other options"


def _shown(texts: set[str]) -> str:
    first = [text[:_WIDTH] for text in sorted(texts)[:_SHOWN]]
    return ", ".join([*first, *(["..."] if len(texts) > _SHOWN else [])])
