"""The machines of one tox environment: its templates, and the machine that runs its commands."""

from __future__ import annotations

import hashlib
import json
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from pytest_microvm.agent.transfer import send_file
from pytest_microvm.errors import BudgetExhausted, MachineError, UsageError
from pytest_microvm.host.host import Host
from pytest_microvm.host.starting import machine_in_the_making
from pytest_microvm.settings.configuration import DEFAULT_TIMEOUT
from pytest_microvm.suite.template_chain import check_git
from pytest_microvm.suite.workspace import Workspace, scan
from pytest_microvm.templates.chain import TemplateStep
from pytest_microvm.tox.interpreters import interpreters
from pytest_microvm.untrusted.text import sanitize

if TYPE_CHECKING:
    from tox.tox_env.python.api import PythonInfo

    from pytest_microvm.images.mirror.environment import PythonEnvironment
    from pytest_microvm.machine.instance import Instance
    from pytest_microvm.machine.microvm import MicroVM
    from pytest_microvm.tox.installer import InstallPlan
    from pytest_microvm.tox.settings import ToxSettings

FORMAT = "1"
"""Part of every key; raise it when the creation of environments changes."""

_TIMEOUT = 600.0
_PAUSE = 0.25  # seconds between two attempts to fit a machine into the host budget
_TITLES = {"tox-env": "making the environment", "tox-package": "building and installing the package"}

_PROGRAMS = Path(__file__).parent


