"""A live mount on this computer: its own kernel asks, through /dev/fuse, what a machine's would ask.

The server is a process of its own: a page of a mapped file that it has to bring would else wait for itself.
"""

import contextlib
import ctypes
import os
import subprocess
import sys
from pathlib import Path

_MNT_DETACH = 2
_PATIENCE = 60


def can_mount():
    return os.geteuid() == 0 and Path("/dev/fuse").exists()


@contextlib.contextmanager
def mounted(source, target, *, writable=True, limit=2**40):
    """Mount ``source`` at ``target`` as a machine would see it."""
    device = os.open("/dev/fuse", os.O_RDWR)
    _mount(target, device)
    arguments = [sys.executable, __file__, str(device), source, "rw" if writable else "ro", str(limit)]
    with subprocess.Popen(arguments, pass_fds=[device]) as process:
        os.close(device)
        try:
            yield
        finally:
            ctypes.CDLL(None).umount2(os.fsencode(target), _MNT_DETACH)
            try:
                assert process.wait(_PATIENCE) == 0
            finally:
                process.kill()


def _mount(target, device):
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions".encode()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"microvm", os.fsencode(target), b"fuse", ctypes.c_ulong(2 | 4), options):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _serve(device, source, access, limit):
    from pytest_microvm.live.folder import Folder, Growth  # noqa: PLC0415 - of the process alone
    from pytest_microvm.live.messages import MAX_REQUEST  # noqa: PLC0415
    from pytest_microvm.live.server import Server  # noqa: PLC0415

    root = os.open(source, os.O_RDONLY | os.O_DIRECTORY)
    server = Server(Folder(root, Growth(limit), writable=access == "rw"))
    with contextlib.suppress(OSError):  # unmounted (ENODEV)
        while request := os.read(device, MAX_REQUEST):
            answer = server.answer(request)
            if answer is not None:
                with contextlib.suppress(FileNotFoundError):  # nobody waits for it any more
                    os.write(device, answer)
    server.close()


if __name__ == "__main__":
    _serve(int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
