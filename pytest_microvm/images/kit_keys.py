"""Checks for the keys of a ``kit.toml``, one per key.

A check gets the file, the key and the value, and raises a KitError that names all three.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pytest_microvm.errors import KitError, UsageError
from pytest_microvm.images.kit_errors import bad_value, unknown_key
from pytest_microvm.images.oci.references import parse_reference
from pytest_microvm.images.resources import parse_resources
from pytest_microvm.network.policy.rules import parse_rules
from pytest_microvm.settings.reach import parse_network

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}  # our name: Debian's name

_SUITE = re.compile(r"[a-z][a-z0-9-]*")
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+(:[a-z0-9]+)?(=[A-Za-z0-9.+~:-]+)?")
_WHEEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(\[[A-Za-z0-9._,-]+\])?==[A-Za-z0-9.!+_-]+")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SERVICE = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
_SERVICE_KEYS = ("start", "ready")
_MODE = re.compile(r"0?[0-7]{3,4}")


def _text(path: Path, key: str, value: object) -> None:
    if not isinstance(value, str) or not value.strip() or any(c in value for c in "\0\n\r"):
        raise bad_value(path, key, "a line of text", value, "write text in quotes")


def _matching(pattern: re.Pattern[str], allowed: str) -> Callable[[Path, str, object], None]:
    def check(path: Path, key: str, value: object) -> None:
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise bad_value(path, key, allowed, value, "write it in this form")

    return check


def _each(check: Callable[[Path, str, object], None]) -> Callable[[Path, str, object], None]:
    def check_all(path: Path, key: str, value: object) -> None:
        if not isinstance(value, list):
            raise bad_value(path, key, "a list", value, f'write {key} = ["...", "..."]')
        for number, item in enumerate(value):
            check(path, f"{key}[{number}]", item)

    return check_all


def _architecture(path: Path, key: str, value: object) -> None:
    if value not in ARCHITECTURES:
        raise bad_value(path, key, " or ".join(ARCHITECTURES), value, "write one of these")


def _command(path: Path, key: str, value: object) -> None:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise bad_value(path, key, "a shell command", value, "write text in quotes")


def _environment(path: Path, key: str, value: object) -> None:
    if not isinstance(value, dict):
        raise bad_value(path, key, "a table", value, f'write [{key}] and lines such as NAME = "value"')
    for name, text in value.items():
        if not _VARIABLE.fullmatch(name):
            raise bad_value(
                path, f"{key}.{name}", "a variable's name", name, "use letters, digits and underscores"
            )
        if not isinstance(text, str) or "\0" in text:
            raise bad_value(path, f"{key}.{name}", "text", text, f'write {name} = "..."')


def _services(path: Path, key: str, value: object) -> None:
    if not isinstance(value, dict):
        raise bad_value(path, key, "a table", value, f"write [{key}.NAME] with start and ready")
    for name, service in value.items():
        where = f"{key}.{name}"
        if not _SERVICE.fullmatch(name):
            raise bad_value(path, where, "a service's name", name, "use small letters, digits and dashes")
        if not isinstance(service, dict):
            raise bad_value(path, where, "a table", service, f"write [{where}] with start and ready")
        for part in service:
            if part not in _SERVICE_KEYS:
                raise unknown_key(path, f"{where}.{part}", _SERVICE_KEYS)
        for part in _SERVICE_KEYS:
            _command(path, f"{where}.{part}", service.get(part))


def _file_table(path: Path, key: str, value: object) -> None:
    if not isinstance(value, dict):
        raise bad_value(path, key, "a table", value, f'write [{key}] and "/guest/path" = "file"')
    for target, entry in value.items():
        where = f"{key}.{target}"
        if not target.startswith("/") or target.endswith("/") or {"..", "."} & set(target.split("/")):
            raise bad_value(path, where, "an absolute path of a file", target, 'write it like "/etc/motd"')
        if any(character in target for character in "\0\n"):
            raise bad_value(path, where, "a path without line breaks", target, 'write it like "/etc/motd"')
        if isinstance(entry, str):
            continue
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("source"), str)
            or set(entry) - {"source", "mode"}
        ):
            raise bad_value(path, where, "a file", entry, 'write "file", or {source = "file", mode = "0755"}')
        if "mode" in entry and not (isinstance(entry["mode"], str) and _MODE.fullmatch(entry["mode"])):
            raise bad_value(path, f"{where}.mode", "octal text", entry["mode"], 'write it like "0755"')


def _check_network(path: Path, key: str, value: object) -> None:
    try:
        parse_rules(parse_network(value, f"{path}: {key}"), f"{path}: {key}")
    except UsageError as error:
        raise KitError(error.brief, details=error.details, resolution=error.resolution) from error


def _check_resources(path: Path, key: str, value: object) -> None:
    parse_resources(path, key, value)


def _reference(path: Path, key: str, value: object) -> None:
    _text(path, key, value)
    try:
        parse_reference(str(value), path.parent)
    except UsageError as error:
        raise KitError(f"{path}: {key}: {error.brief}", resolution=error.resolution) from error


CHECKS: dict[str, Callable[[Path, str, object], None]] = {
    "description": _text,
    "parent": _text,
    "from": _reference,
    "suite": _matching(_SUITE, "a Debian suite such as trixie"),
    "mirror": _text,
    "architecture": _architecture,
    "packages": _each(_matching(_PACKAGE, "the name of a Debian package")),
    "wheels": _each(_matching(_WHEEL, "a pinned requirement such as pytest==9.2.0")),
    "sdists": _each(_matching(_WHEEL, "a pinned requirement such as pytest==9.2.0")),
    "files": _file_table,
    "environment": _environment,
    "setup": _each(_command),
    "setup_network": _check_network,
    "services": _services,
    "resources": _check_resources,
    "network": _check_network,
}
