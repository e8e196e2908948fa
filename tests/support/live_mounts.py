"""Live mounts on this computer: its own kernel asks, through /dev/fuse, what a machine's would ask.

The server is a process of its own: a page of a mapped file that it has to bring would else wait for itself.
"""

import contextlib
import ctypes
import os
import subprocess
import sys
from pathlib import Path

from support import guards

SERVER = Path(__file__).with_name("live_mount_server.py")
_MNT_DETACH = 2


def can_mount():
    """Return whether this process may mount through /dev/fuse."""
    return os.geteuid() == 0 and Path("/dev/fuse").exists()


@contextlib.contextmanager
def mounted(source, target, *, writable=True, limit=2**40):
    """Mount a folder as a machine would see it, while the context is entered.

    Args:
        source: The folder that is served.
        target: The folder where it is seen.
        writable: Whether the machine may write.
        limit: Bytes by which ``source`` may grow.

    Raises:
        OSError: The kernel refused the mount.
    """
    device = os.open("/dev/fuse", os.O_RDWR)
    _mount(target, device)
    arguments = [sys.executable, SERVER, str(device), source, "rw" if writable else "ro", str(limit)]
    with subprocess.Popen(arguments, pass_fds=[device]) as process:
        os.close(device)
        try:
            yield
        finally:
            ctypes.CDLL(None).umount2(os.fsencode(target), _MNT_DETACH)
            try:
                assert process.wait(guards.PROCESS) == 0
            finally:
                process.kill()


def _mount(target, device):
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions".encode()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"microvm", os.fsencode(target), b"fuse", ctypes.c_ulong(2 | 4), options):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
