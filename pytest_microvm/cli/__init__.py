"""The command ``pytest-microvm``: one module per verb."""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

from pytest_microvm.errors import MicroVMError, UsageError
from pytest_microvm.terminal.termination import interrupt_on_sigterm
from pytest_microvm.untrusted.program_path import absolute_path
from pytest_microvm.untrusted.text import sanitize

if TYPE_CHECKING:
    from collections.abc import Sequence

_MODULES = (
    *("test", "run", "ci", "report", "python", "setup", "doctor", "image", "template", "machines", "top"),
    *("lock", "network", "trust", "github", "gitlab"),
)
EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
EXIT_USAGE = 4  # pytest's number for a usage error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    os.environ["PATH"] = absolute_path()  # otherwise QEMU could be a program of the project
    words = sys.argv[1:] if argv is None else list(argv)
    arguments = _parser(words[:1]).parse_args(words)
    leave_sigterm = interrupt_on_sigterm()
    try:
        status: int = arguments.run(arguments)
    except MicroVMError as error:
        print(f"pytest-microvm: {sanitize(str(error))}", file=sys.stderr)  # may quote untrusted text
        return EXIT_USAGE if isinstance(error, UsageError) else EXIT_FAILED
    except KeyboardInterrupt:
        print("pytest-microvm: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of the output exited, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    finally:
        leave_sigterm()
    return status


def _parser(verbs: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Return the parser of the command line.

    Args:
        verbs: The verb in use. If it has its own module, only that is imported: the others import a lot.
    """
    parser = argparse.ArgumentParser(
        prog="pytest-microvm",
        description="Throwaway microVMs for pytest, CI and agents.",
        epilog="Run your own suite with `pytest --microvm`, a stranger's with `pytest-microvm test`; "
        "`pytest-microvm setup` installs missing programs, `pytest-microvm doctor` says what this computer "
        "offers.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('pytest-microvm')}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in [verb for verb in verbs if verb in _MODULES and verb != "machines"] or _MODULES:
        import_module(f"pytest_microvm.cli.{name}").add_parser(subparsers)
    return parser
