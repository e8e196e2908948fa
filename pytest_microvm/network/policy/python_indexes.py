"""Query pip, or uv where no Python has pip, for its package indexes and for the hosts of their files.

Only documented commands are used: pip's ``config list`` and ``install --dry-run --report``, uv's ``pip
compile``. They apply the tool's own configuration, certificates, proxies and logins. They run in the root
folder, which belongs to no project, and ignore source distributions, whose code they would execute.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

from pytest_microvm.errors import HostError, UsageError
from pytest_microvm.network.policy.clients import answer

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_PROJECTS = ("packaging", "pip")  # small, and in almost every index
_PATIENCE = 15  # seconds without data from an index
_FIRST_WITH_REPORT = (22, 2)  # pip's version
_DEFAULT_INDEX = re.compile(r"--index-url <url>.*?\(default:? (https?://[^\s)]+)\)", re.DOTALL)
_SETTING = re.compile(r"^(global|install|:env:)\.([a-z0-9-]+)=(.+)$", re.MULTILINE)
_LATER_OVERRIDE = ("global", "install", ":env:")  # "Precedence / Override order" in pip's documentation
_CONNECTING = (  # settings of pip for its connections
    *("cert", "client-cert", "proxy", "trusted-host", "keyring-provider", "use-feature", "use-deprecated"),
    *("cache-dir", "no-cache-dir"),
)
_INSTEAD = "or write the hosts themselves as rules"

Ask = Callable[[str, str], tuple[list[str], str]]
"""Asks the index at a URL for a project; returns URLs of its files, and the tool's messages."""


@dataclass(frozen=True)
class PythonIndexes:
    """Package indexes that are reached over http or https; the URLs contain no logins.

    Args:
        indexes: The indexes' URLs, the default one first.
        links: The URLs of pages with links to files.
        trusted: Hosts that are accepted without a valid certificate.
        login: Whether a configured URL contains a login.
        files: For each index and page the URLs of some of its files; empty if it reported none.
        said: The tool's messages about those that reported none.
    """

    indexes: list[str]
    links: list[str]
    trusted: list[str]
    login: bool
    files: dict[str, list[str]]
    said: str


def python_indexes() -> PythonIndexes:
    """Return the package indexes that pip, or uv where no Python has pip, uses on this computer.

    Raises:
        UsageError: There is neither a recent pip nor uv.
        HostError: The tool failed.
    """
    if pip := _pip():
        return _ask_pip(pip)
    if uv := shutil.which("uv"):
        return _ask_uv(uv)
    raise UsageError(
        f"preset pip: {sys.executable} has no pip to be asked for its configuration, and uv is not installed",
        resolution=f"python -m ensurepip, {_INSTEAD}",
    )


def _web_indexes(indexes: Sequence[str], links: Sequence[str], trusted: list[str], ask: Ask) -> PythonIndexes:
    """Return those of the configured URLs that are reached over http or https, with their files' URLs."""
    try:
        web = [url for url in (*indexes, *links) if urlsplit(url).scheme in ("http", "https")]
    except ValueError:  # neither it nor the URL is shown: there may be a login in them
        raise UsageError(
            "preset pip: invalid URL of an index, or of a page with links",
            resolution="correct it in pip's or uv's configuration",
        ) from None
    files, messages = {}, []
    for url in web:
        files[_bare(url)], said = _files(url, ask)
        messages += said
    return PythonIndexes(
        indexes=[_bare(url) for url in indexes if url in web],
        links=[_bare(url) for url in links if url in web],
        trusted=trusted,
        login=any("@" in urlsplit(url).netloc for url in web),
        files=files,
        said="\n".join(messages),
    )


def _files(url: str, ask: Ask) -> tuple[list[str], list[str]]:
    messages = []
    end = time.monotonic() + 2 * _PATIENCE
    for project in _PROJECTS:
        files, said = ask(url, project)
        if files:
            return files, []
        messages.append(said)
        if time.monotonic() > end:  # it does not respond
            break
    return [], messages


