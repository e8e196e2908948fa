"""Divide a project's ``addopts`` between the host's pytest and the machine's by an allow-list.

pytest obeys ``addopts`` as if the user had typed it. On the host a project may select tests and format
results; every other option goes to the machine, where pytest reads the same configuration.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pytest_microvm.errors import UsageError
from pytest_microvm.settings.options import BY_NAME, GRANTS
from pytest_microvm.suite.arguments import (
    ACTING,
    DEBUGGING,
    REPORT_FILES,
    SELECTING_AND_SHOWING,
    WORKERS,
    Token,
    tokens,
)
from pytest_microvm.untrusted.text import sanitize_line

_ADDOPTS = "addopts of the project's configuration"
_NEXT = "say it yourself on the command line, or run `pytest-microvm test`, which lets no project do this"
_HOST_AND_GUEST = frozenset(["--tb"])
_WITHOUT_EFFECT = frozenset(["-c", "--config-file", "--rootdir"])  # pytest has already decided both
_OVERRIDE = frozenset(["-o", "--override-ini"])
_PLUGIN = "-p"

_FOR_THE_TERMINAL = DEBUGGING | {"--pdbcls"}
_WRITING = frozenset(["--basetemp", "--log-file"])  # given by the user, both sides obey them

_HOST_PLUGINS_OFF = frozenset(["no:cacheprovider"])
_OURS = "--microvm"
_ASKING = ("image", "nested", "write_back", "keep_tmp", "git", "debug_port")  # besides the grants
_GRANTING = frozenset(f"--microvm-{option.word}" for option in (*map(BY_NAME.__getitem__, _ASKING), *GRANTS))
_NAMING_FOLDERS = frozenset(["--microvm-artifacts"])
_INTERNAL = frozenset(["--microvm-launched"])
_NEVER_OF_A_PROJECT = ACTING | REPORT_FILES | _WRITING | _NAMING_FOLDERS | _INTERNAL | _FOR_THE_TERMINAL

SHOWN_KEYS: Mapping[str, Callable[[str], bool]] = {
    "console_output_style": lambda text: text.replace("-", "").isalpha(),
    "log_cli": str.isalnum,
    "junit_suite_name": lambda text: text.isprintable(),
    "junit_logging": lambda text: text.replace("-", "").isalpha(),
    "junit_log_passing_tests": str.isalnum,
    "junit_duration_report": str.isalpha,
    "junit_family": str.isalnum,
    "verbosity_test_cases": str.isalnum,
    "verbosity_subtests": str.isalnum,
    "max_warnings": str.isdecimal,
    "tmp_path_retention_policy": frozenset(["all", "failed", "none"]).__contains__,
    "testpaths": lambda text: all(_stays_below(path) for path in shlex.split(text)),
}
"""Keys of pytest's configuration that the host obeys, each with a check of its value: most format results."""


@dataclass(frozen=True)
class ProjectWords:
    """A project's ``addopts``, divided.

    Args:
        host: Words for the host's pytest; each is one word that begins with its option.
        guest: Words for the machine's pytest.
        left: Words that are dropped: options that would act on this computer.
    """

    host: tuple[str, ...]
    guest: tuple[str, ...]
    left: tuple[str, ...]


def addopts_words(value: Any, path: Path | None) -> list[str]:
    """Return the words of a configuration's ``addopts``.

    Raises:
        UsageError: The value is neither text nor a list of texts, or a quotation does not end.
    """
    if isinstance(value, list) and all(isinstance(word, str) for word in value):
        return value
    try:
        if isinstance(value, str):
            return shlex.split(value)
    except ValueError as error:
        raise UsageError(
            f"{path}: invalid addopts: expected words as in a shell, got {sanitize_line(value)!r} ({error})",
            resolution="close the quotation, or escape the quotation mark",
        ) from error
    raise UsageError(
        f"{path}: invalid addopts: expected text or a list of texts, got {type(value).__name__}",
        resolution='write it like ["-x", "--tb=short"]',
    )


def refuse_granting(addopts: Sequence[str]) -> None:
    """Check that a project's own ``addopts`` grant its tests nothing beyond its files.

    Raises:
        UsageError: An option grants more, or names a file of more options (``@FILE``).
    """
    for word in addopts:
        option = word.partition("=")[0]
        if option in _GRANTING or word.startswith("@"):
            raise UsageError(
                f"{_ADDOPTS} has {sanitize_line(option)}, which only who runs it may say",
                resolution="write the key in [tool.pytest-microvm], then `pytest-microvm trust`; "
                "or say it on the command line",
            )


def refuse_acting(addopts: Sequence[str], users: Sequence[str], arity: Mapping[str, str]) -> None:
    """Check that a project's own ``addopts`` have no options that act on the host: pytest would obey them.

    Args:
        addopts: The words.
        users: The user's words, which override the project's where only one can apply.
        arity: The known options, from :func:`~pytest_microvm.suite.arguments.option_arity`.

    Raises:
        UsageError: An option acts on the host.
    """
    named = REPORT_FILES if _names(users, REPORT_FILES, arity) else frozenset()
    for token in tokens(addopts, arity):
        acts = token.option in _NEVER_OF_A_PROJECT - named
        if acts or _is_ours_switched_off(token) or overridden_key(token) in {"cache_dir", "log_file"}:
            raise UsageError(
                f"{_ADDOPTS} has {_shown(token)}, which acts on this computer, outside any machine",
                resolution=_NEXT,
            )


