"""Containment of the VMM process, against a guest that breaks out of it.

If started as root, the process runs as a separate user that owns nothing. In any case it gets no new
privileges and resource limits and, where the host allows, an empty network namespace and only the files that
a Landlock rule names. Each layer is tested on this host by use, and reported by the object that applies it
(:meth:`Walls.told`).

Sources: setpriv(1), unshare(1), setrlimit(2), user_namespaces(7); systemd's UIDS-GIDS document for the ids.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pytest_microvm.errors import HostError
from pytest_microvm.hypervisors import landlock
from pytest_microvm.hypervisors.bubblewrap import VARIABLE as BUBBLEWRAP_VARIABLE
from pytest_microvm.hypervisors.bubblewrap import bubblewrap_command, wanted_bubblewrap
from pytest_microvm.hypervisors.landlock_step import find_steps, step_command
from pytest_microvm.hypervisors.rlimits import Rlimits, prlimit_options
from pytest_microvm.programs.needed import find_program, require_program

FILES_GROUP = 1879048192
"""The group of files that QEMU opens itself: the first id of a range that no system assigns."""

_IF_PARENT = '[ "$PPID" = "$0" ] && exec "$@"'
"""Checks that the parent lives: a parent-death signal requested after its death is never sent (prctl(2))."""

_LAST_ID = 2147483646
_NOBODY = 65534
_GROUP_MAY, _OTHERS_MAY = 0o060, 0o006  # read and write
_TIMEOUT = 10.0

OOM_SCORE = 500
"""The oom_score_adj of a machine, of 1000: when the host runs out of memory, machines are killed first."""


@dataclass(frozen=True)
class Identity:
    """The numeric user, group and supplementary group ids of a process."""

    user: int
    group: int
    groups: tuple[int, ...]


@dataclass(frozen=True)
class Wall:
    """One containment layer and whether it works here; ``fix`` is the next step if it does not."""

    name: str
    stands: bool
    detail: str
    fix: str = ""


@dataclass(frozen=True)
class Walls:
    """The containment layers available on this host, and the commands that apply them.

    Args:
        setpriv: The program that drops privileges.
        prlimit: The program that sets limits.
        network: The argv prefix for an empty network namespace; empty if that does not work.
        users: The user ids to choose from; ``None``: machines run as our own user.
        files_group: The group of files that such a user must open itself.
        capabilities: Whether root's capabilities can be dropped.
        bubblewrap: The program that hides all files but programs and libraries; empty if not enabled. It
            stays as the command's parent, so the command has a process id of its own.
        landlock: The version of Landlock's interface that is used; 0: none.
        step: The argv prefix of the program that applies Landlock's rules.
        reason: Why machines run as our own user.
        unlocked: Why Landlock is not used.
    """

    setpriv: str
    prlimit: str
    network: tuple[str, ...] = ()
    users: range | None = None
    files_group: int | None = None
    capabilities: bool = False
    bubblewrap: str = ""
    landlock: int = 0
    step: tuple[str, ...] = ()
    reason: str = ""
    unlocked: str = ""

    def identity(self, devices: Sequence[Path] = ()) -> Identity | None:
        """Return a new identity for a machine that may use ``devices``; ``None``: it runs as our own user.

        Ids are random: two of a host's machines have the same one once in 268 million pairs.
        """
        if self.users is None or self.files_group is None:
            return None
        groups = _device_groups(devices)
        if groups is None:
            return None
        number = secrets.choice(self.users)
        return Identity(number, number, (self.files_group, *groups))

    @property
    def own_users(self) -> bool:
        """True if every machine runs as a user of its own."""
        return self.users is not None and len(self.users) > 1

    def command(
        self,
        identity: Identity | None,
        limits: Rlimits,
        devices: Sequence[Path] = (),
        report: int | None = None,
        ruleset: int | None = None,
    ) -> list[str]:
        """Return the argv prefix that contains a command; its process id is kept, except with bubblewrap.

        Args:
            identity: The user to run the command as.
            limits: Resource limits.
            devices: Device files that it needs.
            report: The descriptor to which bubblewrap writes the command's process id, as JSON.
            ruleset: The descriptor from :meth:`ruleset`; its rules also apply to the rest of the chain.

        The parent-death signal is requested last, because a change of user clears it (prctl(2)); the command
        starts only if this process still lives then. The limits are set inside the chain: from outside, the
        user may have changed already, and root without CAP_SYS_RESOURCE may not set them.
        """
        command = [*self.network]
        if self.bubblewrap:
            command += bubblewrap_command(self.bubblewrap, devices, report, capabilities=self.capabilities)
        if ruleset is not None:
            command += step_command(self.step, ruleset)
        command += [self.prlimit, *prlimit_options(limits), self.setpriv]
        if identity is not None:
            command += [f"--reuid={identity.user}", f"--regid={identity.group}"]
            command += [f"--groups={','.join(map(str, identity.groups))}"]
        if self.capabilities:
            command += ["--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all"]
        command += ["--no-new-privs", "--pdeathsig=KILL", "--"]
        # In bubblewrap's namespace the parent's process id is not visible.
        return command if self.bubblewrap else [*command, "/bin/sh", "-c", _IF_PARENT, str(os.getpid())]

    def ruleset(
        self, program: str, devices: Sequence[Path] = (), descriptors: Sequence[int] = ()
    ) -> int | None:
        """Return the descriptor of a Landlock ruleset for a command, or ``None`` without Landlock.

        The caller closes it.

        Args:
            program: The command's program.
            devices: Device files that it opens.
            descriptors: Files that it reopens, each with the access mode of its descriptor.

        Raises:
            OSError: The kernel refused it.
        """
        if not self.landlock:
            return None
        chain = (self.prlimit, self.setpriv, "/bin/sh", program)
        return landlock.open_ruleset(self.landlock, chain, devices, descriptors)

    def told(self, devices: Sequence[Path] = ()) -> tuple[Wall, ...]:
        """Return the status of each layer for a machine that uses ``devices``, for display."""
        powers = "without capabilities" if self.capabilities else "with all capabilities"
        if self.users is not None and self.identity(devices) is None:
            closed = " and ".join(map(str, devices))
            detail = f"machines run as root, {powers}: no group may use {closed}"
            user = Wall("user", False, detail, f"chgrp kvm {closed} && chmod 660 {closed}")
        elif self.own_users:
            user = Wall("user", True, "each machine has a user of its own")
        elif self.users is not None:
            user = Wall("user", True, "machines run as nobody: too few users are mapped here for one each")
        elif os.geteuid() == 0:
            detail = f"machines run as root, {powers}: {self.reason}"
            user = Wall("user", False, detail, "run as an ordinary user")
        else:
            user = Wall("user", True, "machines run as this user")
        network = Wall("network namespace", True, "empty")
        if not self.network:
            why = "this user may not make one" if os.geteuid() else "root may not make one here"
            fix = "allow unprivileged user namespaces (sysctl kernel.apparmor_restrict_unprivileged_userns=0)"
            network = Wall("network namespace", False, why, fix)
        detail = f"not asked for ({BUBBLEWRAP_VARIABLE}=1)"
        if self.bubblewrap:
            detail = "programs and libraries are all it sees"
        bubblewrap = Wall("bubblewrap", True, detail)
        rlimits = Wall("rlimits", True, "set")
        return user, Wall("no_new_privs", True, "set"), self._told_landlock(), network, rlimits, bubblewrap

    def _told_landlock(self) -> Wall:
        name = "landlock"
        if self.landlock:
            detail = f"version {self.landlock}: no files but programs, libraries and the machine's own"
            if self.landlock < landlock.SCOPES_FROM and not self.own_users:
                detail += "; signals to this user's processes are not denied (that needs Linux 6.12)"
            return Wall(name, True, detail)
        if self.bubblewrap:
            return Wall(name, True, "not used: bubblewrap hides the files")
        whose = "files that everybody may use" if self.own_users else "the files of this user"
        detail = f"{self.unlocked}, so a guest that breaks out can use {whose}"
        return Wall(name, False, detail, f"a kernel with Landlock (Linux 5.13), or {BUBBLEWRAP_VARIABLE}=1")


_TRIED = Rlimits(files=256, file_bytes=2**30, address_bytes=2**33, data_bytes=2**31)


@functools.cache
def find_walls(program: str | None = None) -> Walls:
    """Return the strongest combination of layers that works on this host, tested once by use.

    Args:
        program: The program that must run under Landlock's rules; they are left out if it does not.

    Raises:
        HostError: A program is missing, or bubblewrap was asked for and does not work.
    """
    setpriv, prlimit = require_program("setpriv"), require_program("prlimit")
    unshare = find_program("unshare")
    network: tuple[str, ...] = ()
    if unshare is not None:
        root = os.geteuid() == 0
        network = (
            (unshare, "--net", "--") if root else (unshare, "--user", "--map-current-user", "--net", "--")
        )
    bare = Walls(setpriv, prlimit, capabilities=os.geteuid() == 0, bubblewrap=wanted_bubblewrap())
    users, reason = _users()
    candidates = [replace(bare, network=network, reason=reason), bare]
    if users is not None:
        reason = "it may not change to another user"
        group = FILES_GROUP if len(users) > 1 else _NOBODY
        candidates = [replace(one, users=users, files_group=group) for one in candidates] + [
            replace(one, reason=reason) for one in candidates
        ]
    if bare.bubblewrap and not any(_works(walls) for walls in candidates):
        raise HostError("bubblewrap does not work here", resolution=f"run without {BUBBLEWRAP_VARIABLE}")
    least = Walls(setpriv, prlimit, reason=reason or "it may not even shed capabilities")
    candidates = _with_landlock([*candidates, least])
    return next((walls for walls in candidates if _works(walls, program)), candidates[-1])


def _with_landlock(candidates: list[Walls]) -> list[Walls]:
    """Return the candidates, each preceded by its variants with Landlock.

    Not with bubblewrap: a process under Landlock may not mount (landlock(7)), and bubblewrap hides the files.
    """
    if candidates[0].bubblewrap:
        return candidates
    version, reason = landlock.find_version()
    steps = find_steps() if version else []
    found = []
    for one in candidates:
        found += [replace(one, landlock=version, step=step) for step in steps]
        found.append(replace(one, unlocked=reason or "QEMU does not start behind it"))
    return found


def prefer_for_ending(pid: int) -> None:
    """Make the host's OOM killer choose this process before others."""
    with contextlib.suppress(OSError):  # it has ended, or this system has no such setting
        Path(f"/proc/{pid}/oom_score_adj").write_text(str(OOM_SCORE))


