"""The template chain of a remote suite, up to the template in which the runner has collected the tests."""

from __future__ import annotations

import contextlib
import json
import shlex
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from pytest_microvm.agent.transfer import send_file
from pytest_microvm.errors import MachineCrashed, MachineError, QuotaExceeded, UsageError
from pytest_microvm.host.host import Host
from pytest_microvm.host.preparing import prepared_step
from pytest_microvm.host.starting import machine_in_the_making
from pytest_microvm.machine.grants import Grants
from pytest_microvm.machine.instance import Instance
from pytest_microvm.machine.microvm import MicroVM
from pytest_microvm.settings.configuration import Settings
from pytest_microvm.settings.spec import MachineSpec
from pytest_microvm.suite.backend import CollectPlan, PureSetUp, TestLimits
from pytest_microvm.suite.session import RunnerSession, runner_command
from pytest_microvm.suite.workspace import Workspace, scan
from pytest_microvm.templates.chain import IN_THE_MAKING, Base, TemplateStep
from pytest_microvm.untrusted.text import sanitize_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pytest_microvm.agent.link import Link

COLLECTED = "collected"
"""The name of the last template's attachment: the runner's answer to ``collect``."""

FIXTURES = "fixtures"
"""The name of a template's attachment: the runner's answer to the set-up of pure fixtures."""

_CODE_FOLDER = "/run/microvm/code"
DEBUGGER_TERMINAL = f"{_CODE_FOLDER}/pytest_microvm/guest/debugger_terminal.py"
"""The program in a machine that lends its terminal to a debugger."""

PYTHON = "python3"
"""The Python of the machine that runs the tests."""

_OWN_LINK = 16 * 1024**2  # bytes; a larger workspace gets its own link, shared by all arguments
_HELLO_BOOTS = 2.0  # times the limit for a boot: pytest with its plug-ins is loaded meanwhile


@dataclass(frozen=True)
class SuiteChain:
    """The steps of a suite's template chain.

    Args:
        host: The host.
        base: The chain's base.
        settings: The project's settings.
        plan: The collection request.
    """

    host: Host
    base: Base
    settings: Settings
    plan: CollectPlan

    def steps(self, workspace: Workspace) -> list[TemplateStep]:
        """Return the template chain's steps, the most stable first, so that an edit rebuilds only one."""
        steps = self._prepared()
        started = "PYTHONPATH" not in self._environment()  # else the workspace could affect Python's start
        if started:
            steps.append(self._started_step())
        if workspace.history and workspace.history.size > _OWN_LINK:
            steps.append(history_step(workspace))
            workspace = workspace.part(workspace.entries, history=False)
        copied = workspace.size > _OWN_LINK
        if copied:
            steps.append(workspace_step(workspace))
        steps.append(self._collected_step(None if copied else workspace, started=started))
        return steps

    def _prepared(self) -> list[TemplateStep]:
        commands = self.settings.prepare
        if not commands:
            return []
        top = self.plan.workspace
        whole = scan(top, git=self.settings.git and bool(self.settings.prepare_inputs))
        inputs = _chosen(whole, self.settings.project, self.settings.prepare_inputs)
        return [
            prepared_step(
                self.host,
                self.base,
                commands,
                folder=PurePosixPath(top),
                put=lambda machine: _unpack(machine, inputs),
                inputs=(inputs.digest(), *self.settings.prepare_network),
                grants=self._prepare_grants(),
            )
        ]

    def _prepare_grants(self) -> Grants:
        """Return the grants of the prepare commands: their own network rules, none of the tests' grants."""
        spec = MachineSpec(network=self.settings.prepare_network, hosts=self.settings.spec.hosts)
        return self.host.grants(spec, self.base.image)

    def _started_step(self) -> TemplateStep:
        """Return the chain step that starts the runner with pytest and its plug-ins, without a workspace."""

        def work(instance: Instance) -> dict[str, bytes]:
            with self._with_cause(instance):
                self._start_runner(instance, "/", preload=True)
            return {}

        inputs = [json.dumps([self.plan.environment, self.plan.coverage is not None])]
        if self.settings.git:
            inputs.append("git")
        return TemplateStep("started", tuple(inputs), work, "starting pytest")

    def _collected_step(self, workspace: Workspace | None, *, started: bool) -> TemplateStep:
        """Return the chain step that collects the tests.

        Args:
            workspace: The workspace to copy in first; ``None`` if it is already there.
            started: Whether the runner is already running.
        """
        plan = self.plan
        inputs = [json.dumps(plan.arguments), str(plan.directory), json.dumps(plan.environment)]
        inputs.append(json.dumps([str(plan.workspace), plan.whole, plan.debug, plan.coverage]))
        inputs.append(json.dumps([plan.folders, plan.outside], default=str))
        if workspace is not None:
            inputs += [str(workspace.top), workspace.digest()]

        def work(instance: Instance) -> dict[str, bytes]:
            with self._with_cause(instance):
                # Under emulation waking the agent as well would cost what a test costs.
                link = instance.adopt("runner" if started else "agent", IN_THE_MAKING)
                if workspace is not None:
                    _send(link, workspace)
                if not started:
                    link = self._start_runner(instance, str(plan.directory))
                return {COLLECTED: RunnerSession(link).collect(replace(plan, environment=()))}

        return TemplateStep("collected", tuple(inputs), work, "collecting")

    def _start_runner(self, instance: Instance, folder: str, *, preload: bool = False) -> Link:
        """Start the runner in ``folder`` and wait for its hello, which it sends once pytest is loaded."""
        machine = machine_in_the_making(self.base, instance)
        if self.settings.git:
            check_git(machine, self.base.image.name)
        machine.path(folder).mkdir(parents=True, exist_ok=True)
        hello = _HELLO_BOOTS * instance.boot_timeout
        coverage = self.plan.coverage is not None
        runner = shlex.join(runner_command(PYTHON, _CODE_FOLDER, preload=preload, coverage=coverage))
        machine.client.link().call(  # noqa: S604 - in the guest, and quoted
            "exec",
            timeout=hello,
            handle=0,
            shell=f"exec {runner} </dev/null >/dev/console 2>&1",
            cwd=folder,
            env=self._environment(),
            vital=True,
        )
        link = instance.link("runner")
        link.wait_hello(hello)
        return link

    @contextlib.contextmanager
    def _with_cause(self, instance: Instance) -> Iterator[None]:
        """Convert a crash or timeout during collection into an error that names the cause."""
        try:
            yield
        except MachineCrashed as error:
            why = instance.end_error("template")
            if isinstance(why, QuotaExceeded):
                raise why from error
            raise self._not_collected(why.brief, why.details) from error
        except TimeoutError as error:
            raise self._not_collected(str(error), instance.console_text()) from error

    def _environment(self) -> dict[str, str]:
        """Return the variables that the runner starts with: the image's, and the plan's."""
        return {**dict(self.base.resources.environment), **dict(self.plan.environment)}

    def _not_collected(self, why: str, details: str) -> MachineError:
        return MachineError(
            f"collecting the tests failed: {why}",
            details=details,
            resolution=f"does the image have Python and pytest? (image: {self.base.image.name})",
        )


