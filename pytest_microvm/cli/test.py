"""``pytest-microvm test``: run an untrusted suite in machines, with no code of it on this computer."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

_DESCRIPTION = """\
Run a suite that you did not write, each test in a fresh microVM. It takes pytest's arguments and shows what
pytest shows. Nothing of the project acts on this computer: pytest's configuration there is read as data, and
decides here only what is run and how it is shown; all else it says is obeyed in the machine. No plug-in is
loaded here but this one and those that you name with -p (or in config.toml, see below).

  pytest-microvm test [pytest's and --microvm-... arguments]
"""
_EPILOG = """\
only here:
  --microvm-reports=DIR  where files go that the project's configuration names, such as --junitxml in addopts;
                         without it such a configuration is refused

config.toml in your configuration folder ({folder}) may say, for all projects:
  [test]
  plugins = ["html"]                    # as -p names them
  plugin_path = ["/home/me/plug-ins"]   # where yours are, if they are not installed

examples:
  pytest-microvm test                     the suite of this folder
  pytest-microvm test -k parser -x -n 2   two workers: -n brings pytest-xdist with it
  pytest-microvm test --junitxml=/tmp/report.xml tests/unit

`pytest --help` tells all arguments. For projects of your own there is `pytest --microvm`: pytest then obeys
their configuration and loads what plug-ins are installed.
"""
# -I: the working directory is the project's, and Python would import modules from there first.
_ISOLATED = "import sys; from pytest_microvm.suite.launch import main; sys.exit(main(sys.argv[1:]))"


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "test",
        help="run a stranger's test suite, each test in a fresh microVM",
        usage="pytest-microvm test [ARGUMENT ...]",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prefix_chars="\0",  # all words are pytest's
        add_help=False,
    )
    parser.add_argument("words", nargs="*", metavar="ARGUMENT", help="as for pytest")
    parser.set_defaults(run=_run, parser=parser)


def _run(arguments: argparse.Namespace) -> int:
    if {"-h", "--help"} & set(arguments.words[:1]):
        import platformdirs  # noqa: PLC0415 - only for this

        arguments.parser.epilog = _EPILOG.format(folder=platformdirs.user_config_path("pytest-microvm"))
        arguments.parser.print_help()
        return 0
    return _start_isolated(arguments.words)


def _start_isolated(words: Sequence[str]) -> NoReturn:
    """Run pytest in an isolated interpreter, which imports nothing from here and replaces this process."""
    unbuffered = ["-u"] if os.environ.get("PYTHONUNBUFFERED") else []  # -I ignores the variable
    command = [sys.executable, "-I", *unbuffered, "-c", _ISOLATED, *words]
    os.execv(sys.executable, command)  # noqa: S606 - no shell is wanted
