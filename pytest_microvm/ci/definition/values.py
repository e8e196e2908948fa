"""Parsers for the job keys that have none among the parsers of the machine's spec."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar, cast, get_args

from pytest_microvm.ci.definition.job import GrantedCredential, GrantedSecret, Step, When
from pytest_microvm.errors import UsageError
from pytest_microvm.settings.configuration import parse_strings
from pytest_microvm.settings.credentials import parse_credential
from pytest_microvm.settings.secret_values import parse_secrets as parse_plain_secrets
from pytest_microvm.settings.spec import PARSERS, check_minimum, parse_choice
from pytest_microvm.untrusted.text import sanitize_line

VARIABLE = r"[A-Za-z_][A-Za-z0-9_]{0,127}"
WHENS: tuple[When, ...] = get_args(When)

MAX_RETRIES = 10
MAX_STEPS = 100
MAX_TEXT = 64 * 1024
"""Maximum number of characters of a command or of a variable's value."""
MAX_TITLE = 60
"""Maximum number of characters of a step's name."""

T = TypeVar("T")

_STEP_KEYS = ("run", "name", "when")
_DURATION = re.compile(r"(?:([0-9]{1,4})h)?(?:([0-9]{1,5})m)?(?:([0-9]{1,7})s)?", re.ASCII)


def check_keys(table: object, known: Collection[str], where: str, example: str) -> Mapping[str, Any]:
    """Return ``table`` after checking that it is a table and has known keys only.

    Args:
        table: The written value.
        known: The keys it may have.
        where: The table's place in the file; a dot and the key are appended for errors.
        example: A valid spelling, for errors.

    Raises:
        UsageError: The value is no table, or has an unknown key.
    """
    if not isinstance(table, Mapping):
        raise not_a_table(table, where, example)
    for key in table:
        if key not in known:
            raise unknown_key(f"{where}.{key}", key, known)
    return table


def not_a_table(value: object, where: str, example: str) -> UsageError:
    """Return the error for a value in a table's place; it omits the value, which may hold a secret."""
    return UsageError(
        f"{where}: invalid value: expected a table, got {type(value).__name__}", resolution=f"write {example}"
    )


def unknown_key(where: str, key: str, known: Collection[str]) -> UsageError:
    """Return the error for an unknown key, with a suggestion if a known key is similar."""
    import difflib  # noqa: PLC0415 - only for an error

    close = difflib.get_close_matches(key, known, 1)
    meant = f"did you mean {close[0]!r}? " if close else ""
    return UsageError(f"{where}: unknown key", resolution=meant + "known keys: " + ", ".join(known))


def parse_with_minimum(name: str) -> Callable[[object, str], int]:
    """Return a parser for a size of the spec that also enforces the size's minimum, if it has one."""

    def parse(value: object, where: str) -> int:
        size: int = PARSERS[name](value, where)
        check_minimum(where, name, size)
        return size

    return parse


def without_quotes(parse: Callable[[object, str], T]) -> Callable[[object, str], T]:
    """Return a parser that accepts numbers only, from one that also parses texts of a command line."""

    def parse_number(value: object, where: str) -> T:
        if isinstance(value, str):
            raise UsageError(
                f"{where}: invalid number: expected digits without quotes, got {value!r}",
                resolution="remove the quotes",
            )
        return parse(value, where)

    return parse_number


def parse_duration(value: object, where: str) -> float:
    """Return seconds from a number, or from a text such as ``90s``, ``10m``, ``1h30m``."""
    seconds = 0.0
    if isinstance(value, str):
        match = _DURATION.fullmatch(value)
        hours, minutes, rest = (int(part or 0) for part in match.groups()) if match else (0, 0, 0)
        seconds = float(hours * 3600 + minutes * 60 + rest)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        seconds = float(value)
    if not 0 < seconds < float("inf"):
        raise UsageError(
            f"{where}: invalid time: expected a number of seconds above 0, or a text, got {value!r}",
            resolution='write it like 90, "90s", "10m" or "1h30m"',
        )
    return seconds


def parse_commands(value: object, where: str) -> tuple[str, ...]:
    """Return shell commands from a list of texts.

    Raises:
        UsageError: The value is no list of shell commands.
    """
    return tuple(parse_command(each, f"{where}[{at}]") for at, each in enumerate(parse_strings(value, where)))


def parse_command(value: object, where: str) -> str:
    """Return a shell command.

    Raises:
        UsageError: The value is no shell command.
    """
    if not isinstance(value, str) or not value.strip() or "\0" in value or len(value) > MAX_TEXT:
        raise UsageError(
            f"{where}: invalid shell command: expected a text of 1 to {MAX_TEXT} characters",
            resolution="write the command in quotes; a longer one belongs into a script",
        )
    return value


def parse_steps(value: object, where: str) -> tuple[Step, ...]:
    """Return steps from a list of commands and tables.

    Raises:
        UsageError: The value is no list of steps.
    """
    if not isinstance(value, list) or not 0 < len(value) <= MAX_STEPS:
        raise UsageError(
            f"{where}: invalid steps: expected a list of 1 to {MAX_STEPS} steps",
            resolution='write it like ["make", {run = "make test", name = "tests"}]',
        )
    return tuple(_step(each, f"{where}[{at}]") for at, each in enumerate(value))


