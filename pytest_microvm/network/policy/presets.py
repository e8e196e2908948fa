"""Rules by ecosystem: the hosts that pip, npm, apt and git are configured to use on this computer.

Each tool reads its own configuration: that of the user and the computer, not the project's files, which may
be untrusted. The exception is git: its preset consists of the remotes in the checkout's configuration. No
hosts are hard-coded here.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit

from pytest_microvm.errors import HostError, UsageError
from pytest_microvm.git.commands import GitError, git_program, user_config
from pytest_microvm.git.repository import configuration, find_checkout
from pytest_microvm.network.policy.addresses import parse_address, special_range
from pytest_microvm.network.policy.clients import answer, without_login
from pytest_microvm.network.policy.hosts import as_address, is_loopback_name
from pytest_microvm.network.policy.matching import Name, Rule
from pytest_microvm.network.policy.python_indexes import python_indexes
from pytest_microvm.network.policy.rule_text import PRESETS, parse_rule, split_deny

_MAX_HOSTS = 50  # per tool; more are not plausible
_APT_URI = re.compile(r"'([^']+)'")
_SOURCE = re.compile(r"(?:[a-z0-9]+\+)?(https?://[^\s\]]+)")
_WEB = re.compile(r"https?://", re.IGNORECASE)
_CREDENTIAL = "its login stays on this computer: hand it over as a credential"


@dataclass(frozen=True)
class Preset:
    """The rules and settings of a preset on this computer.

    Args:
        rules: The hosts, each with its scheme and port.
        environment: Variables that make the tool in the guest use the same hosts.
        hints: Hints for the user, one line each.
    """

    rules: tuple[Rule, ...]
    environment: tuple[tuple[str, str], ...] = ()
    hints: tuple[str, ...] = ()


def read_preset(name: str, project: Path, file_systems: tuple[Path, ...] = ()) -> Preset:
    """Return a preset's rules and settings, determined once per process.

    Args:
        name: One of ``PRESETS``.
        project: The project's folder, for the remotes of its repository.
        file_systems: The layers of the image's root file system (squashfs), whose sources apt in the guest
            uses.

    Raises:
        UsageError: The tool is not installed, or has no reachable host configured.
        HostError: The tool failed, or its index did not respond.
    """
    if name not in PRESETS:
        raise UsageError(f"{name!r} is no preset", resolution=f"presets are {', '.join(PRESETS)}")
    return _read(name, project.absolute() if name == "git" else None, file_systems if name == "apt" else ())


def preset_rules(project: Path, file_systems: tuple[Path, ...] = ()) -> Callable[[str], Sequence[Rule]]:
    """Return a function from preset name to rules, for ``parse_rules``."""
    return lambda name: read_preset(name, project, file_systems).rules


def named_presets(texts: Iterable[str]) -> list[str]:
    """Return the names of the presets that rules allow, in order of first mention."""
    split = [split_deny(text) for text in texts]
    return list(dict.fromkeys(name for deny, name in split if not deny and name in PRESETS))


@lru_cache(maxsize=64)
def _read(name: str, project: Path | None, file_systems: tuple[Path, ...]) -> Preset:
    if name == "pip":
        return _pip()
    if name == "npm":
        return _npm()
    if name == "apt":
        return _apt(file_systems)
    assert project is not None
    return _git(project)


# pip


def _pip() -> Preset:
    found = python_indexes()
    urls = [*found.indexes, *found.links]
    if not urls:
        raise UsageError(
            "preset pip: pip is configured with no index that is reached over http or https",
            resolution="hand the wheels over with a mount, or write the hosts themselves as rules",
        )
    if not any(found.files.values()):
        raise HostError(
            f"preset pip: no index told where its files are ({', '.join(urls)})",
            details="\n".join(found.said.splitlines()[-5:]),
            resolution="check `pip download pip` on this computer, or write the hosts themselves as rules",
        )
    silent = [url for url in urls if not found.files[url]]
    hints = [f"{url} told no files: if it has them on another host, allow that one too" for url in silent]
    hints += [_CREDENTIAL] if found.login else []
    told = {url: [file for file in found.files[url] if _may_lead(url, file)] for url in urls}
    environment = {
        "PIP_INDEX_URL": found.indexes[0] if found.indexes else "",
        "PIP_EXTRA_INDEX_URL": " ".join(found.indexes[1:]),
        "PIP_NO_INDEX": "" if found.indexes else "1",
        "PIP_FIND_LINKS": " ".join(found.links),
        "PIP_TRUSTED_HOST": " ".join(found.trusted),
    }
    return _preset("pip", urls, environment, hints, told)


# npm


def _npm() -> Preset:
    npm = _installed("npm", "npm")
    told, _said = answer([npm, "config", "list", "--json"], what="preset npm")
    settings = json.loads(told)
    if "registry" not in settings:
        raise UsageError(
            "preset npm: the registry's URL has a login in it, and npm does not tell such a URL",
            resolution="move the login to a line //host/:_authToken=... of your .npmrc",
        )
    registry = str(settings["registry"])
    scoped = [
        str(url) for name, url in settings.items() if name.startswith("@") and name.endswith(":registry")
    ]
    options = ["--json", "--prefer-online", "--fetch-retries=0", "--fetch-timeout=30000"]
    told, _said = answer([npm, "view", "npm", "dist.tarball", *options], what=f"preset npm: {registry}")
    tarball = json.loads(told)
    files = [tarball] if isinstance(tarball, str) and _may_lead(registry, tarball) else []
    return _preset("npm", [registry, *scoped], {"NPM_CONFIG_REGISTRY": registry}, told={registry: files})


# apt


def _apt(file_systems: tuple[Path, ...]) -> Preset:
    if not file_systems and shutil.which("apt-get") is None:
        _installed("apt-get", "apt")
    found: list[str] = []
    if shutil.which("apt-get"):
        told, _said = answer(["apt-get", "--print-uris", "update"], what="preset apt")
        found += (source for uri in _APT_URI.findall(told) if (source := _web(uri)))
    for layer in file_systems:
        found += _sources_in(layer)
    if not found:
        raise UsageError(
            "preset apt: neither this computer's apt nor the image has a source reached over http or https",
            resolution="write the mirror's host as a rule",
        )
    return _preset("apt", found)


def _sources_in(layer: Path) -> list[str]:
    """Return the source URLs of apt in a layer of an image."""
    wanted = ["etc/apt/sources.list", "etc/apt/sources.list.d/*"]
    told, _said = answer(
        [_installed("unsquashfs", "apt"), "-cat", str(layer.absolute()), *wanted],
        what="preset apt", statuses=(0, 2),  # 2: one of them is missing
    )  # fmt: skip
    lines = [line for line in told.splitlines() if not line.lstrip().startswith("#")]
    return _SOURCE.findall("\n".join(lines))


def _web(uri: str) -> str | None:
    """Return the http(s) URL in a URI of apt, such as ``mirror+https://...``; ``None`` without one."""
    match = _SOURCE.match(uri)
    return match[1] if match else None


