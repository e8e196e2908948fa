"""Commands that print a secret: the user's own programs, started in ``/`` with a clean environment.

A project's configuration may name such a command, and the user approves its words. Nothing that another
branch can change may change their meaning: no program, script or other file of the project, no working
directory where ``make`` finds a ``Makefile``, no variable such as ``PYTHONPATH`` that leads into the project.
"""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pytest_microvm.errors import UsageError

PASSED = (
    # user, language, terminal
    "HOME", "USER", "LOGNAME", "LANG", "LANGUAGE", "LC_*", "TZ", "TERM",
    # the session: D-Bus, the desktop that a password prompt appears on, agents
    "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME",
    "XDG_SESSION_*",
    "DBUS_SESSION_BUS_ADDRESS", "DISPLAY", "WAYLAND_DISPLAY", "XAUTHORITY", "SSH_AUTH_SOCK", "GPG_TTY",
    # password managers: GnuPG and pass, 1Password, Bitwarden, Vault
    "GNUPGHOME", "PINENTRY_USER_DATA", "PASSWORD_STORE_DIR", "PASSWORD_STORE_KEY",
    "OP_ACCOUNT", "OP_SERVICE_ACCOUNT_TOKEN", "OP_SESSION_*", "BW_SESSION",
    "VAULT_ADDR", "VAULT_NAMESPACE", "VAULT_TOKEN",
    # how a manager in the network is reached
    "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy",
    "no_proxy", "SSL_CERT_FILE", "SSL_CERT_DIR",
)  # fmt: skip
"""The variables that a command gets, besides ``PATH``, unless their value names a path in the project."""

MAX_LENGTH = 4096  # characters of a command
_TIMEOUT = 120.0  # seconds; a password manager may ask its user
_LINKS = 40  # the most that Linux follows, path_resolution(7)
_SCRIPT = 256  # bytes of a script's first line that Linux reads, execve(2)
_OTHERS_PLACES = re.compile(r"/proc/[^/]*/(?:cwd|root|fd|task)\b")  # may lead into the project
_PIECE = re.compile(r"[^\s:;,=|&<>()'\"`@\[\]{}]+")


class UsesProject(UsageError):
    """A command uses a file that a branch of the project may change."""


class NotStarted(UsageError):
    """A command cannot be started."""


@dataclass(frozen=True)
class Command:
    """A command that prints a secret, ready to start.

    Args:
        argv: The program's absolute path, and its arguments.
        environment: All its variables.
    """

    argv: tuple[str, ...]
    environment: Mapping[str, str]


def changeable(project: Path) -> tuple[Path, ...]:
    """Return the folders whose files another branch may change: the project, and repositories around it.

    A repository at the user's home or above it is left out: counting it would leave no usable program.
    """
    folder, home = project.resolve(), Path.home().resolve()
    around = [each for each in folder.parents if os.path.lexists(each / ".git")]
    found = (folder, *(each for each in around if not home.is_relative_to(each)))
    return tuple(each for each in found if each != each.parent)  # the root directory is no project


def prepared(command: str, name: str, project: Path | None) -> Command:
    """Validate a command as configured and return it ready to start.

    Args:
        command: The words, quoted as for a shell; no shell reads them.
        name: The secret's name, for errors.
        project: The folder whose files it must not use; ``None``: there is none.

    Raises:
        UsesProject: It uses a file of the project, or is named by a relative path.
        NotStarted: There is no such program, or the words cannot be parsed.
    """
    words = _words(command, name)
    folders = () if project is None else changeable(project)
    environment = _environment(folders)
    program = _program(words[0], name, environment["PATH"])
    found = next(_uses(program, words[1:], folders, project), None)
    if found is not None:
        raise UsesProject(
            f"{name}: the command {words[0]!r} uses {found}, which belongs to the project",
            details="another branch may have something else there, behind the same words",
            resolution="use a program, and files, outside the project; it starts in / and not in the project",
        )
    return Command((program, *words[1:]), environment)


def run(command: str, name: str, project: Path | None) -> bytes:
    """Run a command and return its standard output; see :func:`prepared`.

    Raises:
        UsageError: It cannot be started, uses a file of the project, or fails.
    """
    start = prepared(command, name, project)
    shown = start.argv[0]
    try:
        done = subprocess.run(
            start.argv, cwd="/", env=start.environment, stdout=subprocess.PIPE, timeout=_TIMEOUT, check=False
        )
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        kind = type(error).__name__  # the error's text may contain output
        raise NotStarted(f"{name}: the command {shown!r} could not be run ({kind})") from None
    if done.returncode != 0:
        raise UsageError(
            f"{name}: the command {shown!r} ended with status {done.returncode}",
            resolution="run it by hand, in /; it must print the value alone",
        )
    return done.stdout


