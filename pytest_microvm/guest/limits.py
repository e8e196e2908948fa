"""What the guest's own kernel enforces: a number of processes, and an end to thrashing.

The agent and everything it starts are in one control group; a fork beyond its limit is refused by the
kernel, which is told on the console, before the host hears how the command or test ended. A machine whose
memory is full would read its programs from the disk again and again, for minutes, before the kernel kills
anything: it is told to kill once the pages of the last tenth of a second no longer fit. Sources: cgroup-v2
and multigen_lru of the kernel's admin guide, mount(2).
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
    """Readable, for a selector, when the kernel has refused a fork."""

    def __init__(self) -> None:
        self._events = os.open(_GROUP + "/pids.events", os.O_RDONLY | os.O_CLOEXEC)
        # The file itself is always readable; a change is an exceptional condition, which selectors lack.
        self._watch = select.epoll()
        self._watch.register(self._events, select.EPOLLPRI)

    def fileno(self) -> int:
        """Return the descriptor to select on."""
        return self._watch.fileno()

    def tell(self) -> None:
        """Say on the console if a fork was refused since it was last asked."""
        if self._watch.poll(0):
            os.pread(self._events, 256, 0)  # only once it is read, the next change is told
            tell_of_refusal()


def tell_of_refusal() -> None:
    """Say on the console that a fork was refused."""
    console = os.open("/dev/console", os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC)
    os.write(console, _TOLD)
    os.close(console)


def enter_group() -> Refusals | None:
    """Put this process into a group of its own; ``None`` where the guest's kernel has no control groups."""
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
    """Let the kernel's out-of-memory killer act before the machine stands still (since Linux 6.1)."""
    with contextlib.suppress(OSError):
        _write(_LRU + "/enabled", "y")
        _write(_LRU + "/min_ttl_ms", _KEEP_MILLISECONDS)


def limit_processes(processes: int) -> None:
    """Let ``processes`` more run than do now (the agent's and the runner's own)."""
    _write(_GROUP + "/pids.max", str(processes + int(_read("pids.current"))))


def refused_forks() -> int:
    """Return how many forks were refused so far."""
    return int(_read("pids.events").split()[1])


def _read(name: str) -> str:
    with open(_GROUP + "/" + name) as file:
        return file.read()


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
