"""Options that need something of the others: each run of a test a machine, or all tests one process."""

from __future__ import annotations

import pytest

from pytest_microvm.errors import UsageError
from pytest_microvm.suite.backend import RunOptions
from pytest_microvm.suite.dividing import DividedArguments
from pytest_microvm.suite.repeating import Repeats
from pytest_microvm.suite.written_options import rewriting_option


def repeat_tests(config: pytest.Config, options: RunOptions) -> None:
    """Repeat tests if that was asked for; each run needs a machine of its own.

    Raises:
        UsageError: Tests share machines.
    """
    if options.repeat is None:
        return
    if options.isolation != "test":
        raise UsageError(
            f"repeat needs a machine for each run of a test, but isolation is {options.isolation}",
            resolution="add --microvm-isolation=test",
        )
    config.pluginmanager.register(Repeats(options.repeat), "microvm_repeats")


def check_debug_port(options: RunOptions, workers: int) -> None:
    """Check that one process runs the tests: the port leads to one machine.

    Args:
        options: The run's options.
        workers: The number of workers of pytest-xdist.

    Raises:
        UsageError: Workers of pytest-xdist run the tests.
    """
    if options.debug_port is not None and workers:
        raise UsageError(
            "the debug port leads to one machine, but -n runs several at once", resolution="leave out -n"
        )


def check_rewriting(options: RunOptions, arguments: DividedArguments, *, whole: bool) -> None:
    """Check that one process sees all tests if a plug-in is to rewrite their source.

    Args:
        options: The run's options.
        arguments: The user's arguments.
        whole: Whether one machine runs the whole session.

    Raises:
        UsageError: Several processes do.
    """
    option = rewriting_option(arguments.users, arguments.arity)
    if option is None or whole:
        return
    divided = options.isolation == "session"
    raise UsageError(
        f"{option} rewrites the tests' source when their process ends, but "
        + ("-n divides them among several" if divided else f"isolation is {options.isolation}"),
        resolution="leave out -n" if divided else "add --microvm-isolation=session",
    )


def fixtures_mode(config: pytest.Config, options: RunOptions, *, debugs: bool) -> str:
    """Return the mode of wide fixtures: a debugger or a plan of set-ups needs them in each machine."""
    shows = any(getattr(config.option, name, False) for name in ("setupshow", "setuponly"))
    if options.isolation != "test" or shows or debugs or options.debug_port is not None:
        return "repeat"
    return options.fixtures
