"""Commands as child processes: their start, user, pipes or terminal, and exit status."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import stat
import struct
import subprocess
import sys
import termios
from typing import TYPE_CHECKING, Any

from pytest_microvm.guest.users import User, find_user

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
READ_SIZE = 65536
_SHELL = "/bin/sh"


class Child:
    """One command and the streams it is connected to.

    Args:
        handle: The host's number for it.
        request: The ``exec`` message: ``argv`` or ``shell``, ``env``, ``cwd``, ``user``, ``pty``
            ([rows, columns]) and the stream numbers ``stdin``, ``stdout``, ``stderr``.
    """

    def __init__(self, handle: int, request: dict[str, Any]) -> None:
        self.handle = handle
        self.terminal = bool(request.get("pty"))
        self.reported = False  # whether its end was reported to the host
        self.returncode: int | None = None
        self.usage: dict[str, Any] = {}
        self.waiters: list[int] = []
        self.outputs: dict[int, int] = {}  # descriptor -> stream
        self._unread: dict[int, int] = {}  # descriptor -> bytes, once the command has ended
        self.stdin: int | None = None
        self.stdin_stream: int | None = request.get("stdin")
        self.pending_input = bytearray()
        self.input_ended = False
        self._process: subprocess.Popen[bytes] | None = None
        self.pid = self._start(request)  # also its process group

    def reaped(self, status: int, usage: Any) -> None:
        """Record the exit status and resource usage that wait4(2) returned."""
        code = (
            os.waitstatus_to_exitcode(status) if hasattr(os, "waitstatus_to_exitcode") else _exit_code(status)
        )
        self.returncode = code
        self._unread = {descriptor: _waiting(descriptor) for descriptor in self.outputs}
        if self._process is not None:
            self._process.returncode = code  # otherwise Popen would wait for the child again
        self.usage = {
            "user_seconds": usage.ru_utime,
            "system_seconds": usage.ru_stime,
            "max_rss_bytes": usage.ru_maxrss * 1024,
        }

    def next_read(self, descriptor: int) -> int:
        """Return the number of bytes to read from an output; after the command's end, only those left then.

        Background processes that it started may hold the pipe open for ever.
        """
        return READ_SIZE if self.returncode is None else min(READ_SIZE, self._unread.get(descriptor, 0))

    def was_read(self, descriptor: int, size: int) -> None:
        """Record that ``size`` bytes were read from an output."""
        if descriptor in self._unread:
            self._unread[descriptor] -= size

    def signal(self, number: int) -> None:
        """Send a signal to the command and everything it started in its process group."""
        if self.returncode is None:
            os.killpg(self.pid, number)

    def _start(self, request: dict[str, Any]) -> int:
        argv = request.get("argv") or [_shell(), "-c", request["shell"]]
        user = find_user(request.get("user"))
        environment = {
            "PATH": DEFAULT_PATH,
            "HOME": user.home,
            "USER": user.name,
            "LOGNAME": user.name,
            "SHELL": user.shell,
            "LANG": "C.UTF-8",
            **request.get("env", {}),
        }
        cwd = request.get("cwd") or "/"
        executable = _which(argv[0], environment["PATH"], cwd)
        if request.get("pty"):
            options: dict[str, Any] = {"cwd": cwd, "env": environment, "close_fds": True}
            with _missing_loader(executable):
                return self._start_on_terminal(argv, executable, request, options, user)
        theirs = self._make_pipes(request)
        try:
            _give(theirs, user)
            with _missing_loader(executable):
                self._process = subprocess.Popen(
                    argv, executable=executable, cwd=cwd, env=environment, start_new_session=True,
                    stdin=theirs[0], stdout=theirs[1], stderr=theirs[2],
                    preexec_fn=_demotion(user),  # noqa: PLW1509 - the child only makes system calls
                )  # fmt: skip
        except BaseException:
            self._close_ours()
            raise
        else:
            return self._process.pid
        finally:
            for descriptor in set(theirs):
                os.close(descriptor)

    def _make_pipes(self, request: dict[str, Any]) -> tuple[int, int, int]:
        """Create the requested pipes; return the command's ends: stdin, stdout, stderr."""
        nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        stdin = stdout = stderr = nothing
        if request.get("stdin"):
            stdin, self.stdin = os.pipe()
            os.set_blocking(self.stdin, False)
        if request.get("stdout"):
            ours, stdout = os.pipe()
            self.outputs[ours] = request["stdout"]
        if request.get("stderr") == "stdout":
            stderr = stdout
        elif request.get("stderr"):
            ours, stderr = os.pipe()
            self.outputs[ours] = request["stderr"]
        if nothing not in (stdin, stdout, stderr):
            os.close(nothing)
        return stdin, stdout, stderr

    def _close_ours(self) -> None:
        for descriptor in [*self.outputs, *([] if self.stdin is None else [self.stdin])]:
            os.close(descriptor)
        self.outputs.clear()
        self.stdin = None

    def _start_on_terminal(
        self,
        argv: list[str],
        executable: str,
        request: dict[str, Any],
        options: dict[str, Any],
        user: User,
    ) -> int:
        master, slave = pty.openpty()
        set_window_size(master, request["pty"])
        _give((slave,), user)
        demote = _demotion(user)

        def take_terminal() -> None:
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            if demote:
                demote()

        try:
            process = self._process = subprocess.Popen(
                argv, executable=executable, stdin=slave, stdout=slave, stderr=slave,
                preexec_fn=take_terminal, **options,  # noqa: PLW1509 - the child only makes system calls
            )  # fmt: skip
        except BaseException:
            os.close(master)
            raise
        finally:
            os.close(slave)
        os.set_blocking(master, False)
        self.outputs[master] = request["stdout"]
        self.stdin = os.dup(master)  # a second descriptor, to select on writing separately
        return process.pid