def _words(command: str, name: str) -> list[str]:
    if len(command) > MAX_LENGTH or "\0" in command:
        raise NotStarted(
            f"{name}: the command is longer than {MAX_LENGTH} characters, or has a NUL character",
            resolution="put it into a script outside the project",
        )
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise NotStarted(f"{name}: invalid command: {error}", resolution="quote it as for a shell") from None
    if not words or not words[0]:
        raise NotStarted(f"{name}: the command is empty", resolution="write a program and its arguments")
    return words


def _program(word: str, name: str, path: str) -> str:
    """Return the absolute path of a program."""
    if word.startswith("~/"):
        word = os.path.expanduser(word)  # noqa: PTH111 - a Path would change other spellings
    if "/" in word and not word.startswith("/"):
        raise UsesProject(
            f"{name}: the command {word!r} is relative to the folder that it was written for",
            resolution="write a program's name, or an absolute path outside the project",
        )
    found = word if "/" in word else shutil.which(word, path=path)
    if found is None:
        raise NotStarted(
            f"{name}: the command {word!r} could not be run: no such program",
            details=f"PATH without what is relative or in the project: {path}",
            resolution="install it outside the project, or write its absolute path",
        )
    return found


def _uses(
    program: str, arguments: Sequence[str], folders: Sequence[Path], project: Path | None
) -> Iterator[str]:
    """Yield the paths named by a command's words that lead into one of ``folders``."""
    if _leads_into(program, folders):
        yield program
    for word in (*arguments, *_interpreter(program)):
        if (found := _OTHERS_PLACES.search(word)) is not None:
            yield found[0]
        for path in _named(word):
            if _leads_into(path, folders):
                yield path
    for word in arguments:  # relative to the project: not found from /, and its own error would not say why
        relative = not word.startswith("/") and ("/" in word or "." in word)
        if project is not None and relative and os.path.isfile(project / word):  # noqa: PTH113 - any word
            yield word


def _interpreter(program: str) -> list[str]:
    """Return the interpreter and arguments on a script's ``#!`` line; empty if there is none."""
    try:
        with open(program, "rb") as file:  # noqa: PTH123 - as it is spelt
            line = file.readline(_SCRIPT)
    except (OSError, ValueError):  # starting it will raise the same error
        return []
    return line[2:].decode(errors="surrogateescape").split() if line.startswith(b"#!") else []


def _named(word: str) -> Iterator[str]:
    """Yield every absolute path that a word may name: alone, in an option, a list, or words for a shell."""
    home = os.path.expanduser("~")  # noqa: PTH111 - a string is needed
    for spelling in {word, word.replace("${HOME}", home).replace("$HOME", home)}:
        for match in _PIECE.finditer(spelling):
            for piece in (match[0], spelling[match.start() :]):
                slash = piece.find("/")
                if slash >= 0:
                    yield piece[slash:]
                yield os.path.expanduser(piece) if piece.startswith("~") else f"/{piece}"  # noqa: PTH111


def _leads_into(path: str, folders: Sequence[Path]) -> bool:
    """Return True if a path is in one of ``folders``, or passes one by a link; see path_resolution(7)."""
    inside = {str(folder) for folder in folders}
    place, left, links = "/", path.split("/")[::-1], 0
    while left:
        part = left.pop()
        if part in ("", ".", ".."):
            place = os.path.dirname(place) if part == ".." else place  # noqa: PTH120 - its links are resolved
            continue
        place = os.path.join(place, part)  # noqa: PTH118
        if place in inside:
            return True
        try:
            target = os.readlink(place)  # noqa: PTH115 - usually not a link
        except (OSError, ValueError):
            continue
        links += 1
        if links > _LINKS:
            return False  # the kernel fails with ELOOP
        place = "/" if target.startswith("/") else os.path.dirname(place)  # noqa: PTH120
        left += target.split("/")[::-1]
    return False


def _environment(folders: Sequence[Path]) -> dict[str, str]:
    """Return a command's variables: :data:`PASSED` and ``PATH``, without paths into the project."""
    path = os.environ.get("PATH", os.defpath).split(":")
    kept = [folder for folder in path if folder.startswith("/") and not _leads_into(folder, folders)]
    passed = {
        name: value
        for name, value in os.environ.items()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in PASSED)
        and not any(_leads_into(each, folders) for each in _named(value))
    }
    return {**passed, "PATH": ":".join(kept) or os.defpath}
