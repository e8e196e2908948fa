"""Secret values: their sources, and a type that holds them on the host without exposing them.

A :class:`SecretSource` names the place of a value; it is part of a spec and can be shown and compared.
Reading it returns a :class:`SecretValue`, which never appears in a repr, a log, a pickle or an f-string.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn, get_args

from pytest_microvm.errors import UsageError
from pytest_microvm.settings import secret_commands
from pytest_microvm.untrusted.nofollow import refuse_links

Kind = Literal["env", "file", "command", "keyring"]
KINDS: tuple[Kind, ...] = get_args(Kind)
MAX_BYTES = 64 * 1024
"""The longest value in bytes; a key, a token or a certificate is shorter."""

FOLDER = "/run/secrets"
"""The machine's folder for secrets that are delivered as files."""

Delivery = Literal["env", "file"]

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}", re.ASCII)


class SecretValue:
    """A secret value that only :meth:`reveal` exposes.

    Args:
        value: The secret itself.
        name: Its name, for messages.
    """

    __slots__ = ("_value", "name")

    def __init__(self, value: str, name: str) -> None:
        self._value = value
        self.name = name

    def reveal(self) -> str:
        """Return the value itself."""
        return self._value

    def __repr__(self) -> str:
        return f"<secret {self.name}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SecretValue) and (self._value, self.name) == (other._value, other.name)

    def __hash__(self) -> int:
        return hash((self._value, self.name))

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{self!r} is not to be copied or stored")


@dataclass(frozen=True)
class SecretSource:
    """The source of a secret value on the host.

    Args:
        kind: ``env``: a variable; ``file``: a file's content without the final newline; ``command``: a
            command's output, also without it (it starts in ``/``); ``keyring``: ``SERVICE/USER`` in the
            system's keyring.
        where: The variable, path, command or entry.
    """

    kind: Kind
    where: str

    def read(self, name: str, project: Path | None = None) -> SecretValue:
        """Read the value.

        Args:
            name: The name of the value, also for errors.
            project: The folder whose files a command must not use; see
                :mod:`pytest_microvm.settings.secret_commands`.

        Raises:
            UsageError: The value is missing, empty or invalid, or the command uses the project.
        """
        value = _READERS[self.kind](self.where, name, project)
        if self.kind in ("file", "command"):
            value = value.removesuffix("\n").removesuffix("\r")
        if not value:
            raise UsageError(f"{name}: {self} is empty", resolution="a secret must have a value")
        if len(value.encode(errors="surrogateescape")) > MAX_BYTES or "\0" in value:
            raise UsageError(
                f"{name}: invalid value of {self}: expected at most {MAX_BYTES} bytes and no NUL character",
                resolution="hand files over with a mount",
            )
        return SecretValue(value, name)

    def __str__(self) -> str:
        shown = f"{_program(self.where)} ..." if self.kind == "command" else self.where
        return f"{self.kind} {shown}"


def parse_source(value: object, where: str) -> SecretSource:
    """Parse a source written as ``{env = "TOKEN"}`` or ``"env:TOKEN"``.

    Args:
        value: The value to parse.
        where: The place that ``value`` comes from, for errors.

    Raises:
        UsageError: It names no source.
    """
    if isinstance(value, str) and ":" in value:
        kind, _, name = value.partition(":")
        value = {kind: name}
    if isinstance(value, Mapping) and len(value) == 1:
        kind, name = next(iter(value.items()))
        if kind in KINDS and isinstance(name, str) and name.strip():
            return SecretSource(kind, name)
    # The error does not quote the input: it may be the secret itself.
    raise UsageError(
        f"{where}: invalid source of a value: expected a variable, file, command or entry of the keyring",
        details="the value itself does not belong into configuration or onto a command line",
        resolution="write one of "
        + ", ".join(f'{{{kind} = "..."}}' for kind in KINDS)
        + " (on the command line env:NAME and so on)",
    )