def _waiting(descriptor: int) -> int:
    """Return the number of bytes readable from a pipe or terminal now (ioctl_tty(2), pipe(7)).

    What was written to a terminal reaches its other end only once a kernel worker has run. poll(2) waits for
    that (``n_tty_poll`` in Linux), FIONREAD does not.
    """
    size = bytearray(4)
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    poll.poll(0)
    with contextlib.suppress(OSError):
        fcntl.ioctl(descriptor, termios.FIONREAD, size)
    return int.from_bytes(size, sys.byteorder)


def set_window_size(descriptor: int, size: list[int]) -> None:
    """Set the window size (rows, columns) of a terminal."""
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", size[0], size[1], 0, 0))


def reap() -> list[tuple[int, int, Any]]:
    """Return (pid, status, usage) of every child that has ended; PID 1 inherits orphans too."""
    ended: list[tuple[int, int, Any]] = []
    while True:
        try:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended.append((pid, status, usage))


def _demotion(user: User) -> Callable[[], None] | None:
    if user.uid == 0 and user.gid == 0:
        return None

    def demote() -> None:
        os.setgroups(user.groups)
        os.setgid(user.gid)
        os.setuid(user.uid)

    return demote


def _give(descriptors: tuple[int, ...], user: User) -> None:
    """Make a user the owner of pipes and terminals; else it cannot open ``/dev/stderr`` or its terminal."""
    if user.uid:
        for descriptor in set(descriptors):
            if stat.S_ISFIFO(os.fstat(descriptor).st_mode) or os.isatty(descriptor):
                os.fchown(descriptor, user.uid, -1)


def _shell() -> str:
    if not os.path.exists(_SHELL):
        raise FileNotFoundError(
            2, "the machine has no shell: give a program and a list of its arguments", _SHELL
        )
    return _SHELL


@contextlib.contextmanager
def _missing_loader(executable: str) -> Iterator[None]:
    """Name the cause when a program that exists is "not found": what the kernel starts it with is missing."""
    try:
        yield
    except FileNotFoundError as error:
        if error.filename == executable and os.path.exists(executable):
            why = "its interpreter, or the loader of its C library, is not in the machine"
            raise FileNotFoundError(2, why, executable) from error
        raise


def _which(program: str, path: str, cwd: str) -> str:
    """Return the program's path, looked up in the command's own PATH, not the agent's."""
    if "/" in program:
        return program
    for folder in path.split(":"):
        candidate = os.path.join(cwd, folder, program)
        if os.access(candidate, os.X_OK) and not os.path.isdir(candidate):
            return candidate
    raise FileNotFoundError(2, "no such program in the machine", program)


def _exit_code(status: int) -> int:
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