class ToxGuest:
    """Creates an environment's templates and starts its machine.

    Args:
        settings: The settings of the environment's machines.
        project: The project's folder, copied to the same path in each machine.
        made: Folders that tox made, which are not copied from the project.
        environment: Returns the environment of this computer to mirror, if the settings say so.
        say: Called with messages about steps that take long.

    Attributes:
        machine: The machine that runs commands, once it has been started.
        stopped: Set it to stop waiting for a machine.
    """

    def __init__(
        self,
        settings: ToxSettings,
        *,
        project: Path,
        made: Sequence[Path],
        environment: Callable[[], PythonEnvironment],
        say: Callable[[str], None],
    ) -> None:
        self.settings = settings
        self.machine: MicroVM | None = None
        self.stopped = threading.Event()
        self._project = project
        self._made = made
        self._host = Host(
            project=project,
            timeout=DEFAULT_TIMEOUT,
            say=lambda line: say(sanitize(line)),
            environment=environment,
        )
        self._base = self._host.base(settings.spec)

    @cached_property
    def pythons(self) -> list[PythonInfo]:
        """The image's Pythons."""

        def start() -> MicroVM:
            return self._start(())

        return interpreters(self._host.cache, self._base.image.digest, start)

    @cached_property
    def workspace(self) -> Workspace:
        """The project's files, without those that tox made."""
        whole = scan(self._project, git=self.settings.git)
        if whole.size > self._base.resources.disk:
            raise UsageError(
                f"the project {self._project} is larger than the machine's disk",
                details=f"{whole.size} bytes of files, {self._base.resources.disk} bytes of disk",
                resolution="set microvm_disk, or have git ignore some",
            )
        inside = [folder for folder in self._made if folder.is_relative_to(self._project)]
        own = tuple(f"{folder.relative_to(self._project)}/" for folder in inside)
        entries = [entry for entry in whole.entries if not f"{entry.path}/".startswith(own)]
        return whole.part(entries, history=True)

    def files(self, names: Sequence[str]) -> Workspace:
        """Return some of the project's files.

        Raises:
            UsageError: The project has no such file.
        """
        wanted = set(names)
        entries = tuple(entry for entry in self.workspace.entries if entry.path in wanted)
        missing = sorted(wanted - {entry.path for entry in entries})
        if missing:
            raise UsageError(
                f"{missing[0]} is not copied into the machine", resolution="does git ignore it? add it to git"
            )
        return self.workspace.part(entries, history=False)

    def step(
        self,
        kind: str,
        plan: InstallPlan,
        variables: Mapping[str, str],
        *,
        files: Workspace,
        venv: tuple[str, str, bool] | None,
        run: Callable[[MicroVM], None],
        generation: str,
    ) -> TemplateStep:
        """Return a step of a template chain: copy files in, run commands, keep the result.

        Args:
            kind: The step's kind in lists: ``tox-env``, ``tox-package``.
            plan: The installation plan.
            variables: The commands' environment variables.
            files: The files that are copied in first.
            venv: The virtual environment to create first: its Python, its folder, whether it includes the
                system's packages.
            run: Runs the plan's commands.
            generation: Part of the key: another generation makes the step again.
        """

        def work(instance: Instance) -> dict[str, bytes]:
            grants = self._host.grants(self.settings.prepare, self._base.image)
            machine = machine_in_the_making(self._base, instance, grants.for_machine("template"))
            if venv is not None:
                _make_venv(machine, venv)
            if files.history is not None:
                check_git(machine, self._base.image.name)
            put(machine, files)
            for path, text in plan.files.items():
                machine.path(path).parent.mkdir(parents=True, exist_ok=True)
                machine.path(path).write_text(text)
            for path, source in plan.pushed.items():
                machine.path(path).parent.mkdir(parents=True, exist_ok=True)
                machine.push(source, path)
            try:
                run(machine)
            finally:
                for request in machine.network.denied:
                    self._host.say(str(request))
            instance.take_away()
            return {}

        inputs = (
            FORMAT,
            json.dumps([plan.commands, plan.files, venv]),
            hashlib.sha256(json.dumps(sorted(variables.items())).encode()).hexdigest(),
            files.digest(),
            *(hashlib.sha256(source.read_bytes()).hexdigest() for source in plan.pushed.values()),
            json.dumps([self.settings.prepare.network, self.settings.prepare.hosts]),
            generation,
        )
        return TemplateStep(kind, inputs, work, _TITLES[kind])

    def cached(self, steps: Sequence[TemplateStep]) -> bool:
        """Return True if the chain's template exists, so that nothing needs to be installed."""
        return self._host.cached(self._base, steps) is not None

    def make(self, steps: Sequence[TemplateStep]) -> None:
        """Make the missing templates of a chain."""
        while True:
            try:
                self._host.template(self._base, steps)
            except BudgetExhausted:  # other environments of this run may use all of it for a long time
                self._wait_for_room()
            else:
                return

    def start(self, steps: Sequence[TemplateStep], *, files: bool) -> MicroVM:
        """Start the machine that runs commands.

        Args:
            steps: The chain whose template the machine is cloned from.
            files: Whether to copy the project's files in.
        """
        machine = self._start(steps)
        try:
            if files:
                if self.workspace.history is not None:
                    check_git(machine, self._base.image.name)
                put(machine, self.workspace)
        except BaseException:
            machine.close()
            raise
        self.machine = machine
        return machine

    def close(self) -> None:
        """End the machine, and release its templates, so that they can be removed."""
        try:
            if self.machine is not None:
                self.machine.close()
        finally:
            self._host.close()

    def _start(self, steps: Sequence[TemplateStep]) -> MicroVM:
        self.make(steps)
        template = self._host.template(self._base, steps)
        told = False
        while (machine := self._host.try_machine(template, self._base)) is None:
            if not told:
                told = True
                self._host.say(f"waiting: the host budget ({self._host.budget}) is in use by other machines")
            self._wait_for_room()
        return machine

    def _wait_for_room(self) -> None:
        """Wait a moment for another machine to end.

        Raises:
            BudgetExhausted: The machine can never fit into the host budget.
            MachineError: :attr:`stopped` was set.
        """
        self._host.budget.check_hope(self._base.limits.cpus, self._base.limits.memory)
        if self.stopped.wait(_PAUSE):
            raise MachineError("interrupted while waiting for room in the host budget")


def put(machine: MicroVM, workspace: Workspace) -> None:
    """Copy files into a machine, to the same path."""
    machine.path(str(workspace.top)).mkdir(parents=True, exist_ok=True)
    if workspace.entries:
        with tempfile.TemporaryFile() as archive:
            workspace.write_tar(archive)
            archive.seek(0)
            send_file(machine.client.link(), "unpack", str(workspace.top), archive)


def program(name: str) -> str:
    """Return the source text of a script that runs in machines."""
    return (_PROGRAMS / f"{name}.py").read_text(encoding="utf-8")


def _make_venv(machine: MicroVM, venv: tuple[str, str, bool]) -> None:
    python, folder, system = venv
    machine.path(str(PurePosixPath(folder).parent)).mkdir(parents=True, exist_ok=True)
    command = [python, "-I", "-c", program("make_venv"), folder, "system" if system else ""]
    done = machine.run(command, timeout=_TIMEOUT)
    if done.returncode:
        raise MachineError(
            f"no virtual environment could be made in {folder}",
            details="\n".join((done.stdout + done.stderr).splitlines()[-20:]),
            resolution="the image needs Python's venv (Debian: python3-venv)",
        )
