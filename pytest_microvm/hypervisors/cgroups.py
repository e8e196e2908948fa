"""Control groups: limit the total memory of a VMM process and throttle its CPU time.

Each machine has its own group, which is removed with it. Depending on the host, that is a folder of cgroup v1
or v2 (as root, or in a delegated group), a scope of the user's systemd, or nothing.

Sources: Linux's Documentation/admin-guide/cgroup-v1/memory.rst and cgroup-v2.rst; systemd-run(1).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pytest_microvm.hypervisors.containment import Wall

VARIABLE = "PYTEST_MICROVM_CGROUP"
"""Environment variable that names a delegated cgroup v2 folder, in which machines get their groups."""

NONE, FOLDERS, SCOPE = "none", "folders", "scope"

_SYSTEMD_RUN = "systemd-run"
_SCOPE_ENVIRONMENT = ("XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS", "PATH")
_PREFIX = "pytest-microvm"
_PERIOD = 100_000  # microseconds, the kernel's default
_LEAST_QUOTA = 1_000  # microseconds, the least the kernel takes
_SCOPE_TIMEOUT = 10.0
_numbers = itertools.count(1)


@dataclass(frozen=True)
class CgroupLimits:
    """Resource limits of one process.

    Args:
        memory: Bytes of anonymous memory, page cache and kernel memory together.
        throttle: Seconds of CPU time per second; ``None``: unlimited.
    """

    memory: int
    throttle: float | None = None


@dataclass(frozen=True)
class Controller:
    """A cgroup controller: its interface version, and the folder in which to create groups."""

    version: int
    parent: Path


@dataclass(frozen=True)
class Cgroups:
    """The cgroup support of this host.

    Args:
        kind: ``folders`` (we create groups ourselves), ``scope`` (systemd does) or ``none``.
        controllers: ``memory`` and ``cpu``, if usable; with ``scope`` only the names matter.
        reason: Why support is limited, for display.
    """

    kind: str = NONE
    controllers: Mapping[str, Controller | None] = field(default_factory=dict)
    reason: str = ""

    def __str__(self) -> str:
        versions = sorted({f"v{found.version}" for found in self.controllers.values() if found})
        words = {NONE: "no cgroup", SCOPE: "scopes of systemd --user"}.get(
            self.kind, f"cgroup {'+'.join(versions)}"
        )
        return f"{words} ({', '.join(sorted(self.controllers))})" if self.controllers else words

    def told(self) -> Wall:
        """Return the cgroup status of this host, for display."""
        missing = self.not_enforced(CgroupLimits(2**30, throttle=0.5))
        if not missing:
            return Wall("cgroup", True, str(self))
        detail = (
            f"{self}, so neither a memory ceiling nor a throttle holds" if self.kind == NONE else str(self)
        )
        if self.reason:
            detail += f" ({self.reason})"
        return Wall("cgroup", False, detail, f"delegate a cgroup v2 to this user and name it in {VARIABLE}")

    def prefix(self, limits: CgroupLimits) -> list[str]:
        """Return the argv prefix that runs a command under ``limits``; empty without systemd scopes."""
        if self.kind != SCOPE:
            return []
        command = [_SYSTEMD_RUN, "--user", "--scope", "--quiet", "--collect"]
        if "memory" in self.controllers:
            command += ["-p", f"MemoryMax={limits.memory}", "-p", "MemorySwapMax=0"]
        if "cpu" in self.controllers and limits.throttle is not None:
            command += ["-p", f"CPUQuota={max(1, round(limits.throttle * 100))}%"]
        # systemd-run needs the environment to find the user's systemd, the machine does not.
        return [*command, "--", "env", "-i"]

    def environment(self) -> dict[str, str]:
        """Return the environment variables that :meth:`prefix` needs; the command itself inherits none."""
        names = _SCOPE_ENVIRONMENT if self.kind == SCOPE else ()
        return {name: os.environ[name] for name in names if name in os.environ}

    def group(self, limits: CgroupLimits) -> Cgroup:
        """Create a group for ``limits``; without usable folders it is an empty one that does nothing.

        Raises:
            OSError: The kernel refused it.
        """
        wanted = {"memory"} if limits.throttle is None else {"memory", "cpu"}
        found = {name: self.controllers.get(name) for name in sorted(wanted)}
        folders = {name: use for name, use in found.items() if use is not None}
        name = f"{_PREFIX}-{os.getpid()}-{_start_time(os.getpid())}-{next(_numbers)}"
        return Cgroup(
            limits, {key: Controller(use.version, use.parent / name) for key, use in folders.items()}
        )

    def not_enforced(self, limits: CgroupLimits) -> tuple[str, ...]:
        """Return one line that names the ``limits`` not enforced on this host, or an empty tuple."""
        missing = []
        if limits.throttle is not None and "cpu" not in self.controllers:
            missing.append(f"cpus = {limits.throttle:g} is not throttled")
        if "memory" not in self.controllers:
            missing.append("QEMU's memory has no ceiling but its address space")
        if not missing:
            return ()
        why = "no cgroup can be used here" if self.kind == NONE else "this host's cgroups are not enough"
        return (f"{why}{f' ({self.reason})' if self.reason else ''}: {' and '.join(missing)}",)


class Cgroup:
    """The cgroup of one VMM process.

    Args:
        limits: Limits for all its members together.
        folders: The group's folder for each controller; created here.

    Raises:
        OSError: The kernel refused it.
    """

    def __init__(self, limits: CgroupLimits, folders: Mapping[str, Controller]) -> None:
        self._limits = limits
        self._folders = folders
        try:
            for controller in folders.values():
                controller.parent.mkdir(exist_ok=True)  # v2: one folder for all controllers
            if "memory" in folders:
                _limit_memory(folders["memory"], limits.memory)
            if "cpu" in folders and limits.throttle is not None:
                _limit_cpu(folders["cpu"], limits.throttle)
        except OSError:
            self.remove()
            raise

    @property
    def folders(self) -> tuple[Path, ...]:
        """The group's folders, without duplicates."""
        return tuple(dict.fromkeys(controller.parent for controller in self._folders.values()))

    def add(self, pid: int) -> None:
        """Add a process, with all its threads, to the group.

        Raises:
            OSError: The kernel refused it.
        """
        for folder in self.folders:
            (folder / "cgroup.procs").write_text(str(pid))

    def ceiling_hit(self) -> int | None:
        """Return the memory limit in bytes if the kernel killed a member for exceeding it, else ``None``."""
        memory = self._folders.get("memory")
        if memory is None:
            return None
        name = "memory.oom_control" if memory.version == 1 else "memory.events"
        with contextlib.suppress(OSError, ValueError):
            counts = dict(line.split() for line in (memory.parent / name).read_text().splitlines())
            if int(counts.get("oom_kill", 0)) > 0:
                return self._limits.memory
        return None

    def remove(self) -> None:
        """Remove the group once its members are reaped; a second call does nothing."""
        for folder in self.folders:
            with contextlib.suppress(OSError):  # it still has members: the next run's sweep removes it
                folder.rmdir()


