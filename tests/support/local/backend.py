"""A backend without machines: the guest's runner as local processes (``-p support.local.backend``)."""

import contextlib
import itertools
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pytest_microvm.agent.link import Link
from pytest_microvm.errors import MachineCrashed, MachineError
from pytest_microvm.guest.files import StreamWriter, pack
from pytest_microvm.machine.instance import MachineFacts, Usage
from pytest_microvm.network.proxy.log import NetworkLog
from pytest_microvm.settings.configuration import load_settings
from pytest_microvm.settings.spec import DEFAULT_OUTPUT, Limits
from pytest_microvm.suite.backend import BackendFacts, RunOptions, StandingFixtures
from pytest_microvm.suite.session import RunnerSession
from pytest_microvm.untrusted.extraction import extract
from pytest_microvm.untrusted.redaction import Redactor

microvm_host_only = True
HERE = Path(__file__).parent
PACKAGE = HERE.parents[2] / "pytest_microvm"
PYTHON_VARIABLE = "LOCAL_PYTHON"  # the guest's Python and its options, if it is another
GUEST_VARIABLE = "LOCAL_GUEST"  # set in the runner's process alone


def pytest_microvm_backend(config, settings, progress):
    """Return the backend in place of the one with machines."""
    progress("starting a local process")
    return LocalBackend(settings)


class LocalBackend:
    """A process that forks for each lease (a :class:`pytest_microvm.suite.backend.Backend`)."""

    facts = BackendFacts("none", "local processes, for tests", "local", "sha256:" + "0" * 64)

    def __init__(self, settings):
        config = load_settings(settings.rootdir, settings.values)
        self.options = RunOptions(
            isolation=config.isolation,
            timeout=config.spec.timeout,
            output=config.spec.output or DEFAULT_OUTPUT,
            retries=config.retries,
            artifacts=config.artifacts,
            junit_profile=config.junit_profile,
            write_back=config.write_back,
            keep_tmp=config.keep_tmp,
            fixtures=config.fixtures,
            pure_fixtures=config.pure_fixtures,
            repeat=config.repeat,
            debug_port=config.debug_port,
        )
        self._template = None
        self._numbers = itertools.count(1)
        self._machines = []
        self._standing = {}  # checkpoints by the set-ups that led there
        self._name = settings.worker or "main"

    def collect(self, plan, progress):
        """Start the runner and return what it collected."""
        progress("collecting")
        host, guest = socket.socketpair()
        folder = self._code_folder()
        environment = {**os.environ, GUEST_VARIABLE: "1"}
        for name in ("PYTEST_ADDOPTS", "PYTEST_PLUGINS", "PYTHONPATH", "PYTEST_XDIST_WORKER"):
            environment.pop(name, None)
        for name in [name for name in environment if name.startswith("COVERAGE_")]:
            del environment[name]
        with guest:
            python = shlex.split(os.environ.get(PYTHON_VARIABLE) or sys.executable)
            command = [*python, HERE / "runner.py", folder, str(guest.fileno())]
            self._template = subprocess.Popen(
                command,
                pass_fds=[guest.fileno()],
                env=environment,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # no machine is reached by this terminal's Ctrl-C
            )
        self._control = host
        return RunnerSession(self._connect(host)).collect(plan)

    def _code_folder(self):
        """Return what a guest has of this package: ``guest`` and ``wire`` below an empty package."""
        self._folder = tempfile.TemporaryDirectory()
        package = Path(self._folder.name, "pytest_microvm")
        package.mkdir()
        package.joinpath("__init__.py").touch()
        for name in ("guest", "wire"):
            package.joinpath(name).symlink_to(PACKAGE / name)
        return self._folder.name

    def _connect(self, control):
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(control, [b"x"], [theirs.fileno()])
        return Link(ours)

    def lease(self):
        """Return a fork of the runner, as a machine."""
        return self._machine(self._control, "")

    def keeper(self, begin):
        """Return a fork of the runner, or of a checkpoint's process, that forks again at checkpoints."""
        return self.lease() if begin is None else self.fork(begin)

    def standing(self, set_ups, limits, forks):
        """Return a process in which fixtures stand; it waits until this backend is closed."""
        machine = self.keeper(self._standing.get(tuple(set_ups[:-1])))
        last = set_ups[-1]
        records = [*RunnerSession(machine.link).prepare(last.item, len(last.fixtures), limits)]
        if not records[-1]["stands"]:
            machine.kill()
            raise MachineError("the set-up failed")
        checkpoint = machine.checkpoint(forks)
        machine.kill()
        waiting = self._standing[tuple(set_ups)] = LocalStandingFixtures(checkpoint.control, checkpoint.name)
        answer = "".join(json.dumps(record) + "\n" for record in records)
        return StandingFixtures(waiting, answer.encode(), earlier=False)

    def fork(self, checkpoint):
        """Return a fork of a checkpoint's process."""
        return self._machine(checkpoint.control, checkpoint.name)

    def _machine(self, control, fork_of):
        started = time.monotonic()
        link = self._connect(control)
        pid = int.from_bytes(control.recv(8, socket.MSG_WAITALL), "big")
        RunnerSession(link).resume({}, timeout=60)
        facts = MachineFacts(
            id=f"{self._name}-{next(self._numbers)}",
            image=self.facts.image,
            image_digest=self.facts.image_digest,
            accelerator=self.facts.accelerator,
            accelerator_reason=self.facts.accelerator_reason,
            ready_seconds=time.monotonic() - started,
            limits=Limits(1, 128 * 1024**2, 1024**3),
            fork_of=fork_of,
        )
        machine = LocalMachine(link, facts, pid)
        self._machines.append(machine)
        return machine

    def close(self):
        """Kill all processes."""
        for machine in self._machines:
            machine.kill()
        for waiting in self._standing.values():
            waiting.control.close()
        if self._template is not None:
            self._template.kill()
            self._template.wait()
            self._control.close()
            self._folder.cleanup()


