"""Machines for a remote suite: copies of the template in which the runner has collected the tests."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from pytest_microvm.agent.transfer import receive_tree
from pytest_microvm.errors import MachineError, MicroVMError, QuotaExceeded, TransferError, UsageError
from pytest_microvm.host.host import Host
from pytest_microvm.host.kept import KeptMachine
from pytest_microvm.host.project_grants import asked_by
from pytest_microvm.host.starting import StartedCopy
from pytest_microvm.machine import evidence
from pytest_microvm.machine.instance import Usage
from pytest_microvm.machine.microvm import MicroVM
from pytest_microvm.machine.relay import on_terminal, plainly
from pytest_microvm.mounts.copying import receive
from pytest_microvm.network.proxy.log import NetworkLog
from pytest_microvm.settings import trust as project_trust
from pytest_microvm.settings.configuration import DEFAULT_TIMEOUT, load_settings
from pytest_microvm.settings.mounts import Mount
from pytest_microvm.settings.spec import DEFAULT_OUTPUT, MachineSpec
from pytest_microvm.suite.backend import (
    BackendFacts,
    CollectPlan,
    Progress,
    RemoteSettings,
    RunOptions,
    StandingFixtures,
)
from pytest_microvm.suite.plan import artifacts_folder
from pytest_microvm.suite.template_chain import (
    COLLECTED,
    DEBUGGER_TERMINAL,
    FIXTURES,
    PYTHON,
    SuiteChain,
    fixtures_step,
    names_of,
)
from pytest_microvm.suite.workspace import scan
from pytest_microvm.templates.pool import Pool
from pytest_microvm.templates.unpublished import UnpublishedTemplate
from pytest_microvm.untrusted.manifest import file_mode
from pytest_microvm.untrusted.redaction import Redactor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from pytest_microvm.agent.link import Link
    from pytest_microvm.suite.backend import MachineCheckpoint, PureSetUp, TestLimits
    from pytest_microvm.templates.chain import TemplateStep
    from pytest_microvm.templates.store import Template
    from pytest_microvm.untrusted.extraction import ExtractionLimits


_IMAGE_WITH_GIT = "agent"  # the image python with git
_KEY_SHOWN = 12  # characters, as in `pytest-microvm template list`


class RunnerLease:
    """A copy of the collected template (a :class:`pytest_microvm.suite.backend.RunnerMachine`)."""

    def __init__(self, host: Host, copied: StartedCopy) -> None:
        self._host = host
        self._copied = copied
        self._instance = copied.instance
        self._ended = False
        self.given_up = False
        self._machine = MicroVM(copied.instance, copied.facts)  # for operations through the agent
        self.facts = copied.facts
        self.link: Link = copied.instance.link("runner")

    @property
    def redactor(self) -> Redactor:
        """The redactor that removes its secrets from test reports."""
        return self._instance.redactor

    @property
    def requests(self) -> NetworkLog:
        """The log of its network requests so far."""
        self._instance.network.settle()
        return self._instance.requests

    @property
    def usable(self) -> bool:
        """True while the machine runs."""
        return self._instance.vmm.alive

    def usage(self) -> Usage:
        """Return the machine's usage so far."""
        return self._instance.usage()

    def exceeded(self) -> QuotaExceeded | None:
        """Return the quota that the machine exceeded, if any."""
        return self._instance.exceeded()

    def end_for(self, quota: QuotaExceeded) -> None:
        """End the machine because its test exceeded a quota that the caller measured."""
        guard = self._instance.guard
        if guard is not None:
            guard.exceed(quota.quota, quota.limit, quota.observed, quota.details)

    def end_error(self) -> MachineError:
        """Return the error that ended the machine: a quota, or a crash with the console's tail."""
        return self._instance.end_error(self.facts.id)

    def save(self, folder: Path, error: MachineError, about: str) -> None:
        """Save the machine's records in ``folder``."""
        evidence.save(folder, self._instance, self.facts, error, about)

    def tighten(self, limits: TestLimits) -> None:
        """Lower the machine's limits."""
        guard = self._instance.guard
        if guard is not None:
            guard.tighten(pids=limits.pids, cpu_seconds=limits.cpu_seconds, lifetime=limits.lifetime)
        if limits.network is not None:
            self._instance.narrow(self._host.policy(limits.network, self._copied.base.image))

    def watch(self) -> None:
        """Start enforcing the machine's limits."""
        self._instance.watch(self.facts.limits)

    def hand_over(self, mounts: tuple[Mount, ...]) -> None:
        """Mount ``mounts`` in the machine."""
        for mount in mounts:
            self._machine.hand_over(mount)

    def take_back(self) -> list[str]:
        """Copy changes in its mounts back; return messages about the result, for users."""
        lines = []
        for mounted in self._machine.mounts:
            try:
                changes = mounted.copy_back()
                if mounted.mount.kind != "live":  # live mounts have nothing to copy back
                    lines.append(f"{mounted.mount.target}: {changes}")
            except MicroVMError as error:
                lines.append(str(error))
        return lines

    def pull(self, source: PurePosixPath, target: Path) -> None:
        """Copy a file from the machine, with its permissions; nothing else, and no more than it can hold."""
        path = self._machine.path(source)
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise TransferError(f"{source} is not a file in the machine")
        receive(self._machine, path, target)
        target.chmod(file_mode(path.stat()["mode"]))

    def pull_folder(self, source: PurePosixPath, target: Path, limits: ExtractionLimits) -> None:
        """Copy what a folder of the machine holds into a folder of this computer, as ``limits`` allow."""
        with self._machine.client.explained():
            receive_tree(self._machine.client.link(), source, target, limits)

    def push(self, source: Path, target: PurePosixPath) -> None:
        """Copy a file into the machine, with the folders above it."""
        self._machine.path(target.parent).mkdir(parents=True, exist_ok=True)
        self._machine.push(source, target)

    def remove(self, target: PurePosixPath) -> None:
        """Remove a file of the machine, if it has it."""
        self._machine.path(target).unlink(missing_ok=True)

    def debug(self, socket: str) -> None:
        """Lend this process's terminal, or what stdin is instead, to a debugger in the machine."""
        command = [PYTHON, "-IS", DEBUGGER_TERMINAL, socket]
        if sys.stdin.isatty():
            on_terminal(self._machine, command)
        else:
            plainly(self._machine, command, raw=False)

    def give_up(self) -> None:
        """End the machine, because another one needs its room."""
        self.given_up = True
        self.kill()

    def kill(self) -> None:
        """End the machine; a second call does nothing."""
        if not self._ended:
            self._ended = True
            self._instance.close()
            self._host.release(self._copied)

    def forward(self, port: int) -> AbstractContextManager[object]:
        """Forward a TCP port of this computer's loopback to the same one of the machine."""
        return self._instance.network.forward(port, at=port)

    def checkpoint(self, forks: int) -> KeeperCheckpoint:
        """Return a checkpoint of a keeper, which runs on."""
        return KeeperCheckpoint(self._host, self._host.checkpoint(self._copied), forks)

    def keep(self, about: str) -> KeptMachine | None:
        """Freeze the machine to disk; ``None`` if it was not started for that, or has ended."""
        if self._copied.own is None or self._ended or not self.usable:
            return None
        kept = self._host.keep(self._copied, about)
        self._ended = True
        return kept