def divide_addopts(
    addopts: Sequence[str], users: Sequence[str], arity: Mapping[str, str], reports: Path | None = None
) -> ProjectWords:
    """Divide a project's own ``addopts`` between the host and the machine.

    Args:
        addopts: The words.
        users: The user's words, which override the project's where only one can apply.
        arity: The known options, from :func:`~pytest_microvm.suite.arguments.option_arity`.
        reports: The folder for files that the project names; ``None``: options that name one are refused.

    Raises:
        UsageError: An option is a grant, names a file to write, or does not work with machines.
    """
    refuse_granting(addopts)
    host: list[str] = []
    guest: list[str] = []
    left: list[str] = []
    for token in tokens(addopts, arity):
        kind = next((kind for kind in (REPORT_FILES, _NAMING_FOLDERS) if token.option in kind), None)
        if token.option in _FOR_THE_TERMINAL:
            raise UsageError(
                f"{_ADDOPTS} has {token.option}, which lends your terminal to the tests",
                resolution="say it yourself on the command line",
            )
        if kind is not None:
            host += [] if _names(users, kind, arity) else [f"{token.option}={_below(reports, token)}"]
        elif token.option in ACTING | WORKERS | _INTERNAL:
            left.append(_shown(token))
        elif token.option not in _WITHOUT_EFFECT:
            host += _for_host(token)
            guest += _for_guest(token)
    return ProjectWords(tuple(host), tuple(guest), tuple(left))


def shown_values(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield a configuration's keys of :data:`SHOWN_KEYS` whose values are allowed, as ``key=value``."""
    for key, allowed in SHOWN_KEYS.items():
        value = values.get(key)
        if isinstance(value, list) and all(isinstance(each, str) for each in value):
            value = shlex.join(value)
        text = str(value).lower() if isinstance(value, bool) else value
        if isinstance(text, (str, int)) and _allows(allowed, str(text)):
            yield f"{key}={text}"


def _names(words: Sequence[str], options: frozenset[str], arity: Mapping[str, str]) -> bool:
    return any(token.option in options for token in tokens(words, arity))


def _allows(allowed: Callable[[str], bool], text: str) -> bool:
    try:
        return allowed(text)
    except ValueError:  # a quotation that does not end
        return False


def _for_host(token: Token) -> list[str]:
    """Return a token's part for the host as single words: pytest looks for ``-p`` at the start of each."""
    option, value = token.option, token.value
    if option in SELECTING_AND_SHOWING | _HOST_AND_GUEST or option.startswith(_OURS):
        return _joined(option, value)
    if option == _PLUGIN and (value or "").strip() in _HOST_PLUGINS_OFF:
        return [f"-p{(value or '').strip()}"]
    key = overridden_key(token)
    if key in SHOWN_KEYS and _allows(SHOWN_KEYS[key], (value or "").partition("=")[2]):
        return [f"--override-ini={value}"]
    return []


def _for_guest(token: Token) -> tuple[str, ...]:
    if token.option in SELECTING_AND_SHOWING or token.option.startswith(_OURS):
        return ()
    return token.words


def _shown(token: Token) -> str:
    return sanitize_line(" ".join(token.words))


def _joined(option: str, value: str | None) -> list[str]:
    if value is None:
        return [option]
    if option.startswith("--"):
        return [f"{option}={value}"]
    return [f"{option}{value}"] if value else []  # an empty -k, -m or -r has no effect


def overridden_key(token: Token) -> str:
    """Return the key of pytest's configuration that ``-o`` sets; "" for any other option."""
    return (token.value or "").partition("=")[0].strip() if token.option in _OVERRIDE else ""


def _is_ours_switched_off(token: Token) -> bool:
    value = (token.value or "").strip()
    return token.option == "--disable-plugin-autoload" or (
        token.option == _PLUGIN and value.startswith("no:") and "microvm" in value
    )


def _below(reports: Path | None, token: Token) -> Path:
    """Return the path below ``reports`` for a file that the project names.

    Raises:
        UsageError: There is no such folder, or the path would leave it.
    """
    path = token.value or ""
    if reports is None:
        raise UsageError(
            f"{_ADDOPTS} has {_shown(token)}, which writes on this computer",
            resolution="say --microvm-reports=DIR, a folder for what the project may write; or say "
            f"{token.option} yourself",
        )
    if not _stays_below(path):
        raise UsageError(
            f"{_ADDOPTS} has {_shown(token)}, which leads out of {reports}",
            resolution="the project must name a path below its own folder",
        )
    return reports / path


def _stays_below(path: str) -> bool:
    pure = PurePosixPath(path)
    return path.isprintable() and not pure.is_absolute() and not {"..", "**", "~"} & set(pure.parts)
