"""Record tox's installations with pip as a list of commands, which make a template in the machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tox.tox_env.errors import Fail
from tox.tox_env.python.api import Python
from tox.tox_env.python.pip.pip_install import Pip
from tox.tox_env.python.pip.req_file import PythonDeps
from tox.tox_env.python.pylock import Pylock


@dataclass
class InstallPlan:
    """The installation plan of an environment.

    Attributes:
        commands: The command lines, with tox's names for them.
        arguments: The arguments of all pip commands.
        files: Texts of files that the commands read, by path in the machine.
        pushed: Files of this computer that the commands read, by path in the machine.
    """

    commands: list[tuple[tuple[str, ...], str]] = field(default_factory=list)
    arguments: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    pushed: dict[str, Path] = field(default_factory=dict)


class GuestPip(Pip):
    """tox's pip installer, changed to record its commands instead of running them.

    Args:
        tox_env: The environment.
        plan: Returns the current plan.
    """

    def __init__(self, tox_env: Python, plan: Callable[[], InstallPlan]) -> None:
        self._plan = plan
        super().__init__(tox_env)

    def install(self, arguments: Any, section: str, of_type: str) -> None:  # noqa: ARG002 - tox's signature
        """Record the command that installs ``arguments``.

        Only the configuration is read: tox itself would open, and even fetch, requirement files here.

        Raises:
            Fail: The arguments are invalid.
        """
        if isinstance(arguments, PythonDeps):
            try:
                args = list(arguments.as_root_args)
            except ValueError as error:
                raise Fail(
                    f"{arguments.redact(str(error))} for tox env {self._env.name} within deps"
                ) from None
        elif isinstance(arguments, Pylock):
            file = str(self._env.env_dir / "pylock.txt")
            self._plan().files[file] = "\n".join(sorted(arguments.install_lines())) + "\n"
            args = ["--no-deps", "-r", file]
        else:
            args = sorted(str(one) for one in arguments)
        if args:
            self.note(args if isinstance(arguments, Pylock) else [*args, *self._constraints()], of_type)

    def note(self, args: Sequence[str], of_type: str) -> None:
        """Record a command of pip."""
        plan = self._plan()
        plan.commands.append((tuple(self.build_install_cmd(args)), f"install_{of_type}"))
        plan.arguments += args

    def package_constraints(self) -> list[str]:
        """Return pip's arguments with the constraints for the package's own dependencies."""
        return self._constraints() if self.constrain_package_deps else []

    def _constraints(self) -> list[str]:
        try:
            return list(self.constraints.as_root_args)
        except ValueError as error:
            raise Fail(f"{self.constraints.redact(str(error))} within constraints") from None