@dataclass(frozen=True)
class Secret:
    """A secret that a machine gets at run time.

    Args:
        name: The name of the variable or file.
        source: The source of its value on the host.
        delivery: ``env``: a variable of every command; ``file``: ``/run/secrets/NAME``, mode 0400, in memory.
    """

    name: str
    source: SecretSource
    delivery: Delivery = "env"

    @property
    def path(self) -> str:
        """Its path in the machine if it is delivered as a file."""
        return f"{FOLDER}/{self.name}"


def parse_secrets(value: object, where: str) -> tuple[Secret, ...]:
    """Parse secrets from a table ``{NAME = {env = "TOKEN"}}`` or a list of ``NAME=env:TOKEN``.

    Args:
        value: The value to parse.
        where: The place that ``value`` comes from, for errors.

    Raises:
        UsageError: It has another form, or names a secret twice.
    """
    if isinstance(value, (list, tuple)) and all(isinstance(item, Secret) for item in value):
        return tuple(value)
    if isinstance(value, Mapping):
        pairs = list(value.items())
    elif isinstance(value, (list, tuple)) and all(isinstance(item, str) and "=" in item for item in value):
        pairs = [(name, _written(text)) for name, _, text in (item.partition("=") for item in value)]
    else:
        raise UsageError(
            f"{where}: invalid secrets: expected names with their sources",
            resolution='write {NAME = {env = "VARIABLE"}}, or on the command line NAME=env:VARIABLE',
        )
    found = tuple(_secret(name, text, where) for name, text in pairs)
    names = [secret.name for secret in found]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"{where}: {name} is named twice", resolution="name it once")
    return found


def _written(text: str) -> object:
    """Parse ``env:VARIABLE[,as=file]`` into a table."""
    source, _, delivery = text.partition(",as=")
    kind, _, name = source.partition(":")
    return {kind: name, "as": delivery} if delivery else {kind: name}


def _secret(name: object, value: object, where: str) -> Secret:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UsageError(
            f"{where}: invalid name: expected letters, digits and underscores, got {name!r}",
            resolution="write it like API_TOKEN",
        )
    delivery: object = "env"
    if isinstance(value, Mapping):
        delivery = value.get("as", "env")
        value = {key: item for key, item in value.items() if key != "as"}
    for known in get_args(Delivery):
        if known == delivery:
            return Secret(name, parse_source(value, f"{where}: {name}"), known)
    raise UsageError(
        f"{where}: {name}: invalid as: expected one of {', '.join(get_args(Delivery))}, got {delivery!r}",
        resolution="write one of these, or leave it out",
    )


def _from_environment(where: str, name: str, _project: Path | None) -> str:
    try:
        return os.environ[where]
    except KeyError:
        raise UsageError(
            f"{name}: the variable {where} is not set", resolution="set it, then run again"
        ) from None


def _from_file(where: str, name: str, project: Path | None) -> str:
    path = Path(where).expanduser().absolute()
    if project is not None:
        refuse_links(project, path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 2)
    except OSError as error:
        raise UsageError(f"{name}: {path} cannot be read: {error.strerror}") from error
    return data.decode(errors="surrogateescape")


def _from_command(where: str, name: str, project: Path | None) -> str:
    return secret_commands.run(where, name, project).decode(errors="surrogateescape")


def _program(command: str) -> str:
    """Return a command's first word, without its arguments, which may reveal a secret."""
    return command.split(maxsplit=1)[0]


def _from_keyring(where: str, name: str, _project: Path | None) -> str:
    service, _, user = where.rpartition("/")
    try:
        import keyring  # noqa: PLC0415 - an optional dependency
    except ImportError:
        raise UsageError(
            f"{name}: reading the keyring needs the package keyring",
            resolution="pip install 'pytest-microvm[keyring]', or use another source",
        ) from None
    found: str | None = keyring.get_password(service, user) if service and user else None
    if found is None:
        raise UsageError(
            f"{name}: the keyring has no entry {where!r}", resolution="write SERVICE/USER, as it was stored"
        )
    return found


_READERS = {"env": _from_environment, "file": _from_file, "command": _from_command, "keyring": _from_keyring}