@functools.cache
def find_cgroups() -> Cgroups:
    """Return this host's cgroup support, tested once by use; stale groups are removed."""
    mounts, own = Path("/proc/self/mountinfo"), Path("/proc/self/cgroup")
    if not (mounts.exists() and own.exists()):
        return Cgroups(reason="this system has none")
    parents = parse_parents(mounts.read_text(), own.read_text())
    usable: dict[str, Controller | None] = {}
    reasons = []
    for name, found in parents.items():
        try:
            controller = _prepared(name, found)
            sweep(controller.parent)
            _try(name, controller)
        except OSError as error:
            reasons.append(f"{name}: {error.strerror or error}")
        else:
            usable[name] = controller
    if "memory" in usable:
        return Cgroups(FOLDERS, usable, "; ".join(reasons))
    scope = _scope_controllers()
    if "memory" in scope:
        return Cgroups(SCOPE, dict.fromkeys(scope))
    if usable:
        return Cgroups(FOLDERS, usable, "; ".join(reasons))
    return Cgroups(reason="; ".join(reasons) or "neither a memory nor a cpu controller is mounted")


def parse_parents(mountinfo: str, cgroup: str) -> dict[str, Controller]:
    """Return the parent folders for new ``memory`` and ``cpu`` groups; v1 is preferred to v2.

    Args:
        mountinfo: Content of /proc/self/mountinfo (proc(5)).
        cgroup: Content of /proc/self/cgroup (cgroups(7)).
    """
    own = {}
    for line in cgroup.splitlines():
        _number, names, path = line.split(":", 2)
        own.update(dict.fromkeys(names.split(","), path))
    parents: dict[str, Controller] = {}
    unified = None
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        kind, _source, options = after.split(" ", 2)
        root, point = before.split(" ")[3:5]
        if kind == "cgroup2" and unified is None:
            unified = Controller(2, Path(point))
        if kind != "cgroup":
            continue
        for name in {"memory", "cpu"} & set(options.split(",")):
            # A container may see only a subtree, while the kernel reports paths in the whole tree.
            relative = os.path.relpath(own.get(name, "/"), root)
            inside = not relative.startswith("..")
            parents.setdefault(name, Controller(1, Path(point) / relative if inside else Path(point)))
    if unified is not None:
        for name in ("memory", "cpu"):
            parents.setdefault(name, unified)
    return parents


