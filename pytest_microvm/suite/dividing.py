"""The division of pytest's arguments: the host's pytest gets some of them, the guest's the others."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from _pytest.config import builtin_plugins

from pytest_microvm.suite import neutral
from pytest_microvm.suite.addopts import overridden_key, refuse_acting, refuse_granting
from pytest_microvm.suite.arguments import (
    OF_THE_MACHINE,
    Split,
    parser_arity,
    split_arguments,
    tokens,
    why_impossible,
    with_values,
)
from pytest_microvm.suite.launch import LaunchFacts
from pytest_microvm.suite.plan import addopts_of
from pytest_microvm.suite.pytest_errors import as_pytest_errors

_HOST_PLUGINS = frozenset(
    [
        *("microvm", "microvm-guard", "pytest_microvm.plugin", "pytest_microvm.plugin.guard"),
        *("xdist", "xdist.plugin", "xdist.looponfail"),
    ]
)


class DividedArguments:
    """The arguments of a run, divided once pytest knows all options.

    Args:
        config: pytest's configuration, before its final parse of the arguments.
        launch: What the launcher has found out; ``None``: pytest was started without it.

    Attributes:
        guest: The arguments for the guest's pytest.
        users: The words of the user's command line.
        projects: The words of the project's ``addopts``.
        arity: How many values each option takes.
    """

    def __init__(self, config: pytest.Config, launch: LaunchFacts | None) -> None:
        self.guest: tuple[str, ...] = ()
        self.users: tuple[str, ...] = ()
        self.projects: tuple[str, ...] = ()
        self.arity: dict[str, str] = {}
        self._config = config
        self._launch = launch

    def divide(self, parser: pytest.Parser, args: list[str]) -> None:
        """Remove the guest's arguments from ``args``, and keep pytest from loading conftest files.

        Raises:
            pytest.UsageError: An option cannot work, or would act or has already acted on the host.
        """
        neutral.forget_failed_filters(self._config)
        arity = {**OF_THE_MACHINE, **parser_arity(parser)}
        self._options_that_write(args, arity)
        for token in with_values(args, arity):
            if (why := why_impossible(token)) is not None:
                raise pytest.UsageError(f"{token.option} cannot work with --microvm: {why}")
        with as_pytest_errors():
            neutral.refuse_project_plugins(self._config, _named_plugins(args, arity))
            if self._launch is None:
                neutral.refuse_linked_cache(self._config)
                count = len(addopts_of(self._config, args))
                refuse_granting(args[:count])
                refuse_acting(args[:count], args[count:], arity)
                split = split_arguments(args, arity, self._is_host_plugin)
            else:
                ours, users = args[: self._launch.words], args[self._launch.words :]
                split = split_arguments(users, arity, self._is_host_plugin)
                split = Split((*ours, *split.host), (*self._launch.guest, *split.guest))
                neutral.forget_own_file(self._config, self._launch.file)
        args[:] = split.host
        self.guest = split.guest
        neutral.forbid_conftests(self._config)

    def _options_that_write(self, args: list[str], arity: Mapping[str, str]) -> None:
        """Note the words of the user and of the project: some options write files in the workspace."""
        count = len(addopts_of(self._config, args)) if self._launch is None else self._launch.words
        projects = args[:count] if self._launch is None else [*self._launch.guest]
        self.users, self.projects, self.arity = tuple(args[count:]), tuple(projects), dict(arity)
        for token in tokens(self.users, arity):
            if overridden_key(token) == "log_file":
                neutral.write_log_file(self._config, (token.value or "").partition("=")[2])

    def _is_host_plugin(self, name: str) -> bool:
        if self._launch is not None and not name.startswith("no:") and name not in builtin_plugins:
            return True  # the machine loads its own installed plug-ins
        plugin = self._config.pluginmanager.get_plugin(name)
        return name in _HOST_PLUGINS or bool(getattr(plugin, "microvm_host_only", False))

    def is_told(self, options: frozenset[str]) -> bool:
        """Return True if the user, and not only the project, has given one of the options."""
        return any(token.option in options for token in tokens(self.users, self.arity))


def _named_plugins(args: list[str], arity: Mapping[str, str]) -> list[str]:
    return [(token.value or "").strip() for token in tokens(args, arity) if token.option == "-p"]
