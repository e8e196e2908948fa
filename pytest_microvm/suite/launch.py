"""Run the host's pytest for ``pytest-microvm test``, isolated from the project's configuration.

pytest obeys a project's configuration (options, import paths, output paths, plug-ins) before it calls any
plug-in. The launcher therefore hides the file from the host's pytest: it parses the file as data
(:mod:`pytest_microvm.suite.project_file`), passes the allowed part of ``addopts`` as command-line words
(:mod:`pytest_microvm.suite.addopts`), and leaves the rest to the machine, which reads the original file.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import platformdirs
import pytest
from _pytest.config import builtin_plugins, get_config

from pytest_microvm.errors import MicroVMError, UsageError
from pytest_microvm.suite.addopts import addopts_words, divide_addopts, shown_values
from pytest_microvm.suite.arguments import ARITY_ELSEWHERE, WORKERS, Token, parser_arity, tokens
from pytest_microvm.suite.project_file import ProjectFile, find_project_file
from pytest_microvm.suite.user_file import UserFile, read_user_file
from pytest_microvm.untrusted.text import sanitize

PROGRAM = "pytest-microvm test"
AUTOLOAD = "PYTEST_DISABLE_PLUGIN_AUTOLOAD"
_ADDOPTS = "PYTEST_ADDOPTS"
_RECORD = "launch.json"
_LAUNCHED = "--microvm-launched"
_REPORTS = "--microvm-reports"
_OURS = frozenset(["-c", "--config-file", "--rootdir", _REPORTS])


@dataclass(frozen=True)
class LaunchFacts:
    """Facts that the launcher passes to our plug-in and to pytest-xdist's workers, as a JSON file.

    Args:
        words: Number of our words at the start of pytest's command line; the user's follow.
        guest: Words of the project, for the machine's pytest.
        file: The project's configuration.
        left: Words of the project that were dropped.
        autoload: The user's ``PYTEST_DISABLE_PLUGIN_AUTOLOAD``.
        reports: The folder for files that the project names.
    """

    words: int
    guest: tuple[str, ...]
    file: Path | None
    left: tuple[str, ...]
    autoload: str | None
    reports: Path | None


def launch_of(words: Sequence[str]) -> LaunchFacts | None:
    """Return the record that :func:`prepared` wrote, or ``None`` if this pytest was not launched by it."""
    option = f"{_LAUNCHED}="
    path = next((word.removeprefix(option) for word in words if word.startswith(option)), None)
    if path is None:
        return None
    data: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    for name in ("file", "reports"):
        data[name] = data[name] and Path(data[name])
    return LaunchFacts(**{**data, "guest": tuple(data["guest"]), "left": tuple(data["left"])})


def main(words: Sequence[str]) -> int:
    """Run pytest in this process, which must be isolated (``python -I``); return its exit status.

    Args:
        words: The user's command line, as for pytest.
    """
    sys.argv = [PROGRAM, *words]
    try:
        user = read_user_file(platformdirs.user_config_path("pytest-microvm"))
        sys.path += [os.fspath(folder) for folder in user.plugin_path]
        with prepared(words, user, Path.cwd(), os.environ) as arguments:
            status = int(pytest.main(arguments))
            sys.stdout.flush()
    except MicroVMError as error:
        sys.stderr.write(f"ERROR: {sanitize(str(error))}\n\n")  # pytest's format
        return int(pytest.ExitCode.USAGE_ERROR)
    except BrokenPipeError:  # the reader of our output exited, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(pytest.ExitCode.TESTS_FAILED)
    return status


@contextmanager
def prepared(
    words: Sequence[str], user: UserFile, directory: Path, environ: MutableMapping[str, str]
) -> Iterator[list[str]]:
    """Yield the command line for the host's pytest; its temporary files exist while the block runs.

    Args:
        words: The user's command line.
        user: The user's file, with plug-ins to load on every run.
        directory: The folder that pytest is started in.
        environ: The variables of this process; those that pytest would obey are removed.

    Raises:
        UsageError: The project's configuration or the user's command line is invalid.
    """
    words = [*shlex.split(environ.pop(_ADDOPTS, "")), *words]
    arity = {**ARITY_ELSEWHERE, **_pytest_options(), _REPORTS: "1"}
    said = list(tokens(words, arity))
    reports = _last(said, _REPORTS)
    project = find_project_file(
        directory,
        [token.words[0] for token in said if not token.option and token.words != ("--",)],
        file=_last(said, "-c", "--config-file"),
        rootdir=_last(said, "--rootdir"),
    )
    _refuse_python_path(project.rootdir, environ)
    named = [token for token in said if _is_machines_plugin(token)]
    users = [
        word for token in said if token not in named and token.option not in _OURS for word in token.words
    ]
    divided = divide_addopts(
        addopts_words(project.values.get("addopts", []), project.path),
        users,
        arity,
        None if reports is None else directory / reports,
    )
    with tempfile.TemporaryDirectory(prefix="pytest-microvm-") as folder:
        own = _own_words(project, _plugins(user, users, arity), Path(folder))
        launch = LaunchFacts(
            words=len(own) + len(divided.host),
            guest=(
                *_named_file(said, directory),
                *divided.guest,
                *(word for token in named for word in token.words),
            ),
            file=project.path,
            left=divided.left,
            autoload=environ.get(AUTOLOAD),
            reports=None if reports is None else directory / reports,
        )
        Path(folder, _RECORD).write_text(json.dumps(asdict(launch), default=os.fspath), encoding="utf-8")
        environ[AUTOLOAD] = "1"
        yield [*own, *divided.host, *users]


def _own_words(project: ProjectFile, plugins: Sequence[str], folder: Path) -> list[str]:
    """Return the options that isolate the host's pytest from the project; they come first."""
    empty = folder / "pytest.ini"
    empty.write_text("[pytest]\n", encoding="ascii")
    return [
        f"--config-file={empty}",
        f"--rootdir={project.rootdir}",
        "--noconftest",
        *(f"-p{name}" for name in plugins),
        "--microvm",
        f"{_LAUNCHED}={folder / _RECORD}",
        f"--override-ini=cache_dir={_cache_of(project.rootdir)}",
        *(f"--override-ini={line}" for line in shown_values(project.values)),
    ]


