"""Child processes of the agent: started, fed, drained with backpressure, reaped."""

from __future__ import annotations

import fcntl
import os
import pty
import pwd
import struct
import subprocess
import termios
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
READ_SIZE = 65536


class Child:
    """One command and the streams it is connected to.

    Args:
        handle: What the host calls it.
        request: The ``exec`` message: ``argv`` or ``shell``, ``env``, ``cwd``, ``user``, ``pty``
            ([rows, columns]) and the stream numbers ``stdin``, ``stdout``, ``stderr``.
    """

    def __init__(self, handle: int, request: dict[str, Any]) -> None:
        self.handle = handle
        self.terminal = bool(request.get("pty"))
        self.reported = False  # whether the host was told of its end
        self.returncode: int | None = None
        self.usage: dict[str, Any] = {}
        self.waiters: list[int] = []
        self.outputs: dict[int, int] = {}  # descriptor -> stream
        self.stdin: int | None = None
        self.stdin_stream: int | None = request.get("stdin")
        self.pending_input = bytearray()
        self.input_ended = False
        self.process = self._start(request)

    @property
    def pid(self) -> int:
        """The process id, which is its process group too."""
        return self.process.pid

    def reaped(self, status: int, usage: Any) -> None:
        """Take note of the end that wait4(2) told."""
        code = (
            os.waitstatus_to_exitcode(status) if hasattr(os, "waitstatus_to_exitcode") else _exit_code(status)
        )
        self.process.returncode = self.returncode = code
        self.usage = {
            "user_seconds": usage.ru_utime,
            "system_seconds": usage.ru_stime,
            "max_rss_bytes": usage.ru_maxrss * 1024,
        }

    def signal(self, number: int) -> None:
        """Send a signal to the command and everything it started in its process group."""
        if self.returncode is None:
            os.killpg(self.pid, number)

    def _start(self, request: dict[str, Any]) -> subprocess.Popen[bytes]:
        argv = request.get("argv") or ["/bin/sh", "-c", request["shell"]]
        user = _user(request.get("user"))
        environment = {
            "PATH": DEFAULT_PATH,
            "HOME": user.pw_dir if user else "/root",
            "USER": user.pw_name if user else "root",
            "LANG": "C.UTF-8",
            **request.get("env", {}),
        }
        options: dict[str, Any] = {"cwd": request.get("cwd") or "/", "env": environment, "close_fds": True}
        executable = _which(argv[0], environment["PATH"], options["cwd"])
        demote = _demotion(user)
        if request.get("pty"):
            return self._start_on_terminal(argv, executable, request, options, demote)
        if demote:
            options["preexec_fn"] = demote
        process = subprocess.Popen(
            argv,
            executable=executable,
            stdin=subprocess.PIPE if request.get("stdin") else subprocess.DEVNULL,
            stdout=subprocess.PIPE if request.get("stdout") else subprocess.DEVNULL,
            stderr=_stderr_target(request),
            start_new_session=True,
            bufsize=0,
            **options,
        )
        self._take_pipes(process, request)
        return process

    def _take_pipes(self, process: subprocess.Popen[bytes], request: dict[str, Any]) -> None:
        """Own the pipes' descriptors (Popen would close them when it is collected)."""
        for name in ("stdout", "stderr"):
            pipe = getattr(process, name)
            if pipe is not None:
                self.outputs[os.dup(pipe.fileno())] = request[name]
                pipe.close()
        if process.stdin is not None:
            self.stdin = os.dup(process.stdin.fileno())
            os.set_blocking(self.stdin, False)
            process.stdin.close()

    def _start_on_terminal(
        self,
        argv: list[str],
        executable: str,
        request: dict[str, Any],
        options: dict[str, Any],
        demote: Callable[[], None] | None,
    ) -> subprocess.Popen[bytes]:
        master, slave = pty.openpty()
        set_window_size(master, request["pty"])

        def take_terminal() -> None:
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            if demote:
                demote()

        try:
            process = subprocess.Popen(
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
        self.stdin = os.dup(master)  # a number of its own, to be watched for room while the other is read
        return process


def set_window_size(descriptor: int, size: list[int]) -> None:
    """Tell a terminal its size (rows, columns)."""
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


def _stderr_target(request: dict[str, Any]) -> int:
    if request.get("stderr") == "stdout":
        return subprocess.STDOUT
    return subprocess.PIPE if request.get("stderr") else subprocess.DEVNULL


def _user(name: str | int | None) -> pwd.struct_passwd | None:
    if name is None or name in ("root", 0):
        return None
    try:
        return pwd.getpwuid(name) if isinstance(name, int) else pwd.getpwnam(name)
    except KeyError:
        raise LookupError(f"the machine has no user {name!r}") from None


def _demotion(user: pwd.struct_passwd | None) -> Callable[[], None] | None:
    if user is None:
        return None

    def demote() -> None:
        os.initgroups(user.pw_name, user.pw_gid)
        os.setgid(user.pw_gid)
        os.setuid(user.pw_uid)

    return demote


def _which(program: str, path: str, cwd: str) -> str:
    """Return the program's file, looked up in the command's own PATH, not the agent's."""
    if "/" in program:
        return program
    for folder in path.split(":"):
        candidate = os.path.join(cwd, folder, program)
        if os.access(candidate, os.X_OK) and not os.path.isdir(candidate):
            return candidate
    raise FileNotFoundError(2, "no such program in the machine", program)


def _exit_code(status: int) -> int:
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
