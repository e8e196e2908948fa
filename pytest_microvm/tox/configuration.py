"""The trust checks for tox's configuration file: find it, and list the requests that need trust.

The file is parsed here without tox, which would load a ``toxfile.py`` beside it.
"""

from __future__ import annotations

import configparser
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_microvm.errors import KitError, UsageError
from pytest_microvm.git.checkout import CheckedOutRef, checked_out
from pytest_microvm.host.project_grants import own_image
from pytest_microvm.settings.trust import VARIABLE, is_trusted

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from typing_extensions import Self

KEY = "tox"
"""The key of the file's content among the user's grants."""

_MAX_SIZE = 1024 * 1024  # bytes
_PASSED = ("pass_env", "passenv")
_VARIABLE = re.compile(r"\{env:([^{}:]+)")
_CONDITION = re.compile(r"\benv(?:\.|\[[\"'])(\w+)")
_READS = re.compile(r"\{(env|glob):|file\|")
_GLOB = re.compile(r"\{glob:([^{}:]+)")
_FILE = re.compile(r"^\s*(?:set_?env\s*=\s*)?file\|(.+)$", re.MULTILINE)


@dataclass(frozen=True)
class ToxFile:
    """The tox configuration file of a folder.

    Args:
        folder: The project's folder.
        path: The file; a missing file counts as empty, as in tox.
    """

    folder: Path
    path: Path

    @classmethod
    def of(cls, path: Path, options: Any) -> Self:
        """Return the configuration of a run of tox.

        Args:
            path: The file that tox has found.
            options: tox's command line; ``--root`` names another folder than the file's.
        """
        return cls((options.root_dir or path.parent).resolve(), path)

    @cached_property
    def asked(self) -> Mapping[str, str]:
        """The file's request as in :mod:`pytest_microvm.settings.trust`: a digest of its whole content."""
        name = os.path.relpath(self.path, self.folder)
        own = _pyproject_table(self.path)
        data = _read(self.path) if own is None else json.dumps(own, sort_keys=True, default=str).encode()
        return {KEY: f"{name} (sha256 {hashlib.sha256(data).hexdigest()[:32]})"}

    @cached_property
    def checkout(self) -> CheckedOutRef:
        """The checkout in the project's folder."""
        return checked_out(self.folder)

    @cached_property
    def is_allowed(self) -> bool:
        """True if the user has allowed the file's content for the current checkout."""
        return self.allows({})

    def allows(self, kit: Mapping[str, Any]) -> bool:
        """Return True if the user has allowed the file's content, and the project's own kit if it names one.

        Args:
            kit: The request of the file's image, from :func:`asked_by_image`.
        """
        if os.environ.get(VARIABLE) == "1":
            return True
        return is_trusted(self.folder, {**self.asked, **kit}, self.checkout)

    def all_asked(self) -> dict[str, Any]:
        """Return the requests of the file and of the images that it names; empty if there are none.

        Computed names are not recognized.
        """
        pairs = list(_pairs(_tables(self.path)))
        if not any(_asks(key, text) for key, text in pairs):
            return {}
        asked: dict[str, Any] = dict(self.asked)
        for key, image in pairs:
            if key == "microvm_image":
                with suppress(KitError):
                    asked |= asked_by_image(image, self.folder)
        return asked

    def notes(self) -> list[str]:
        """Return readable lines with the file's variables, files and grants; see :meth:`all_asked`."""
        pairs = list(_pairs(_tables(self.path)))
        texts = [text for _key, text in pairs]
        passed = [name for key, text in pairs if key in _PASSED for name in re.split(r"[\s,]+", text)]
        variables = {name for text in texts for name in _VARIABLE.findall(text)}
        variables |= {name for name in passed if name and "{" not in name}
        files = {file.strip() for text in texts for file in [*_FILE.findall(text), *_GLOB.findall(text)]}
        grants = [f"{key} = {json.dumps(text)}" for key, text in pairs if key.startswith("microvm_")]
        named = {"reads variables, where they are set: ": variables, "reads files: ": files}
        found = [f"{what}{', '.join(sorted(names))}" for what, names in named.items() if names]
        return [*found, *dict.fromkeys(grants)]


def find(folder: Path) -> ToxFile | None:
    """Find the configuration that tox would use in a folder; see ``tox.config.source.discover``."""
    for name in ("tox.ini", "setup.cfg", "pyproject.toml", "tox.toml"):
        path = folder / name
        if path.is_file() and _is_toxs(path):
            return ToxFile(folder, path)
    return None


def asked_by_image(image: str, project: Path) -> dict[str, Any]:
    """Return the request of an image: of the project's own kit a digest of its whole content, or a reference.

    Raises:
        KitError: The kit does not exist, or is invalid.
    """
    own = own_image(image, project)
    return {} if own is None else {f"{KEY}.image.{image}": own[0]}


def _asks(key: str, text: str) -> bool:
    return key in _PASSED or key.startswith("microvm_") or bool(_READS.search(text))


def _is_toxs(path: Path) -> bool:
    if path.name == "setup.cfg":
        return "tox:tox" in _tables(path)
    return path.name != "pyproject.toml" or _pyproject_table(path) is not None


def _pyproject_table(path: Path) -> object | None:
    """Return ``[tool.tox]`` of a pyproject.toml; the rest changes often and does not concern tox."""
    tool = _tables(path).get("tool") if path.name == "pyproject.toml" else None
    return tool.get("tox") if isinstance(tool, Mapping) else None


def _tables(path: Path) -> Mapping[str, Any]:
    """Return a file's sections; empty if the file is invalid, which tox will report."""
    text = _read(path).decode("utf-8-sig", errors="replace")
    try:
        return tomllib.loads(text) if path.suffix == ".toml" else _sections(text)
    except (ValueError, RecursionError):
        return {}


def _sections(text: str) -> dict[str, dict[str, str]]:
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(text)
    except configparser.Error:
        return {}
    return {name: dict(parser.items(name)) for name in parser.sections()}


def _pairs(value: object, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield every text with its key; texts in a list belong to the list's key."""
    if isinstance(value, Mapping):
        if value.get("replace") == "env" and isinstance(value.get("name"), str):
            yield key, f"{{env:{value['name']}}}"
        if value.get("replace") == "glob":
            yield key, f"{{glob:{value.get('pattern')}}}"
        if value.get("replace") == "if":
            names = _CONDITION.findall(str(value.get("condition")))
            yield from ((key, f"{{env:{name}}}") for name in names)
        for name, each in value.items():
            if name == "legacy_tox_ini" and isinstance(each, str):
                yield from _pairs(_sections(each))
            elif name == "file" and key in ("set_env", "setenv"):
                yield key, f"file|{each}"
            else:
                yield from _pairs(each, key if key in _PASSED else str(name))
    elif isinstance(value, list):
        for each in value:
            yield from _pairs(each, key)
    elif isinstance(value, str):
        yield key, value


def _read(path: Path) -> bytes:
    """Return a file's content.

    Raises:
        UsageError: The file is too long, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_SIZE + 1)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > _MAX_SIZE:
        raise UsageError(f"{path} has more than {_MAX_SIZE} bytes", resolution="make it smaller")
    return data