# git


def _git(project: Path) -> Preset:
    """Return the preset for the checkout's remotes, read as data and rewritten as the user's git does."""
    if git_program() is None:
        raise _missing("git", "git")
    checkout = find_checkout(project)
    if checkout is None:
        raise HostError(
            "preset git: the project is not in a repository",
            details=f"{project}: not a git repository",
            resolution="write the hosts themselves as rules",
        )
    fetched, pushed = _insteads("insteadof"), _insteads("pushinsteadof")
    remotes = [*_remotes(configuration(checkout.repository), fetched, pushed)]
    web = [url for url in remotes if urlsplit(url).scheme in ("http", "https")]
    if not web:
        listed = ", ".join(dict.fromkeys(map(without_login, remotes))) or "none"
        raise UsageError(
            f"preset git: the repository has no remote over http or https (remotes: {listed})",
            resolution="write its host as a rule: host for https, host:22 for ssh",
        )
    hints = [_CREDENTIAL] if any(urlsplit(url).username for url in web) else []
    return _preset("git", web, _rewriting(fetched), hints)


def _insteads(key: str) -> list[tuple[str, str]]:
    """Return the user's URL rewrites for git, as pairs of new and old URL prefix."""
    try:
        said = user_config("--null", "--get-regexp", rf"^url\..*\.{key}$")
    except GitError:  # no rewrites configured
        return []
    items = [item.partition("\n") for item in said.split("\0") if item]
    return [(name[len("url.") : -len(f".{key}")], old) for name, _newline, old in items]


