"""Control groups: a ceiling for all the memory of a VMM's process, and a throttle for its CPU time.

Every machine gets a group of its own, which is removed with it. What a host offers differs: cgroup v1 or
v2 where we may write (root, or a delegated group), a scope of the user's systemd, or nothing.

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
"""Names a delegated group of cgroup v2 (a folder) below which machines get theirs."""

NONE, FOLDERS, SCOPE = "none", "folders", "scope"

_SYSTEMD_RUN = "systemd-run"
_SCOPE_ENVIRONMENT = ("XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS", "PATH")
_PREFIX = "pytest-microvm"
_PERIOD = 100_000  # microseconds, the kernel's default
_LEAST_QUOTA = 1_000  # microseconds, the least the kernel takes
_SCOPE_TIMEOUT = 10.0
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Limits:
    """What one process may take.

    Args:
        memory: Bytes, all of it: anonymous memory, page cache, what the kernel keeps for it.
        throttle: Seconds of CPU time per second; ``None``: all there is.
    """

    memory: int
    throttle: float | None = None


@dataclass(frozen=True)
class Controller:
    """One of the kernel's controllers: which version of the interface, and the folder to make groups in."""

    version: int
    parent: Path


@dataclass(frozen=True)
class Cgroups:
    """What this host offers.

    Args:
        kind: ``folders`` (we make groups ourselves), ``scope`` (systemd does) or ``none``.
        controllers: ``memory`` and ``cpu``, as far as they can be used; with ``scope`` only the names count.
        reason: Why not more, for people.
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
        """Return whether machines are held in groups here, for people."""
        missing = self.not_enforced(Limits(2**30, throttle=0.5))
        if not missing:
            return Wall("cgroup", True, str(self))
        detail = (
            f"{self}, so neither a memory ceiling nor a throttle holds" if self.kind == NONE else str(self)
        )
        if self.reason:
            detail += f" ({self.reason})"
        return Wall("cgroup", False, detail, f"delegate a cgroup v2 to this user and name it in {VARIABLE}")

    def prefix(self, limits: Limits) -> list[str]:
        """Return what comes before a command's argv so that it runs under ``limits``; often nothing."""
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
        """Return the variables that :meth:`prefix` needs; the command itself gets none."""
        names = _SCOPE_ENVIRONMENT if self.kind == SCOPE else ()
        return {name: os.environ[name] for name in names if name in os.environ}

    def group(self, limits: Limits) -> Group:
        """Make a group; without folders of ours it is an empty one that does nothing.

        Raises:
            OSError: The kernel refused it.
        """
        wanted = {"memory"} if limits.throttle is None else {"memory", "cpu"}
        found = {name: self.controllers.get(name) for name in sorted(wanted)}
        folders = {name: use for name, use in found.items() if use is not None}
        name = f"{_PREFIX}-{os.getpid()}-{_start_time(os.getpid())}-{next(_numbers)}"
        return Group(
            limits, {key: Controller(use.version, use.parent / name) for key, use in folders.items()}
        )

    def not_enforced(self, limits: Limits) -> tuple[str, ...]:
        """Return one line that says what of ``limits`` does not hold here, or nothing."""
        missing = []
        if limits.throttle is not None and "cpu" not in self.controllers:
            missing.append(f"cpus = {limits.throttle:g} is not throttled")
        if "memory" not in self.controllers:
            missing.append("QEMU's memory has no ceiling but its address space")
        if not missing:
            return ()
        why = "no cgroup can be used here" if self.kind == NONE else "this host's cgroups are not enough"
        return (f"{why}{f' ({self.reason})' if self.reason else ''}: {' and '.join(missing)}",)