def _plugins(user: UserFile, users: Sequence[str], arity: Mapping[str, str]) -> list[str]:
    """Return the plug-ins for the host: ours, the user's, and pytest-xdist if the user asks for workers."""
    plugins = [*user.plugins, "pytest_microvm.plugin"]
    workers = any(token.option in WORKERS or token.option == "--tx" for token in tokens(users, arity))
    if workers and importlib.util.find_spec("xdist") is not None:
        plugins.append("xdist")
    return list(dict.fromkeys(plugins))


def _is_machines_plugin(token: Token) -> bool:
    """Return True if the token is ``-p NAME`` for a plug-in that is not installed on this computer."""
    name = (token.value or "").strip()
    if token.option != "-p" or name.startswith("no:") or name in builtin_plugins:
        return False
    installed = {entry.name for entry in entry_points(group="pytest11")}
    return name not in installed and importlib.util.find_spec(name.partition(".")[0]) is None


def _refuse_python_path(rootdir: Path, environ: Mapping[str, str]) -> None:
    """Check that ``PYTHONPATH`` has no folder of the project: every Python here would import from it.

    Raises:
        UsageError: It has one.
    """
    for entry in environ.get("PYTHONPATH", "").split(os.pathsep):
        if entry and Path(entry).resolve().is_relative_to(rootdir.resolve()):
            raise UsageError(
                f"PYTHONPATH has {entry}, and so each Python on this computer imports modules of the project",
                resolution="unset it; `pythonpath` in pytest's configuration counts in the machine alone",
            )


def _pytest_options() -> dict[str, str]:
    """Return the options of pytest and of this package, with their arity."""
    config = get_config()
    config.pluginmanager.import_plugin("pytest_microvm.plugin")
    return parser_arity(config._parser)  # noqa: SLF001 - pytest has no public list


def _last(said: Sequence[Token], *options: str) -> str | None:
    return next((token.value for token in reversed(said) if token.option in options), None)


def _named_file(said: Sequence[Token], directory: Path) -> list[str]:
    file = _last(said, "-c", "--config-file")
    return [] if file is None else [f"--config-file={directory / file}"]


def _cache_of(rootdir: Path) -> Path:
    """Return pytest's cache folder: outside the project, because a link inside could redirect it."""
    name = hashlib.sha256(os.fsencode(rootdir.resolve())).hexdigest()[:32]
    return platformdirs.user_state_path("pytest-microvm") / "suites" / name
