"""Landlock: restrict a process to the files that rules name, without privileges.

This process builds the ruleset. A step in the chain that starts a VMM (:mod:`.landlock_step`) applies it to
itself, adds a system-call filter that closes Landlock's gaps, and then executes the chain's next program,
which inherits both. No additional process stays.

Sources: landlock(7); Linux's Documentation/userspace-api/landlock.rst and include/uapi/linux/landlock.h.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import os
import platform
import stat
import struct
import sys
from collections.abc import Iterable
from pathlib import Path

from pytest_microvm.hypervisors.seccomp import ARCHITECTURES

# The system calls have the same numbers on x86-64 and aarch64, as all since Linux 5.1.
_CREATE_RULESET, _ADD_RULE = 444, 445
_ASK_VERSION = 1  # a flag of the first
_PATH_BENEATH = 1

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = (1 << bit for bit in range(4))
_TRUNCATE, _IOCTL_DEV = 1 << 14, 1 << 15
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV

PROGRAMS = _EXECUTE | _READ_FILE | _READ_DIR
READ = _READ_FILE
READ_WRITE = _READ_FILE | _WRITE_FILE
DEVICE = READ_WRITE | _IOCTL_DEV

_RIGHTS = {1: 13, 2: 14, 3: 15, 5: 16, 9: 17}  # number of file rights that each version knows
_TCP_FROM, _TCP = 4, 0b11  # bind, connect
SCOPES_FROM, _SCOPES = 6, 0b11  # abstract UNIX sockets, signals
"""The first version of the kernel's interface that can deny signals to the user's other processes."""

SYSTEM_FOLDERS = (
    "/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix/store", "/gnu/store",
)  # fmt: skip
"""Folders of programs and libraries."""

_SYSTEM_FILES = ("/etc/ld.so.cache", "/etc/localtime", "/proc/sys/kernel/cap_last_cap")
_SYSTEM_DEVICES = ("/dev/null", "/dev/urandom")
_BESIDE_PROGRAMS = ("lib", "lib64", "libexec", "share")


def find_version() -> tuple[int, str]:
    """Return the kernel's Landlock version, or 0 and the reason that it cannot be used, for display."""
    if sys.platform != "linux" or platform.machine() not in ARCHITECTURES:
        return 0, f"not used on {platform.system()} {platform.machine()}"
    try:
        return _call(_CREATE_RULESET, None, 0, _ASK_VERSION), ""
    except OSError as error:
        reasons = {
            errno.ENOSYS: "this kernel was built without it",
            errno.EOPNOTSUPP: "it is switched off on the kernel's command line (lsm=)",
        }
        return 0, reasons.get(error.errno or 0, str(error))


def is_installed(program: str) -> bool:
    """Return True if a program is in a system folder, to which the rules give access as a whole."""
    resolved = Path(program).resolve()
    return any(resolved.is_relative_to(Path(folder).resolve()) for folder in SYSTEM_FOLDERS)


def open_ruleset(
    version: int,
    programs: Iterable[str],
    devices: Iterable[Path] = (),
    descriptors: Iterable[int] = (),
) -> int:
    """Return the descriptor of a ruleset under which a VMM can run; the caller closes it.

    Args:
        version: The version of the kernel's interface.
        programs: Absolute paths of the programs to execute under the rules.
        devices: Devices that the VMM opens, besides ``/dev/null`` and ``/dev/urandom``.
        descriptors: Files that the VMM reopens, each with the access mode of its descriptor.

    Raises:
        OSError: The kernel refused it, or a device is missing.
    """
    ruleset = _call(_CREATE_RULESET, *_handled(version))
    try:
        for path, rights in _system_rules(programs).items():
            if path.exists():
                _allow_path(ruleset, version, path, rights)
        for path in devices:
            _allow_path(ruleset, version, path, DEVICE)
        for descriptor in descriptors:
            writable = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
            _allow(ruleset, version, descriptor, READ_WRITE if writable else READ)
    except OSError:
        os.close(ruleset)
        raise
    return ruleset


def _system_rules(programs: Iterable[str]) -> dict[Path, int]:
    rules = dict.fromkeys(map(Path, SYSTEM_FOLDERS), PROGRAMS)
    home = Path(os.path.expanduser("~"))  # noqa: PTH111 - Path's own raises where there is none
    for program in map(Path, programs):
        resolved = program.resolve()
        folder = resolved.parent
        # For a program directly in the home folder, or above it, allow the file and not the folder.
        rules[resolved if home.is_relative_to(folder) else folder] = PROGRAMS
        if folder.name == "bin":
            rules.update(dict.fromkeys((folder.parent / name for name in _BESIDE_PROGRAMS), PROGRAMS))
    rules.update(dict.fromkeys(map(Path, _SYSTEM_FILES), READ))
    rules.update(dict.fromkeys(map(Path, _SYSTEM_DEVICES), READ_WRITE))
    return rules


def _allow_path(ruleset: int, version: int, path: Path, rights: int) -> None:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        _allow(ruleset, version, descriptor, rights)
    finally:
        os.close(descriptor)


def _allow(ruleset: int, version: int, descriptor: int, rights: int) -> None:
    """Add a rule for a file, or for a folder and everything below it."""
    rights &= _known_rights(version)
    if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
        rights &= _OF_FILES
    _call(_ADD_RULE, ruleset, _PATH_BENEATH, struct.pack("=Qi", rights, descriptor), 0)


def _known_rights(version: int) -> int:
    return (1 << max(bits for since, bits in _RIGHTS.items() if since <= version)) - 1


def _handled(version: int) -> tuple[bytes, int, int]:
    """Return landlock_create_ruleset's arguments: every right that the version knows, the size, no flags."""
    fields = [_known_rights(version)]
    if version >= _TCP_FROM:
        fields.append(_TCP)
    if version >= SCOPES_FROM:
        fields.append(_SCOPES)
    attributes = struct.pack(f"={len(fields)}Q", *fields)
    return attributes, len(attributes), 0


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _call(number: int, *arguments: int | bytes | None) -> int:
    result: int = _libc().syscall(number, *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"Landlock: {os.strerror(code)}")
    return result