class LocalCheckpoint:
    """A process that waits, and forks (a :class:`pytest_microvm.suite.backend.MachineCheckpoint`)."""

    def __init__(self, control, name):
        self.control = control
        self.name = name

    def close(self):
        """Let the process end, which notices that its socket is closed."""
        self.control.close()


class LocalStandingFixtures(LocalCheckpoint):
    """A process that waits, and forks, also for later tests."""

    def close(self):
        """Let the process wait."""


class LocalMachine:
    """A fork of the runner (a :class:`pytest_microvm.suite.backend.RunnerMachine`)."""

    def __init__(self, link, facts, pid):
        self.link = link
        self.facts = facts
        self._pid = pid

    redactor = Redactor()
    given_up = False

    @property
    def usable(self):
        """Return whether the process was not ended from here."""
        return bool(self._pid)

    @property
    def requests(self):
        """Return an empty log: there is no network proxy."""
        return NetworkLog()

    def take_back(self):
        """Return no changes: nothing is mounted."""
        return []

    def exceeded(self):
        """Return none: no quota is enforced."""

    def end_for(self, quota):
        """End the machine for a quota."""
        self.kill()

    def end_error(self):
        """Return the error of a machine that has ended."""
        return MachineCrashed("the machine ended", details="local process: no console")

    def save(self, folder, error, about):
        """Write the error where evidence is saved."""
        folder.mkdir(parents=True)
        (folder / "report.txt").write_text(str(error))

    def tighten(self, limits):
        """Change nothing: no limit is enforced."""

    def pull(self, source, target):
        """Copy a file of this computer."""
        shutil.copy(source, target)

    def pull_folder(self, source, target, limits):
        """Copy a folder of this computer, by the archive that a machine would send."""
        with tempfile.TemporaryFile() as archive:
            pack(str(source), StreamWriter(archive.write))
            archive.seek(0)
            extract(archive, target, limits)

    def push(self, source, target):
        """Copy nothing: the machine has this computer's files."""

    def remove(self, target):
        """Remove nothing, for the same reason."""

    def debug(self, socket):
        """Run the program here that would run in the machine; Ctrl-C is the debugger's."""
        program = PACKAGE / "guest" / "debugger_terminal.py"
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            subprocess.run([sys.executable, "-IS", program, socket], check=True)
        finally:
            signal.signal(signal.SIGINT, before)

    def forward(self, port):
        """Forward nothing: the machine's ports are this computer's."""
        return contextlib.nullcontext()

    def checkpoint(self, forks):
        """Make the process fork a child that waits; further forks are that child's."""
        with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
            path = f"{folder}/control"
            listener.bind(path)
            listener.listen()
            self.link.call("checkpoint", timeout=60, path=path)
            control, _address = listener.accept()
        return LocalCheckpoint(control, self.facts.id)

    def keep(self, about):
        """Return none: the machine is not kept."""

    def usage(self):
        """Return a usage that is always the same."""
        return Usage(peak_memory_bytes=1024, cpu_seconds=0.5)

    def kill(self):
        """Kill the process."""
        if self._pid:
            with contextlib.suppress(ProcessLookupError):  # first, or it would see the link end, and finish
                os.kill(self._pid, signal.SIGKILL)
            self.link.close()
            self._pid = 0