class Group:
    """The group of one process.

    Args:
        limits: What its members may take together.
        folders: For each controller the group's folder, made here.

    Raises:
        OSError: The kernel refused it.
    """

    def __init__(self, limits: Limits, folders: Mapping[str, Controller]) -> None:
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
        """Where the group is."""
        return tuple(dict.fromkeys(controller.parent for controller in self._folders.values()))

    def add(self, pid: int) -> None:
        """Make a process, all its threads, a member.

        Raises:
            OSError: The kernel refused it.
        """
        for folder in self.folders:
            (folder / "cgroup.procs").write_text(str(pid))

    def ceiling_hit(self) -> int | None:
        """Return the ceiling in bytes if the kernel killed a member for it."""
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
            with contextlib.suppress(OSError):  # somebody is still in it: the next run's sweep removes it
                folder.rmdir()


@functools.cache
def find_cgroups() -> Cgroups:
    """Return what this host offers, found out by doing it once; groups of ended owners are removed."""
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
    """Return for ``memory`` and ``cpu`` where our own groups are, v1 where the host has both.

    Args:
        mountinfo: What /proc/self/mountinfo holds (proc(5)).
        cgroup: What /proc/self/cgroup holds (cgroups(7)).
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
            # A container may see but a part of the tree, while the kernel tells the path in all of it.
            relative = os.path.relpath(own.get(name, "/"), root)
            inside = not relative.startswith("..")
            parents.setdefault(name, Controller(1, Path(point) / relative if inside else Path(point)))
    if unified is not None:
        for name in ("memory", "cpu"):
            parents.setdefault(name, unified)
    return parents


def sweep(parent: Path) -> None:
    """Remove the groups in ``parent`` whose owner has ended without doing so (it was killed)."""
    for left in parent.glob(f"{_PREFIX}-*-*-*"):
        pid, start = left.name[len(_PREFIX) + 1 :].split("-")[:2]
        if not pid.isdecimal() or _start_time(int(pid)) != start:
            with contextlib.suppress(OSError):  # its members are just ending
                left.rmdir()


def _prepared(name: str, found: Controller) -> Controller:
    """Return the controller with a folder in which groups get it (v2: their parent must hand it down)."""
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
    """Let the groups in ``folder`` have the controller; only a group without members may do that."""
    if name not in (folder / "cgroup.controllers").read_text().split():
        raise OSError(2, f"the controller is not available in {folder}")
    control = folder / "cgroup.subtree_control"
    if name in control.read_text().split():
        return
    if os.environ.get(VARIABLE) == str(folder):  # it is ours: its members, us among them, move one down
        leaf = folder / f"{_PREFIX}-members"
        for pid in (folder / "cgroup.procs").read_text().split():
            leaf.mkdir(exist_ok=True)
            with contextlib.suppress(ProcessLookupError):
                (leaf / "cgroup.procs").write_text(pid)
    control.write_text(f"+{name}")


def _try(name: str, controller: Controller) -> None:
    """Put a process into a group once.

    Raises:
        OSError: That does not work here.
    """
    limits = Limits(2**30, 1.0)
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
    """Return the controllers that scopes of the user's systemd have; none where there is no such systemd."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if shutil.which(_SYSTEMD_RUN) is None or not (Path(runtime) / "systemd" / "private").exists():
        return []
    command = Cgroups(SCOPE, {"memory": None, "cpu": None}).prefix(Limits(2**30, 1.0))
    try:
        done = subprocess.run(
            [*command, "cat", "/proc/self/cgroup"],
            capture_output=True, text=True, check=True, timeout=_SCOPE_TIMEOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        path = next(line[3:] for line in done.stdout.splitlines() if line.startswith("0::"))
        # The scope is gone with its process; what its parent hands down is what scopes have.
        handed_down = Path("/sys/fs/cgroup", path.strip("/")).parent / "cgroup.subtree_control"
        return sorted({"memory", "cpu"} & set(handed_down.read_text().split()))
    except (OSError, subprocess.SubprocessError, StopIteration):
        return []


def _start_time(pid: int) -> str:
    """Return when a process started, in the kernel's ticks, which tells it from a later one with its id."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
