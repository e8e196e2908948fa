"""System-call filter (seccomp(2)) that closes Landlock's gaps.

Landlock has no rights for modes, owners, times and attributes of files, keys and shared memory; none for
truncation by path before its version 3, and none for sockets with a path before version 9. A VMM needs none
of these system calls: its files are open and its sockets connected when it starts.

Sources: seccomp(2); Linux's include/uapi/linux/{filter,seccomp,audit}.h, and its tables of system calls.
"""

from __future__ import annotations

import errno
import struct

_LOAD, _JUMP_EQUAL, _JUMP_NOT_BELOW, _RETURN = 0x20, 0x15, 0x35, 0x06  # BPF's classes and modes
_NUMBER, _ARCHITECTURE = 0, 4  # offsets in struct seccomp_data
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_X32 = 0x40000000  # x86-64's numbers for 32-bit pointers begin here

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""Host architectures that have a filter, and the kernel's numbers for them."""

# x86-64, aarch64; None: the architecture has only the newer call that takes a folder's descriptor
_DENIED: dict[str, tuple[int | None, int | None]] = {
    "truncate": (76, 45),
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54),
    "utime": (132, None), "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "setxattrat": (463, 463),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "removexattrat": (466, 466), "file_setattr": (469, 469),
    "socket": (41, 198), "socketpair": (53, 199), "bind": (49, 200), "connect": (42, 203),
    "io_uring_setup": (425, 425),  # its requests pass no filter; QEMU polls without
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "shmget": (29, 194), "shmat": (30, 196), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
}  # fmt: skip


def deny_filter(architecture: str) -> bytes:
    """Return a seccomp(2) program that makes the denied system calls fail with EACCES.

    Another architecture's calls, which have other numbers, fail too.

    Args:
        architecture: The host's, one of :data:`ARCHITECTURES`.
    """
    column = list(ARCHITECTURES).index(architecture)
    denied = [numbers[column] for numbers in _DENIED.values()]
    tests = [(_JUMP_EQUAL, number) for number in denied if number is not None]
    if architecture == "x86_64":
        tests.insert(0, (_JUMP_NOT_BELOW, _X32))
    program = [
        _instruction(_LOAD, _ARCHITECTURE),
        _instruction(_JUMP_EQUAL, ARCHITECTURES[architecture], otherwise=len(tests) + 2),
        _instruction(_LOAD, _NUMBER),
    ]
    for index, (code, value) in enumerate(tests):
        program.append(_instruction(code, value, then=len(tests) - index))
    program += [_instruction(_RETURN, _ALLOW), _instruction(_RETURN, _ERRNO | errno.EACCES)]
    return b"".join(program)


def _instruction(code: int, value: int, *, then: int = 0, otherwise: int = 0) -> bytes:
    """Return a ``struct sock_filter``; the jumps are instructions to skip."""
    return struct.pack("=HBBI", code, then, otherwise, value)