class KeeperCheckpoint:
    """The state of a keeper (a :class:`pytest_microvm.suite.backend.MachineCheckpoint`).

    Args:
        host: The host.
        template: The state; one that is published belongs to the host.
        forks: About how many forks will be started from it.
        restored: Names of the fixtures that an earlier run has set up.
    """

    def __init__(self, host: Host, template: Template, forks: int, restored: str = "") -> None:
        self._host = host
        self.template = template
        self.forks = max(1, forks)
        self.restored = restored

    @property
    def name(self) -> str:
        """The machine's id, or the begin of the published template's key."""
        return self.template.key[:_KEY_SHOWN]

    def close(self) -> None:
        """End the forks that wait for a test; remove the state unless it is published."""
        self._host.close_pool(_pool_key(self.template))
        if isinstance(self.template, UnpublishedTemplate):
            self.template.close()


def _pool_key(template: Template) -> tuple[str, str]:
    return ("runner", str(template.folder))


class MachineBackend:
    """The backend of ``pytest --microvm`` (a :class:`pytest_microvm.suite.backend.Backend`).

    Args:
        settings: The command line's settings.
        progress: Called with descriptions of slow steps.
        change: Changes the machines' spec, after configuration and command line.

    Raises:
        UsageError: The configuration is invalid.
        HostError: This computer lacks a requirement.
    """

    def __init__(
        self,
        settings: RemoteSettings,
        progress: Progress,
        change: Callable[[MachineSpec], MachineSpec] = lambda spec: spec,
    ) -> None:
        config = load_settings(settings.rootdir, settings.values)
        project_trust.check(settings.rootdir, asked_by(config))
        if not {"image", "python", "prepare"} & {*settings.values, *config.named}:
            image = _IMAGE_WITH_GIT if config.git else config.spec.image
            config = replace(config, spec=replace(config.spec, python="host", image=image))
        self._artifacts = artifacts_folder(config.artifacts, settings)
        self._config = replace(config, spec=change(config.spec))
        self._host = Host(
            project=settings.rootdir,
            require_accel=self._config.require_accel,
            lock="require" if self._config.locked else "follow",
            timeout=DEFAULT_TIMEOUT,
            retries=0,  # the suite itself retries, and reports that with the test
            say=progress,
        )
        self._base = self._host.base(self._config.spec)
        self._template: Template | None = None
        self._steps: list[TemplateStep] = []
        self._began = time.time()
        self._keeping = self._config.keep == "failed"
        self._pool_size = self._config.pool_size
        if self._config.pool is None and settings.workers:
            self._pool_size = max(1, self._pool_size // settings.workers)  # they share the cores

    @property
    def facts(self) -> BackendFacts:
        """The accelerator and image that run the tests."""
        accelerator, image = self._base.accelerator, self._base.image
        return BackendFacts(accelerator.name, accelerator.reason, image.name, image.digest, image.python)

    @property
    def options(self) -> RunOptions:
        """The part of the merged configuration that the suite uses."""
        limits = self._base.limits
        return RunOptions(
            isolation=self._config.isolation,
            timeout=limits.timeout,
            output=limits.output or DEFAULT_OUTPUT,
            counted=limits.pids is not None,
            retries=self._config.retries,
            artifacts=self._artifacts,
            arguments=self._config.args,
            fail_on_denied=self._config.fail_on_denied,
            network=self._config.spec.network or self._base.image.network,
            junit_profile=self._config.junit_profile,
            write_back=self._config.write_back,
            keep_tmp=self._config.keep_tmp,
            mounted=tuple(mount.target for mount in self._config.spec.mounts),
            fixtures=self._config.fixtures,
            pure_fixtures=self._config.pure_fixtures,
            repeat=self._config.repeat,
            debug_port=self._config.debug_port,
        )

    def collect(self, plan: CollectPlan, progress: Progress) -> bytes:
        """Return the runner's answer to ``collect``, from the template cache if nothing changed.

        Raises:
            MicroVMError: No machine could be prepared.
        """
        progress("reading the workspace")
        workspace = scan(plan.workspace, git=self._config.git)
        if workspace.size > self._base.resources.disk:
            raise UsageError(
                f"the workspace {plan.workspace} is larger than the machine's disk",
                details=f"{workspace.size} bytes of files, {self._base.resources.disk} bytes of disk",
                resolution="give the machine a larger disk (--microvm-disk), or have git ignore some",
            )
        chain = SuiteChain(self._host, self._base, self._config, plan)
        self._steps = chain.steps(workspace)
        self._template = self._host.template(self._base, self._steps)
        return self._template.attachment(COLLECTED)

    def lease(self) -> RunnerLease:
        """Return a fresh copy of the machine whose runner has collected the tests.

        Raises:
            BootError: It did not resume.
        """
        lease = self._taken(self._collected, self._pool)
        try:
            lease.hand_over(self._config.spec.mounts)
        except BaseException:
            lease.kill()
            raise
        return lease

    def keeper(self, begin: MachineCheckpoint | None) -> RunnerLease | None:
        """Return a machine that checkpoints can be taken of, or ``None``.

        Raises:
            BootError: It did not resume.
        """
        if not self._forks:
            return None
        assert begin is None or isinstance(begin, KeeperCheckpoint)
        template = self._collected if begin is None else begin.template
        copied = self._host.try_copy(template, self._base, "runner", keepable=True)
        if copied is None:
            return None
        lease = RunnerLease(self._host, copied)
        self._host.spare(copied, lease.give_up)
        lease.watch()
        return lease

    def standing(
        self, set_ups: Sequence[PureSetUp], limits: TestLimits, forks: int
    ) -> StandingFixtures | None:
        """Return the template in which fixtures stand, made if it is missing.

        Raises:
            MicroVMError: It could not be made.
        """
        if not self._forks:
            return None
        steps = [*self._steps, *(fixtures_step(each, limits) for each in set_ups)]
        template = self._host.cached(self._base, steps)
        if template is None:
            # Another worker may be making it, and need the room of machines that wait here.
            self._host.close_pool(_pool_key(self._collected))
            template = self._host.template(self._base, steps)
        earlier = float(template.meta["created"]) < self._began
        names = names_of(set_ups)
        checkpoint = KeeperCheckpoint(self._host, template, forks, names if earlier else "")
        return StandingFixtures(checkpoint, template.attachment(FIXTURES), earlier)

    def fork(self, checkpoint: MachineCheckpoint) -> RunnerLease:
        """Return a fresh copy of a keeper, or of a template in which fixtures stand.

        Raises:
            BootError: It did not resume.
        """
        assert isinstance(checkpoint, KeeperCheckpoint)
        pool = self._pool_of(checkpoint.template, min(self._pool_size, checkpoint.forks - 1))
        lease = self._taken(checkpoint.template, pool)
        lease.facts = replace(lease.facts, fork_of=checkpoint.name, restored=checkpoint.restored)
        return lease

    def close(self) -> None:
        """End the machines that are ready."""
        self._host.close()

    @property
    def _forks(self) -> bool:
        """True if machines may be forked.

        Else a fork would share a directory or a placeholder with another, or a secret be on a disk.
        """
        grants = self._base.grants
        return not (self._config.spec.mounts or grants.secrets or grants.credentials)

    def _taken(self, template: Template, pool: Pool[RunnerLease]) -> RunnerLease:
        lease = pool.take()
        if lease is None:
            copied = self._host.copy(template, self._base, "runner", keepable=self._keeping)
            lease = RunnerLease(self._host, copied)
        lease.watch()
        return lease

    @property
    def _pool(self) -> Pool[RunnerLease]:
        return self._pool_of(self._collected, self._pool_size)

    def _pool_of(self, template: Template, size: int) -> Pool[RunnerLease]:
        def make() -> RunnerLease | None:
            copied = self._host.try_copy(template, self._base, "runner", keepable=self._keeping)
            return None if copied is None else RunnerLease(self._host, copied)

        def new() -> Pool[RunnerLease]:
            return Pool(size, make, RunnerLease.kill, lambda lease: lease.usable)

        return self._host.pool(_pool_key(template), new)

    @property
    def _collected(self) -> Template:
        if self._template is None:
            raise MachineError("nothing has been collected yet")
        return self._template
