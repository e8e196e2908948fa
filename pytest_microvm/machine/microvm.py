""":class:`MicroVM`, the user's object for a machine, with the vocabulary of subprocess and pathlib."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from pytest_microvm.agent.path import GuestPath
from pytest_microvm.agent.process import GuestProcess, command_arguments
from pytest_microvm.agent.transfer import pull, push
from pytest_microvm.agent.users import GuestUser, guest_user
from pytest_microvm.errors import MachineError, MicroVMError, UsageError
from pytest_microvm.events import Event
from pytest_microvm.machine.client import MachineClient
from pytest_microvm.machine.instance import Instance, MachineFacts, Usage
from pytest_microvm.mounts.mounting import Mounted, copy_all_back, mount
from pytest_microvm.settings.mounts import Access, Changes, Kind, Mount, absolute, check_apart

if TYPE_CHECKING:
    from typing_extensions import Self

    from pytest_microvm.network.port.forwarding import Address
    from pytest_microvm.network.port.service import MachineNetwork
    from pytest_microvm.settings.spec import MachineSpec

_LAST_COMMANDS = 20
_LAST_PORT = 65535
_MOST_PORTS = 256
_LONGEST_PATH = 107  # unix(7)
_DOCKER_SOCKET = "/run/docker.sock"
_log = logging.getLogger("pytest_microvm")


class Start(Protocol):
    """Starts machines for :meth:`MicroVM.start`."""

    def __call__(self, spec: MachineSpec | None, *, pool: int, checkpoints: bool, **changes: Any) -> MicroVM:
        """Start a machine."""


class MicroVM:
    """A running machine.

    Get one from the ``microvm`` fixture, or without pytest from :meth:`start`::

        with MicroVM.start(image="python", memory="1G") as vm:
            vm.run(["python3", "--version"], check=True)

    Attributes:
        facts: Facts known from its start, including its limits.
        last_commands: The last 20 commands and transfers requested of it.
    """

    _starter: ClassVar[Callable[[], Start]]  # set by the composition root, see host.py

    def __init__(
        self,
        instance: Instance,
        facts: MachineFacts,
        *,
        on_close: Callable[[], None] = lambda: None,
        on_keep: Callable[[str], None] | None = None,
        on_checkpoint: Callable[[], Checkpoint] | None = None,
    ) -> None:
        self.facts = facts
        self.instance = instance
        self.client = MachineClient(instance, facts)
        self.last_commands: deque[str] = deque(maxlen=_LAST_COMMANDS)
        self.mounts: list[Mounted] = []
        self._docker: Any = None
        self._while_open = contextlib.ExitStack()
        self._on_close = on_close
        self._on_keep = on_keep
        self._on_checkpoint = on_checkpoint

    @classmethod
    def start(
        cls, spec: MachineSpec | None = None, *, pool: int = 0, checkpoints: bool = False, **changes: Any
    ) -> MicroVM:
        """Start a machine (a copy of a cached template; the first one of its kind boots).

        Slow steps, and limits that this host cannot enforce, are logged by the logger ``pytest_microvm``.

        Args:
            spec: The machine's spec; the defaults of :class:`MachineSpec` if omitted.
            pool: Number of additional machines of the same kind to keep ready for later calls.
            checkpoints: Whether to allow :meth:`checkpoint`, which makes the start slower.
            **changes: Fields of the spec as users write them, such as ``memory="1G"``.

        Returns:
            A running machine; use it as a context manager, or call :meth:`close`.

        Raises:
            UsageError: A field is unknown or invalid.
            HostError: This computer lacks a requirement.
            BootError: The machine did not come up.
        """
        return cls._starter()(spec, pool=pool, checkpoints=checkpoints, **changes)

    @classmethod
    def started_by(cls, starter: Callable[[], Start]) -> None:
        """Make :meth:`start` use the function that ``starter`` returns: the default host's."""
        cls._starter = starter

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_exc: object) -> None:
        try:
            self.close()
        except MicroVMError as error:
            if kind is None:
                raise
            _log.warning("%s", error)  # the exception that ended the block matters more

    def __repr__(self) -> str:
        return f"<MicroVM {self.facts.id} {self.facts.image}{' (ended)' if self.closed else ''}>"

    @property
    def id(self) -> str:
        """Its name, unique on this host; also its first host name."""
        return self.facts.id

    @property
    def alive(self) -> bool:
        """True while the machine runs."""
        return self.client.alive

    @property
    def closed(self) -> bool:
        """True once the user has ended the machine."""
        return self.client.closed

    # Commands

    def run(
        self,
        args: str | Sequence[str | PurePosixPath],
        *,
        check: bool = False,
        timeout: float | None = None,
        input: str | bytes | None = None,  # noqa: A002 - subprocess's word
        env: Mapping[str, str] | None = None,
        cwd: str | PurePosixPath | None = None,
        user: str | int | None = None,
        text: bool = True,
    ) -> subprocess.CompletedProcess[Any]:
        """Run a command and return its result; like :func:`subprocess.run` with captured output.

        Args:
            args: A list of arguments, or a string for the machine's ``/bin/sh``.
            check: Raise when the command fails.
            timeout: Seconds after which it is killed. If omitted, the machine's ``timeout`` quota applies;
                exceeding that ends the machine too.
            input: Data for its stdin.
            env: Variables added to the machine's usual ones.
            cwd: Its working directory; ``/`` if omitted.
            user: The user that runs it; root if omitted.
            text: Whether ``input``, ``stdout`` and ``stderr`` are str (UTF-8, errors replaced) or bytes.

        Raises:
            subprocess.CalledProcessError: It failed and ``check`` was set.
            subprocess.TimeoutExpired: It took longer than ``timeout``.
            FileNotFoundError: The machine has no such program or folder.
            QuotaExceeded: The machine exceeded a quota, and was ended.
            MachineCrashed: The machine ended.
        """
        with self.popen(args, stdin=input is not None, env=env, cwd=cwd, user=user, text=text) as process:
            stdout, stderr = process.communicate(input, timeout=timeout)
        done = subprocess.CompletedProcess(process.args, process.returncode or 0, stdout, stderr)
        if check:
            done.check_returncode()
        return done

    def popen(
        self,
        args: str | Sequence[str | PurePosixPath],
        *,
        stdin: bool = False,
        env: Mapping[str, str] | None = None,
        cwd: str | PurePosixPath | None = None,
        user: str | int | None = None,
        text: bool = True,
        pty: tuple[int, int] | None = None,
    ) -> GuestProcess:
        """Start a command and return while it runs; like :class:`subprocess.Popen` with pipes.

        The machine's ``timeout`` counts while the caller waits for the command, not while it runs in the
        background.

        Args:
            args: A list of arguments, or a string for the machine's ``/bin/sh``.
            stdin: Whether to provide ``process.stdin``; otherwise its stdin is empty.
            env: Variables added to the machine's usual ones.
            cwd: Its working directory; ``/`` if omitted.
            user: The user that runs it; root if omitted.
            text: Whether its files are text (UTF-8, errors replaced) or bytes.
            pty: Rows and columns of a terminal to run it on; stderr then comes with stdout.

        Raises:
            FileNotFoundError: The machine has no such program or folder.
            MachineCrashed: The machine ended.
        """
        usual = {**dict(self.facts.environment), **self.instance.given.environment}
        request = command_arguments(args, {**usual, **(env or {})}, cwd, user)
        shown = args if isinstance(args, str) else " ".join(map(str, args))
        self._asked("command", shown)
        with self.client.operation(f"start of {shown}"):
            return GuestProcess(self.client, args, request, stdin=stdin, text=text, pty=pty)

    def wait_until_succeeds(
        self,
        args: str | Sequence[str],
        *,
        timeout: float,
        interval: float = 0.1,
        **options: Any,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command again and again until it succeeds.

        Args:
            args: As for :meth:`run`.
            timeout: Seconds after which to give up.
            interval: Seconds between two tries.
            **options: As for :meth:`run`.

        Raises:
            subprocess.TimeoutExpired: It never succeeded; its last output is in the exception, or that of the
                try before if the last one was cut off before it printed anything.
            MachineCrashed: The machine ended.
        """
        deadline = time.monotonic() + timeout
        done: subprocess.CompletedProcess[str] | None = None
        while True:
            try:
                done = self.run(args, timeout=max(0.1, deadline - time.monotonic()), **options)
            except subprocess.TimeoutExpired as error:
                if done is None or error.stdout:
                    raise
                raise subprocess.TimeoutExpired(args, timeout, done.stdout, done.stderr) from error
            if done.returncode == 0:
                return done
            if time.monotonic() + interval > deadline:
                raise subprocess.TimeoutExpired(done.args, timeout, done.stdout, done.stderr)
            threading.Event().wait(
                interval
            )  # polling: the condition is the user's, so the guest has no event to wait for

    # Files

    def path(self, *segments: str | PurePosixPath) -> GuestPath:
        """Return a path in the machine, used like :class:`pathlib.Path`."""
        return GuestPath(self.client, *segments)

    def user(self, name: str | int, *, create: bool = False) -> GuestUser:
        """Return a user of the machine.

        Args:
            name: Its name or number, and ``:GROUP``, as for :meth:`run`.
            create: Whether to make a user that is not in /etc/passwd, and a home folder that is missing.

        Raises:
            UsageError: There is no such user or group.
        """
        return guest_user(self.client, name, create=create)

    def push(
        self,
        source: str | os.PathLike[str],
        target: str | PurePosixPath,
        owner: str | int | None = None,
    ) -> None:
        """Copy a file or a folder from the host into the machine.

        Args:
            source: On the host; relative to the current folder.
            target: In the machine: the path of the new file or folder.
            owner: The user of the machine to whom it belongs there, as for :meth:`run`; if omitted, a file
                belongs to root, and what a folder holds to the numbers that it has on the host.

        Raises:
            UsageError: There is no ``source``.
            TransferError: The machine could not store it (its disk is full, for example).
        """
        self._asked("push", f"push {source} {target}")
        whose = None if owner is None else self.user(owner)
        with self.client.operation("push"):
            numbers = None if whose is None else (whose.uid, whose.gid)
            push(self.client.link(), Path(source), PurePosixPath(target), numbers)

    def pull(self, source: str | PurePosixPath, target: str | os.PathLike[str]) -> Path:
        """Copy a file or a folder from the machine to the host.

        Nothing is written outside ``target``: links out of it, devices and odd names are refused.

        Args:
            source: In the machine.
            target: On the host: an existing folder to put it into, or the path of the copy.

        Returns:
            The path of the copy.

        Raises:
            FileNotFoundError: The machine has no ``source``.
            TransferError: The data was refused, or could not be written.
        """
        self._asked("pull", f"pull {source} {target}")
        with self.client.operation("pull"):
            return pull(self.client.link(), PurePosixPath(source), Path(target))

    def mount(
        self,
        source: str | os.PathLike[str],
        target: str | PurePosixPath,
        mode: Access = "rw",
        kind: Kind = "copy",
        owner: str | int | None = None,
    ) -> Mounted:
        """Mount a directory or a file of the host in the machine.

        Args:
            source: On the host; relative to the current folder. Created if it is missing and ``mode`` is
                ``rw``.
            target: In the machine: a path where nothing exists yet.
            mode: ``ro``: nothing is copied back; ``rw``: the machine's changes are copied back.
            kind: ``copy``, ``git`` or ``live``; see :class:`Mount`.
            owner: The user of the machine to whom it belongs there, as for :meth:`run`; root if omitted.

        Returns:
            The mount, which copies changes back on request, at the end of a ``with`` block, or when the
            machine is closed.

        Raises:
            UsageError: It cannot be mounted.
            TransferError: The machine could not store it.
        """
        where = absolute(os.fspath(source), Path.cwd())
        return self.hand_over(Mount(where, PurePosixPath(target), mode, kind, owner))

    def hand_over(self, what: Mount) -> Mounted:
        """Mount as a spec's ``Mount`` specifies; see :meth:`mount`."""
        check_apart([*(mounted.mount for mounted in self.mounts), what], "mount")
        self._asked("mount", f"mount {what}")
        mounted = mount(self, what)
        self.mounts.append(mounted)
        return mounted

    def copy_back(self) -> list[Changes]:
        """Copy the machine's changes in its mounts back to the host; see :meth:`Mounted.copy_back`."""
        return copy_all_back(self.mounts)

    # Connections

    @property
    def network(self) -> MachineNetwork:
        """The machine's network, with ``network.requests`` and, among these, ``network.denied``."""
        return self.instance.network

    def forward(
        self, target: int | str | PurePosixPath, *, unix: bool | None = None
    ) -> AbstractContextManager[Address]:
        """Forward connections from this computer to a server in the machine, inside a ``with`` block.

        Up to 500 clients may be connected at once; others wait. The server need not listen yet: clients that
        connect too early are refused, see :meth:`wait_for_port`. Clients are dropped when the block or the
        machine ends.

        Args:
            target: The TCP port of a server in the machine, on its loopback or on all addresses; or the path
                of a Unix socket in the machine.
            unix: Whether to offer a Unix socket, which only this user can connect to, instead of a TCP port,
                which any user of this computer can. If omitted, the same kind as ``target``.

        Returns:
            The address to connect to: ``host`` and ``port``, or ``path``; and ``url``.

        Raises:
            UsageError: The machine has been closed, or ``target`` is not valid.
            MachineCrashed: The machine has ended.
        """
        return self._forwarded(target, unix=not isinstance(target, int) if unix is None else unix)

    def forward_ports(self, targets: Iterable[int]) -> AbstractContextManager[str]:
        """Forward several TCP ports of the machine under their own numbers, inside a ``with`` block.

        Use it for clients that learn a port's number from the machine, as Docker's clients do. Any user of
        this computer can connect.

        Args:
            targets: TCP ports, of which 256 at most; as for :meth:`forward`, no server need listen yet.

        Returns:
            The address to connect to, one of this computer's loopback that other machines do not share.

        Raises:
            UsageError: The machine has been closed, or a port is not valid.
            MachineCrashed: The machine has ended.
            OSError: Other programs listen on one of the ports, at all addresses.
        """
        return self._forwarded_ports(targets)

    @property
    def docker(self) -> Any:
        """A ``requests_unixsocket.Session`` for the machine's Docker daemon: ``vm.docker.get("/version")``.

        It connects to nothing else, and is closed with the machine.

        Raises:
            UsageError: The extra ``docker`` is not installed, or the machine has been closed.
            MachineCrashed: The machine has ended.
        """
        self.client.check_open()
        if self._docker is None:
            self._docker = self._while_open.enter_context(self._docker_session())
        return self._docker

    def wait_for_port(self, target: int | str | PurePosixPath, *, timeout: float) -> None:
        """Wait until a server in the machine listens on a TCP port or Unix socket; it sees one connection.

        Args:
            target: As for :meth:`forward`.
            timeout: Seconds after which to give up.

        Raises:
            TimeoutError: No server listened in time.
            UsageError: The machine has been closed, or ``target`` is not valid.
            MachineCrashed: The machine ended.
        """
        with self.client.operation(f"wait for {target}"):
            try:
                self._open_network().wait_for(_served(target), timeout)
            except TimeoutError as error:
                raise TimeoutError(f"machine {self.id}, waiting for {target}: {error}") from error

    # The machine

    def usage(self) -> Usage:
        """Return the machine's usage so far, as measured by the host."""
        return self.instance.usage()

    @property
    def events(self) -> list[Event]:
        """The machine's last 1000 events, in order."""
        return self.instance.events.list()

    def console_tail(self, lines: int = 30) -> str:
        """Return the last lines of the console, with control characters made visible."""
        return self.instance.console_text(lines)

    def keep(self, about: str) -> bool:
        """Freeze the machine to disk, to be entered with ``pytest-microvm shell``, and end it here.

        Args:
            about: Its purpose, such as a test's node id.

        Returns:
            True if it was kept: it must have been started for that, and still run.
        """
        if self._on_keep is None or self.closed or not self.alive:
            return False
        try:
            self.give_back()
        finally:
            self._end_use()
            self._on_keep(about)
        return True

    def checkpoint(self) -> Checkpoint:
        """Return the machine's present state, in which forks can be started; the machine runs on.

        Processes that run in the background, servers and their connections within the machine included, run
        on in each fork. Connections to the outside do not.

        Raises:
            UsageError: The machine was not started with ``checkpoints=True``, or cannot have any.
            MachineError: A command runs that the host reads from, or the state cannot be saved.
        """
        if self._on_checkpoint is None:
            raise UsageError(
                f"no checkpoint can be taken of machine {self.id}",
                resolution="start it with checkpoints=True, without secrets, credentials and mounts; those "
                "of microvm_class, microvm_module and microvm_session are",
            )
        if self.instance.link("agent").channel.open_streams:
            raise MachineError(
                f"no checkpoint of machine {self.id}: a command runs whose output is read on this computer",
                resolution="wait for it, or start it in the machine's background: "
                "run('server >/dev/null 2>&1 &')",
            )
        return self._on_checkpoint()

    def close(self) -> None:
        """End the machine and discard everything in it; a second call does nothing.

        If it still runs, its changes in mounts are copied back first.

        Raises:
            MicroVMError: Some changes could not be copied back. The machine has ended all the same.
        """
        if not self.closed:
            try:
                self.give_back()
            finally:
                self._end_use()
                self.instance.close()
                self._on_close()

    def _end_use(self) -> None:
        """Refuse further requests, and release what the user got for as long as the machine is open."""
        self.client.closed = True
        self._while_open.close()

    def give_back(self) -> list[Changes]:
        """Copy changes in mounts back for the last time: :meth:`close` will not repeat it."""
        mounted, self.mounts = self.mounts, []
        if mounted and not self.alive:
            places = ", ".join(str(one.mount.target) for one in mounted if one.mount.kind != "live")
            if places:
                _log.warning("machine %s has ended: nothing came back of %s", self.id, places)
            return []
        return copy_all_back(mounted)

    @contextlib.contextmanager
    def _forwarded(self, target: int | str | PurePosixPath, *, unix: bool) -> Iterator[Address]:
        self._asked("forward", f"forward {target}")
        with contextlib.ExitStack() as stack:
            with self.client.explained():
                address = stack.enter_context(self._open_network().forward(_served(target), unix=unix))
            yield address

    @contextlib.contextmanager
    def _forwarded_ports(self, targets: Iterable[int]) -> Iterator[str]:
        ports = list(targets)
        if len(ports) > _MOST_PORTS:
            raise UsageError(
                f"{len(ports)} ports cannot be forwarded at once", resolution=f"name {_MOST_PORTS} at most"
            )
        for one in ports:
            _served(one)
        self._asked("forward", f"forward {len(ports)} ports")
        with contextlib.ExitStack() as stack:
            with self.client.explained():
                host = stack.enter_context(self._open_network().forward_ports(ports))
            yield host

    @contextlib.contextmanager
    def _docker_session(self) -> Iterator[Any]:
        try:
            from pytest_microvm.machine.docker import DockerSession  # noqa: PLC0415 - an extra
        except ModuleNotFoundError as error:
            raise UsageError(
                f"microvm.docker needs the Python package {error.name}, which is not installed",
                resolution="pip install 'pytest-microvm[docker]'",
            ) from error
        with self.forward(_DOCKER_SOCKET) as address, DockerSession(address.url) as session:
            yield session

    def _open_network(self) -> MachineNetwork:
        self.client.check_open()
        return self.instance.network

    def _asked(self, kind: str, text: str) -> None:
        self.last_commands.append(self.client.redactor.text(text))
        self.client.record(kind, text)


def _served(target: int | str | PurePosixPath) -> int | str:
    """Return a port, or the path of a Unix socket.

    Raises:
        UsageError: It is neither.
    """
    if isinstance(target, int):
        if not 0 < target <= _LAST_PORT:
            raise UsageError(f"{target} is no port", resolution=f"name one from 1 to {_LAST_PORT}")
        return target
    path = str(target)
    if not path.startswith("/") or len(os.fsencode(path)) > _LONGEST_PATH:
        raise UsageError(
            f"{path!r} cannot be the path of a Unix socket",
            resolution=f"give an absolute one of at most {_LONGEST_PATH} bytes",
        )
    return path


class Checkpoint:
    """The state of a machine at one time: its processes, memory and disk.

    Use it as a context manager, or call :meth:`close`; the end of the run closes it too.

    Args:
        machine: The machine's id.
        fork: Starts a fork.
        close: Removes the state.
    """

    def __init__(self, machine: str, fork: Callable[[], MicroVM], close: Callable[[], None]) -> None:
        self.machine = machine
        self._fork = fork
        self._close = close
        self._closed = False

    def fork(self) -> MicroVM:
        """Start a machine in this state, with a name, entropy and grants of its own.

        Raises:
            UsageError: The checkpoint is closed.
            BootError: The fork did not wake up.
        """
        if self._closed:
            raise UsageError(
                f"the checkpoint of machine {self.machine} is closed", resolution="take another one"
            )
        return self._fork()

    def close(self) -> None:
        """Remove the state; forks run on. A second call does nothing."""
        if not self._closed:
            self._closed = True
            self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Checkpoint of {self.machine}{' (closed)' if self._closed else ''}>"