def grant(descriptor: int, identity: Identity | None, *, write: bool) -> None:
    """Let a machine's user reopen the file behind a descriptor, which needs permissions on the file itself.

    Its folders stay inaccessible: the user reaches the file only by its inherited descriptor. Permissions
    that already suffice are not touched: a published file's time of change is part of its stamp.

    Raises:
        HostError: The file's permissions cannot be changed.
    """
    if identity is None:
        return
    group, bits = identity.groups[0], _GROUP_MAY if write else 0o040
    found = os.fstat(descriptor)
    if (not write and found.st_mode & 0o004) or (found.st_gid == group and found.st_mode & bits == bits):
        return
    try:
        os.fchown(descriptor, -1, group)
        os.fchmod(descriptor, found.st_mode & 0o700 | bits)
    except OSError as error:
        name = Path(f"/proc/self/fd/{descriptor}").readlink()
        raise HostError(
            f"QEMU's own user cannot be given {name}: {error.strerror}",
            resolution="put the cache on a disk of this computer (PYTEST_MICROVM_CACHE)",
        ) from error


def _device_groups(devices: Sequence[Path]) -> tuple[int, ...] | None:
    """Return the groups that may use ``devices``; ``None`` if only root may use one of them."""
    groups = []
    for device in devices:
        found = device.stat()
        if found.st_mode & _OTHERS_MAY == _OTHERS_MAY:
            continue
        if found.st_gid == 0 or found.st_mode & _GROUP_MAY != _GROUP_MAY:
            return None
        groups.append(found.st_gid)
    return tuple(groups)


