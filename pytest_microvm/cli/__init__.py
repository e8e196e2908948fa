"""The command ``pytest-microvm``: one module per verb."""

from __future__ import annotations

import argparse
import os
import sys
from importlib.metadata import version
from typing import TYPE_CHECKING

from pytest_microvm.errors import MicroVMError, UsageError
from pytest_microvm.termination import interrupt_on_sigterm

if TYPE_CHECKING:
    from collections.abc import Sequence

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
EXIT_USAGE = 4  # pytest's number for a usage error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = _parser().parse_args(argv)
    leave_sigterm = interrupt_on_sigterm()
    try:
        status: int = arguments.run(arguments)
    except MicroVMError as error:
        print(f"pytest-microvm: {error}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, UsageError) else EXIT_FAILED
    except KeyboardInterrupt:
        print("pytest-microvm: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    finally:
        leave_sigterm()
    return status


def _parser() -> argparse.ArgumentParser:
    from pytest_microvm.cli import (  # noqa: PLC0415 - only for the command
        ci,
        doctor,
        github,
        gitlab,
        image,
        machines,
        network,
        python,
        report,
        run,
        template,
        test,
        top,
        trust,
    )

    parser = argparse.ArgumentParser(
        prog="pytest-microvm",
        description="Throwaway microVMs for pytest, CI and agents.",
        epilog="Run your own suite with `pytest --microvm`, a stranger's with `pytest-microvm test`; "
        "`pytest-microvm doctor` says what this computer offers.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('pytest-microvm')}")
    verbs = parser.add_subparsers(metavar="COMMAND", required=True)
    for module in (
        *(test, run, ci, report, python, doctor, image, template, machines, top, network, trust),
        *(github, gitlab),
    ):
        module.add_parser(verbs)
    return parser
