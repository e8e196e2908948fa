"""Limits enforced by the guest's own kernel: the number of processes, and protection against thrashing.

The agent and everything it starts are in one control group. The kernel refuses a fork beyond its limit; the
agent reports that on the console before the host learns how the command or test ended. A machine whose
memory is full would read its programs from the disk again and again, for minutes, before the kernel kills
a process; the kernel is configured to kill once the pages used in the last tenth of a second no longer fit.
Sources: cgroup-v2 and multigen_lru of the kernel's admin guide, mount(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select

_ROOT = "/sys/fs/cgroup"
_GROUP = _ROOT + "/machine"
_LRU = "/sys/kernel/mm/lru_gen"
_KEEP_MILLISECONDS = "100"  # a second could also end a machine that only writes large files
_TOLD = b"\nmicrovm: too many processes\n"  # the host looks for it: pytest_microvm/machine/console.py


class Refusals:
    """A file for a selector that becomes readable when the kernel has refused a fork."""

    def __init__(self) -> None:
        self._events = os.open(_GROUP + "/pids.events", os.O_RDONLY | os.O_CLOEXEC)
        # The file itself is always readable; a change is an exceptional condition (EPOLLPRI), which selectors
        # do not support.
        self._watch = select.epoll()
        self._watch.register(self._events, select.EPOLLPRI)

    def fileno(self) -> int:
        """Return the descriptor to select on."""
        return self._watch.fileno()

    def tell(self) -> None:
        """Report on the console if a fork was refused since the last call."""
        if self._watch.poll(0):
            os.pread(self._events, 256, 0)  # the next change is only signalled after a read
            tell_of_refusal()


def tell_of_refusal() -> None:
    """Report on the console that a fork was refused."""
    console = os.open("/dev/console", os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC)
    os.write(console, _TOLD)
    os.close(console)


def enter_group() -> Refusals | None:
    """Move this process into its own control group; return ``None`` if the kernel has no control groups."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        if not os.path.exists(_ROOT + "/cgroup.procs"):
            libc.mount(b"cgroup2", _ROOT.encode(), b"cgroup2", 0, None)
        _write(_ROOT + "/cgroup.subtree_control", "+pids")
        os.makedirs(_GROUP, exist_ok=True)
        _write(_GROUP + "/cgroup.procs", str(os.getpid()))
        return Refusals()
    except OSError:
        return None


def forbid_thrashing() -> None:
    """Make the kernel's out-of-memory killer act before the machine thrashes (since Linux 6.1)."""
    with contextlib.suppress(OSError):
        _write(_LRU + "/enabled", "y")
        _write(_LRU + "/min_ttl_ms", _KEEP_MILLISECONDS)


def limit_processes(processes: int) -> None:
    """Limit the group to ``processes`` more than run now (the agent's and the runner's own)."""
    _write(_GROUP + "/pids.max", str(processes + int(_read("pids.current"))))


def refused_forks() -> int:
    """Return the number of forks refused so far."""
    return int(_read("pids.events").split()[1])


def _read(name: str) -> str:
    with open(_GROUP + "/" + name) as file:
        return file.read()


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