def _step(value: object, where: str) -> Step:
    if isinstance(value, str):
        value = {"run": value}
    table = check_keys(value, _STEP_KEYS, where, '"make test" or {run = "make test"}')
    if "run" not in table:
        raise UsageError(
            f"{where}: invalid step: expected a command, got none", resolution='write run = "make test"'
        )
    command = parse_command(table["run"], f"{where}.run")
    first = sanitize_line(command.strip().splitlines()[0])
    title = first if len(first) <= MAX_TITLE else first[: MAX_TITLE - 3] + "..."
    return Step(
        command,
        parse_title(table["name"], f"{where}.name") if "name" in table else title,
        parse_when(table.get("when", "success"), f"{where}.when"),
    )


def parse_title(value: object, where: str) -> str:
    """Return a step's name, which must fit one line.

    Raises:
        UsageError: The value is no such name.
    """
    if not isinstance(value, str) or not value.strip() or not value.isprintable() or len(value) > MAX_TITLE:
        raise UsageError(
            f"{where}: invalid name: expected 1 to {MAX_TITLE} characters in one line, got {value!r}",
            resolution='write it like "unit tests"',
        )
    return value


def parse_when(value: object, where: str) -> When:
    """Return the condition for running a step: ``success``, ``failure`` or ``always``.

    Raises:
        UsageError: The value is no such condition.
    """
    return cast(When, parse_choice(*WHENS)(value, where))


def parse_variables(value: object, where: str) -> tuple[tuple[str, str], ...]:
    """Return names and values from a table of texts and numbers.

    Raises:
        UsageError: The value is no table of variables.
    """
    if not isinstance(value, Mapping):
        raise not_a_table(value, where, '{NAME = "value"}')
    for name, text in value.items():
        if not re.fullmatch(VARIABLE, name, re.ASCII):
            raise UsageError(
                f"{where}: invalid name: expected letters, digits and underscores, got {name!r}",
                resolution="name it as a variable of the shell",
            )
        if isinstance(text, bool) or not isinstance(text, (str, int, float)):
            raise UsageError(
                f"{where}.{name}: invalid value: expected text or a number, got {type(text).__name__}",
                resolution="write it in quotes",
            )
        if "\0" in str(text) or len(str(text)) > MAX_TEXT:
            raise UsageError(
                f"{where}.{name}: invalid value: expected at most {MAX_TEXT} characters and no NUL",
                resolution="hand long values over in a file",
            )
    return tuple((name, str(text)) for name, text in value.items())


def parse_paths(value: object, where: str) -> tuple[str, ...]:
    """Return paths or globs that stay below the workspace's top.

    Raises:
        UsageError: The value is no list of such paths.
    """
    for at, path in enumerate(parse_strings(value, where)):
        if path.startswith("/") or ".." in path.split("/") or "\0" in path:
            raise UsageError(
                f"{where}[{at}]: invalid path: expected one inside the workspace, got {path!r}",
                resolution="write it relative to the top of the sources, without ..",
            )
    return parse_strings(value, where)


def parse_needs(value: object, where: str) -> tuple[str, ...]:
    """Return the names of jobs from a list without duplicates.

    Raises:
        UsageError: The value is no such list.
    """
    found = parse_strings(value, where)
    if len(set(found)) < len(found):
        raise UsageError(f"{where}: a job is there twice", resolution="name it once")
    return found


def parse_branches(value: object, where: str) -> tuple[str, ...]:
    """Return globs of branches from a list that is not empty.

    Raises:
        UsageError: The value is no such list.
    """
    found = parse_strings(value, where)
    if not found:
        raise UsageError(
            f"{where}: invalid branches: expected one glob or more, got none",
            resolution='write it like ["main", "release-*"]',
        )
    return found


def parse_hosts(value: object, where: str) -> Any:
    """Return the destinations of host names from a table.

    Raises:
        UsageError: The value is no such table.
    """
    if not isinstance(value, Mapping):
        raise not_a_table(value, where, '{"api.example.com" = "127.0.0.1:8443"}')
    return PARSERS["hosts"](value, where)


def parse_secrets(value: object, where: str) -> tuple[GrantedSecret, ...]:
    """Return secrets, each with the branches that may have it, from a table.

    Raises:
        UsageError: The value is no such table.
    """
    if not isinstance(value, Mapping):
        raise not_a_table(value, where, '{NAME = {env = "VARIABLE"}}')
    found = []
    for name, said in value.items():
        rest, branches = _granted(said, f"{where}.{name}")
        found += [GrantedSecret(secret, branches) for secret in parse_plain_secrets({name: rest}, where)]
    return tuple(found)


def parse_credentials(value: object, where: str) -> tuple[GrantedCredential, ...]:
    """Return credentials, each with the branches that may use it, from a list of tables.

    Raises:
        UsageError: The value is no such list.
    """
    example = '[{host = "api.example.com", value = {env = "TOKEN"}, branches = ["main"]}]'
    if not isinstance(value, list):
        raise UsageError(
            f"{where}: invalid credentials: expected a list, got {type(value).__name__}",
            resolution=f"write {example}",
        )
    found = []
    for at, said in enumerate(value):
        place = f"{where}[{at}]"
        rest, branches = _granted(said, place)
        found.append(GrantedCredential(parse_credential(rest, place), branches))
    return tuple(found)


def _granted(value: object, where: str) -> tuple[Mapping[str, object], tuple[str, ...]]:
    """Return a table without ``branches``, and these; errors omit the value, which may hold a secret."""
    if not isinstance(value, Mapping):
        raise UsageError(
            f"{where}: invalid value: expected a table, got {type(value).__name__}",
            details="the value itself does not belong into the definition",
            resolution='write where it is found, such as {env = "VARIABLE", branches = ["main"]}',
        )
    branches = parse_branches(value["branches"], f"{where}.branches") if "branches" in value else ()
    return {key: item for key, item in value.items() if key != "branches"}, branches