def _users() -> tuple[range | None, str]:
    """Return the user ids available to machines, as root only, and the reason if there are none."""
    if os.geteuid() != 0:
        return None, ""
    maps = [Path("/proc/self", name) for name in ("uid_map", "gid_map")]
    tables = [parse_id_map(path.read_text()) if path.exists() else [] for path in maps]
    if all(_covers(table, FILES_GROUP, _LAST_ID) for table in tables):
        return range(FILES_GROUP + 1, _LAST_ID + 1), ""
    if all(_covers(table, _NOBODY, _NOBODY) for table in tables):
        return range(_NOBODY, _NOBODY + 1), ""
    return None, "this user namespace has no other user"


def parse_id_map(text: str) -> list[range]:
    """Return the ids that exist in a user namespace, from its ``uid_map`` (user_namespaces(7))."""
    rows = [[int(word) for word in line.split()] for line in text.splitlines()]
    return [range(first, first + count) for first, _outside, count in rows]


def _covers(table: list[range], first: int, last: int) -> bool:
    return any(first in ids and last in ids for ids in table)


def _works(walls: Walls, program: str | None = None) -> bool:
    """Return True if a program starts under these layers.

    ``program`` itself is tried only if Landlock's rules might miss one of its files: QEMU starts slowly.
    """
    if program is None or not walls.landlock or landlock.is_installed(program):
        program = walls.setpriv
    ruleset: int | None = None
    try:
        ruleset = walls.ruleset(program)
        done = subprocess.run(
            [*walls.command(walls.identity(), _TRIED, ruleset=ruleset), program, "--version"],
            stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=_TIMEOUT,
            pass_fds=() if ruleset is None else (ruleset,),
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return False
    finally:
        if ruleset is not None:
            os.close(ruleset)
    return done.returncode == 0
