"""The observer of a suite's machines: what is done and shown when they start, write and end."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import pytest

from pytest_microvm.errors import HostError, MachineError, MicroVMError
from pytest_microvm.machine.instance import MachineFacts, Usage
from pytest_microvm.suite import checks
from pytest_microvm.suite.backend import RunnerMachine
from pytest_microvm.suite.ending import Ending
from pytest_microvm.suite.kept_folders import GuestFolders, KeptFolders
from pytest_microvm.suite.machine_coverage import MachineCoverage
from pytest_microvm.suite.progress import TerminalProgress
from pytest_microvm.suite.write_back import WriteBack


class SuiteObserver:
    """An observer that calls this package's hooks, brings files back, and shows messages to the user.

    Args:
        config: pytest's configuration.
        progress: Shows a message at once.
        ending: Keeps what machines output; ``None`` if nothing happens at the end of the run.
        write_back: Brings files back.
        coverage: Takes what machines execute; ``None`` if coverage does not measure this process.
        kept: Brings temporary folders of failed tests back; ``None``: they go with their machines.

    Attributes:
        lends_terminal: Whether debuggers get this computer's terminal.
        debug_port: The port of this computer that leads to the machine of the present test, if any.
    """

    def __init__(
        self,
        config: pytest.Config,
        progress: TerminalProgress,
        ending: Ending | None,
        write_back: WriteBack,
        *,
        coverage: MachineCoverage | None,
        kept: KeptFolders | None,
    ) -> None:
        self._config = config
        self._coverage = coverage
        self._write_back = write_back
        self._kept = kept
        self._progress = progress
        self._ending = ending
        self.lends_terminal = False
        self.debug_port: int | None = None
        self._forwarding = ExitStack()

    def finished(self, facts: MachineFacts, output: dict[str, Any] | None) -> None:
        """Record what a machine's plug-ins output, for the end of the run."""
        if self._ending is not None:
            self._ending.records.add_output(facts.id, output)

    def started(self, machine: RunnerMachine, nodeid: str) -> None:
        """Give the machine the files of those before it; call ``pytest_microvm_started``."""
        self._config.hook.pytest_microvm_started(config=self._config, facts=machine.facts, nodeid=nodeid)
        self._write_back.give(machine)
        if self.debug_port is not None:
            self._forwarding.close()
            self._forward(machine, self.debug_port)

    def _forward(self, machine: RunnerMachine, port: int) -> None:
        try:
            self._forwarding.enter_context(machine.forward(port))
        except OSError as error:
            raise HostError(
                f"port {port} of this computer cannot lead to machines: {error.strerror or error}",
                resolution="choose another one with --microvm-debug-port",
            ) from error

    def debugging(self, machine: RunnerMachine, socket: str) -> None:
        """Lend the terminal to a debugger in a machine: pytest lets go of it as for its own debugger.

        Raises:
            ProtocolViolation: The user has not lent it.
        """
        if not self.lends_terminal:
            raise checks.violation("a request for the terminal")
        capture: Any = self._config.pluginmanager.get_plugin("capturemanager")
        if capture is not None:
            capture.suspend(in_=True)
        try:
            sys.stdout.flush()
            machine.debug(socket)
        finally:
            if capture is not None:
                capture.resume()

    def executed(self, record: dict[str, Any]) -> None:
        """Add what a machine has executed to the coverage of this process.

        Raises:
            ProtocolViolation: It is malformed, or nobody asked for it.
        """
        if self._coverage is None:
            raise checks.violation("coverage that nobody asked for")
        self._coverage.add(record)

    def explain(self, report: pytest.TestReport) -> None:
        """Tell in a report why the debugger of its test had no terminal."""
        if report.failed and not self.lends_terminal and "bdb.BdbQuit" in report.longreprtext:
            report.sections.append(("Debugger", "to debug in this terminal: pytest --microvm --pdb"))

    def wrote(self, machine: RunnerMachine, nodeid: str, paths: Sequence[str]) -> None:
        """Bring files back; tell the user if that fails."""
        try:
            self._write_back.take(machine, paths)
        except MicroVMError as error:
            self.told(nodeid, str(error))

    def failed(self, machine: RunnerMachine, nodeid: str, folders: GuestFolders | None) -> list[str]:
        """Bring the temporary folders of a failed test back, if that was requested; return their places."""
        return [] if self._kept is None else self._kept.take(machine, nodeid, folders)

    def stopped(self, facts: MachineFacts, usage: Usage) -> None:
        """Call ``pytest_microvm_stopped``."""
        self._forwarding.close()
        self._config.hook.pytest_microvm_stopped(config=self._config, facts=facts, usage=usage)

    def retried(self, nodeid: str, error: MachineError, retry: int, most: int) -> None:
        """Show at once that a machine failed before its test started."""
        self._progress(f"{nodeid}: infra: {error.brief}; trying a fresh machine ({retry} of {most})")

    def told(self, nodeid: str, line: str) -> None:
        """Show a message about changes copied back from a machine."""
        self._progress(f"{nodeid}: {line}")