def _remotes(
    said: Mapping[str, Sequence[str]], fetched: Sequence[tuple[str, str]], pushed: Sequence[tuple[str, str]]
) -> Iterator[str]:
    """Yield the URLs that git fetches from and pushes to; see ``url.<base>.insteadOf`` in git-config(1)."""
    for key, urls in said.items():
        if not key.startswith("remote.") or not key.endswith((".url", ".pushurl")):
            continue
        yield from (_rewritten(url, fetched) for url in urls)
        if key.endswith(".url") and f"{key.removesuffix('.url')}.pushurl" not in said:
            yield from (_rewritten(url, pushed) for url in urls if _rewritten(url, pushed) != url)


def _rewritten(url: str, pairs: Sequence[tuple[str, str]]) -> str:
    """Return a URL with its longest matching prefix replaced."""
    new, old = max(
        ((new, old) for new, old in pairs if url.startswith(old)),
        key=lambda pair: len(pair[1]), default=("", ""),
    )  # fmt: skip
    return new + url.removeprefix(old)


def _rewriting(fetched: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Return the variables that make git in the guest rewrite URLs like the user's git."""
    pairs = [
        (new, old)
        for new, old in fetched
        if _WEB.match(new) and not _has_secret(new) and not _has_secret(old)
    ]
    environment = {"GIT_CONFIG_COUNT": str(len(pairs)) if pairs else ""}
    for number, (new, old) in enumerate(pairs):
        environment[f"GIT_CONFIG_KEY_{number}"] = f"url.{new}.insteadOf"
        environment[f"GIT_CONFIG_VALUE_{number}"] = old
    return environment


def _has_secret(url: str) -> bool:
    """Return True if a URL or URL prefix contains a login other than a user name for ssh."""
    login = url.partition("://")[2].partition("/")[0].rpartition("@")[0]
    return bool(login) and (":" in login or url.lower().startswith(("http:", "https:")))


# All


def _preset(
    name: str,
    urls: Iterable[str],
    environment: dict[str, str] | None = None,
    hints: Iterable[str] = (),
    told: Mapping[str, Sequence[str]] | None = None,
) -> Preset:
    """Return a preset for the configured URLs and the URLs of files that their servers reported."""
    rules = dict.fromkeys(_rule(name, url) for url in urls)
    for url, files in (told or {}).items():
        found = {_rule(name, file): None for file in files}
        if new := [rule for rule in found if rule not in rules]:
            outside = not _leads_inside(url)
            rules |= dict.fromkeys(replace(rule, public_only=outside) for rule in new)
    if len(rules) > _MAX_HOSTS:
        raise HostError(
            f"preset {name}: {len(rules)} hosts are more than anybody configures",
            resolution="write the hosts themselves as rules",
        )
    settings = tuple((key, value) for key, value in (environment or {}).items() if value)
    return Preset(tuple(rules), settings, tuple(dict.fromkeys(f"preset {name}: {hint}" for hint in hints)))


def _rule(name: str, url: str) -> Rule:
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise UsageError(f"preset {name}: {without_login(url)!r} is no URL: {error}") from error
    where = parts.netloc.rpartition("@")[2]
    return replace(parse_rule(f"{parts.scheme}://{where}", f"preset {name}"), preset=name)


def _may_lead(index: str, file: str) -> bool:
    """Return True if an index may refer to a file URL: inside the network only if the index is inside."""
    return not _is_inside(file) or _is_inside(index)


def _is_inside(url: str) -> bool:
    try:
        target = _rule("", url).target
    except UsageError:
        return True
    if isinstance(target, Name):
        return is_loopback_name(target.name)
    address = as_address(str(target))
    return address is None or special_range(address) is not None


def _leads_inside(url: str) -> bool:
    """Return True if a URL's host is inside the network, judged by its addresses."""
    if _is_inside(url):
        return True
    try:
        answers = socket.getaddrinfo(urlsplit(url).hostname, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    return any(special_range(parse_address(str(answer[4][0]))) is not None for answer in answers)


def _installed(program: str, preset: str) -> str:
    path = shutil.which(program)
    if path is None:
        raise _missing(program, preset)
    return path


def _missing(program: str, preset: str) -> UsageError:
    return UsageError(
        f"preset {preset}: {program} is not installed, so nobody knows which hosts it uses",
        resolution=f"install {program}, or write the hosts themselves as rules",
    )