def check_git(machine: MicroVM, image: str) -> None:
    """Check that the programs in a machine can ask git.

    Args:
        machine: The machine.
        image: Its image's name.

    Raises:
        UsageError: It has no git.
    """
    try:
        machine.run(["git", "--version"], timeout=machine.instance.boot_timeout)
    except FileNotFoundError:
        raise UsageError(
            f"image {image} has no git, which --microvm-git is for",
            resolution="take the image agent, a kit with the package git, or install it in prepare",
        ) from None


def workspace_step(workspace: Workspace) -> TemplateStep:
    """Return the template-chain step that copies a workspace into the machine."""

    def work(instance: Instance) -> dict[str, bytes]:
        _send(instance.adopt("agent", IN_THE_MAKING), workspace)
        return {}

    return TemplateStep("workspace", (str(workspace.top), workspace.digest()), work, "copying the workspace")


def history_step(workspace: Workspace) -> TemplateStep:
    """Return the template-chain step that copies a workspace's history, which an edit does not change."""
    history = workspace.history
    assert history is not None, "checked by the caller"

    def work(instance: Instance) -> dict[str, bytes]:
        _send(instance.adopt("agent", IN_THE_MAKING), replace(workspace, entries=()))
        return {}

    return TemplateStep("history", (str(workspace.top), history.digest()), work, "copying the history")


def fixtures_step(set_up: PureSetUp, limits: TestLimits) -> TemplateStep:
    """Return the template-chain step that sets up session fixtures.

    Its machine has no grants: no network, no secrets. It is kept only if all fixtures stand in it.
    """
    identities = [[each.key, each.scope, each.name, each.base] for each in set_up.fixtures]

    def work(instance: Instance) -> dict[str, bytes]:
        link = instance.adopt("runner", IN_THE_MAKING)
        asked = instance.requests.added
        try:
            records = [*RunnerSession(link).prepare(set_up.item, len(set_up.fixtures), limits)]
        except MachineCrashed as error:
            raise instance.end_error("template") from error
        instance.network.settle()
        requests = instance.requests.since(asked)
        if requests:
            raise MachineError(f"the set-up uses the network ({requests[0]})")
        if not records or records[-1].get("stands") is not True:
            raise MachineError("the set-up failed")
        return {FIXTURES: "".join(json.dumps(record) + "\n" for record in records).encode()}

    return TemplateStep("fixtures", (json.dumps(identities),), work, f"setting up {names_of([set_up])}")


def names_of(set_ups: Sequence[PureSetUp]) -> str:
    """Return the names of all fixtures of ``set_ups``, safe to show."""
    names = dict.fromkeys(fixture.name for each in set_ups for fixture in each.fixtures)
    return sanitize_line(" ".join(names))


def _unpack(machine: MicroVM, workspace: Workspace) -> None:
    machine.path(str(workspace.top)).mkdir(parents=True, exist_ok=True)
    _send(machine.client.link(), workspace)


def _send(link: Link, workspace: Workspace) -> None:
    """Send a workspace to the agent or to a runner that has not collected yet."""
    with tempfile.TemporaryFile() as archive:
        workspace.write_tar(archive)
        archive.seek(0)
        send_file(link, "unpack", str(workspace.top), archive)


def _chosen(workspace: Workspace, project: Path, wanted: tuple[str, ...]) -> Workspace:
    """Return the part of ``workspace`` that ``prepare_inputs`` names.

    Raises:
        UsageError: A name matches nothing.
    """
    below = project.resolve().relative_to(workspace.top.resolve())
    prefixes = [str(PurePosixPath(below, name)) for name in wanted]
    history = workspace.history if ".git" in prefixes else None
    for name, prefix in zip(wanted, prefixes, strict=True):
        if not (prefix == ".git" and history) and not any(
            _inside(entry.path, prefix) for entry in workspace.entries
        ):
            raise UsageError(
                f"invalid prepare_inputs: expected files or folders of the workspace, got {name!r}",
                resolution="name files or folders below the project that git does not ignore; .git needs "
                "the key git",
            )
    entries = [e for e in workspace.entries if any(_inside(e.path, prefix) for prefix in prefixes)]
    return workspace.part(entries, history=history is not None)


def _inside(path: str, prefix: str) -> bool:
    return path == prefix or path.startswith(prefix.rstrip("/") + "/")