def _bare(url: str) -> str:
    """Return a URL without user name, password, query and fragment."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


# pip


def _pip() -> list[str] | None:
    """Return the command for a pip that can report URLs of files; ``None`` if no Python has pip.

    Raises:
        UsageError: There is only an older pip.
    """
    old = None
    for python in (sys.executable, *filter(None, map(shutil.which, ("python3", "python")))):
        pip = [python, "-E", "-m", "pip"]  # PYTHONPATH may name a project
        done = subprocess.run(
            [*pip, "--version"], cwd="/", capture_output=True, stdin=subprocess.DEVNULL, check=False
        )
        version = re.match(rb"pip ((\d+)\.(\d+)\S*)", done.stdout)
        if version is None:
            continue
        if (int(version[2]), int(version[3])) >= _FIRST_WITH_REPORT:
            return pip
        old = old or UsageError(
            f"preset pip: invalid pip: expected version 22.2 or later, got {version[1].decode()} of {python}",
            resolution=f"{python} -m pip install --upgrade pip, {_INSTEAD}",
        )
    if old:
        raise old
    return None


def _ask_pip(pip: list[str]) -> PythonIndexes:
    settings = _pip_settings(pip)
    indexes = settings.get("extra-index-url", "").split()
    if settings.get("no-index", "").lower() in ("1", "true", "t", "yes", "y", "on"):
        indexes = []
    else:
        indexes.insert(0, settings.get("index-url") or _default_index(pip))
    links = settings.get("find-links", "").split()
    connecting = {name: settings[name] for name in _CONNECTING if name in settings}

    def ask(url: str, project: str) -> tuple[list[str], str]:
        place = {"no-index": "1", "find-links": url} if url in links else {"index-url": url}
        command = [*pip, "install", "--dry-run", "--quiet", "--report=-", "--ignore-installed", "--no-deps"]
        told, said = answer(
            [*command, "--only-binary=:all:", "--ignore-requires-python", project],
            what=f"preset pip: {_bare(url)}",
            environment=_pip_environment({**connecting, **place}),
            statuses=(0, 1),  # 1: it has no such file, or could not be reached
        )
        return [each["download_info"]["url"] for each in json.loads(told or "{}").get("install", ())], said

    return _web_indexes(indexes, links, settings.get("trusted-host", "").split(), ask)


def _pip_settings(pip: list[str]) -> dict[str, str]:
    """Return the settings of ``pip install`` from its configuration files and variables."""
    told, _said = answer([*pip, "config", "list"], what="preset pip")
    found = sorted(_SETTING.findall(told), key=lambda setting: _LATER_OVERRIDE.index(setting[0]))
    values = {name: ast.literal_eval(value) for _section, name, value in found}
    return {name: value for name, value in values.items() if value}


def _default_index(pip: list[str]) -> str:
    """Return the index that pip uses if none is configured; only its help names it."""
    wide = {**os.environ, "COLUMNS": "10000"}  # a URL is not broken into lines
    told, _said = answer([*pip, "list", "--help"], what="preset pip", environment=wide)
    found = _DEFAULT_INDEX.search(told)
    if found is None:
        raise HostError(
            "preset pip: `pip list --help` names no default index",
            resolution=f"set pip's index-url, {_INSTEAD}",
        )
    return found[1]


def _pip_environment(settings: dict[str, str]) -> dict[str, str]:
    """Return the variables for a pip with these settings instead of the user's; logins stay off its argv."""
    fixed = {"config-file": os.devnull, "no-input": "1", "retries": "1", "timeout": str(_PATIENCE)}
    fixed["disable-pip-version-check"] = "1"
    others = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    return others | {f"PIP_{key.upper().replace('-', '_')}": v for key, v in {**settings, **fixed}.items()}


# uv


def _ask_uv(uv: str) -> PythonIndexes:
    command = [
        uv,
        "--quiet",
        "--directory=/",
        "--project=/",
        "pip",
        "compile",
        "-",
        "--no-header",
        "--no-deps",
    ]
    command += ["--only-binary=:all:", f"--python={sys.executable}"]
    told, _said = answer(
        [*command, "--offline", "--emit-index-url", "--emit-find-links"], what="preset pip: uv"
    )
    options = [line.partition(" ") for line in told.splitlines()]
    indexes = [url for option, _, url in options if option in ("--index-url", "--extra-index-url")]
    links = [url for option, _, url in options if option == "--find-links"]

    def ask(url: str, project: str) -> tuple[list[str], str]:
        if url in links:  # no option of uv limits it to one of several pages
            return [], ""
        environment = {**os.environ, "UV_INDEX": url}  # uv takes a project from the first index that has it
        environment |= {"UV_HTTP_TIMEOUT": str(_PATIENCE), "UV_HTTP_RETRIES": "1"}

        def compiled(form: str) -> tuple[str, str]:
            return answer(
                [*command, form],
                what=f"preset pip: {_bare(url)}",
                environment=environment,
                stdin=project,
                statuses=(0, 1, 2),  # 1: no index has it, 2: one could not be reached
            )

        told, said = compiled("--emit-index-annotation")
        if not re.search(rf"# from {re.escape(_bare(url).rstrip('/'))}/?$", told, re.MULTILINE):
            return [], said  # another index has it
        told, said = compiled("--format=pylock.toml")
        wheels = [wheel for package in tomllib.loads(told).get("packages", ()) for wheel in package["wheels"]]
        return [wheel["url"] for wheel in wheels if "url" in wheel], said

    return _web_indexes(indexes, links, [], ask)