def sweep(parent: Path) -> None:
    """Remove groups left in ``parent`` by processes that were killed."""
    for left in parent.glob(f"{_PREFIX}-*-*-*"):
        pid, start = left.name[len(_PREFIX) + 1 :].split("-")[:2]
        if not pid.isdecimal() or _start_time(int(pid)) != start:
            with contextlib.suppress(OSError):  # its members are just ending
                left.rmdir()


def _prepared(name: str, found: Controller) -> Controller:
    """Return the controller with a folder whose child groups can use it (v2: it is enabled there)."""
    if found.version == 1:
        return found
    delegated = os.environ.get(VARIABLE)
    if delegated:
        parent = Path(delegated)
    elif os.geteuid() == 0:
        parent = found.parent
    else:
        raise PermissionError(1, f"an ordinary user needs a delegated group, named by {VARIABLE}")
    _hand_down(parent, name)
    return Controller(2, parent)


def _hand_down(folder: Path, name: str) -> None:
    """Enable a controller for the groups in ``folder``, which itself must not have members (cgroup v2)."""
    if name not in (folder / "cgroup.controllers").read_text().split():
        raise OSError(2, f"the controller is not available in {folder}")
    control = folder / "cgroup.subtree_control"
    if name in control.read_text().split():
        return
    if os.environ.get(VARIABLE) == str(folder):  # our group: move its members, including us, one level down
        leaf = folder / f"{_PREFIX}-members"
        for pid in (folder / "cgroup.procs").read_text().split():
            leaf.mkdir(exist_ok=True)
            with contextlib.suppress(ProcessLookupError):
                (leaf / "cgroup.procs").write_text(pid)
    control.write_text(f"+{name}")


def _try(name: str, controller: Controller) -> None:
    """Test a controller by putting a process into a group.

    Raises:
        OSError: The controller does not work here.
    """
    limits = CgroupLimits(2**30, 1.0)
    group = Cgroups(FOLDERS, {name: controller}).group(limits)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        try:
            group.add(process.pid)
        finally:
            process.kill()
            process.wait()
            group.remove()


def _limit_memory(controller: Controller, limit: int) -> None:
    folder = controller.parent
    if controller.version == 1:
        (folder / "memory.limit_in_bytes").write_text(str(limit))
        swap, most = folder / "memory.memsw.limit_in_bytes", str(limit)  # memory and swap together
    else:
        (folder / "memory.max").write_text(str(limit))
        swap, most = folder / "memory.swap.max", "0"
    if swap.exists():
        swap.write_text(most)


def _limit_cpu(controller: Controller, throttle: float) -> None:
    quota = max(_LEAST_QUOTA, round(throttle * _PERIOD))
    if controller.version == 1:
        (controller.parent / "cpu.cfs_period_us").write_text(str(_PERIOD))
        (controller.parent / "cpu.cfs_quota_us").write_text(str(quota))
    else:
        (controller.parent / "cpu.max").write_text(f"{quota} {_PERIOD}")


def _scope_controllers() -> list[str]:
    """Return the controllers available in scopes of the user's systemd; empty without such a systemd."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if shutil.which(_SYSTEMD_RUN) is None or not (Path(runtime) / "systemd" / "private").exists():
        return []
    command = Cgroups(SCOPE, {"memory": None, "cpu": None}).prefix(CgroupLimits(2**30, 1.0))
    try:
        done = subprocess.run(
            [*command, "cat", "/proc/self/cgroup"],
            capture_output=True, text=True, check=True, timeout=_SCOPE_TIMEOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        path = next(line[3:] for line in done.stdout.splitlines() if line.startswith("0::"))
        # The scope ended with its process; its parent's subtree_control lists the controllers of scopes.
        handed_down = Path("/sys/fs/cgroup", path.strip("/")).parent / "cgroup.subtree_control"
        return sorted({"memory", "cpu"} & set(handed_down.read_text().split()))
    except (OSError, subprocess.SubprocessError, StopIteration):
        return []


def _start_time(pid: int) -> str:
    """Return a process's start time in kernel ticks, to detect that its id was reused."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
