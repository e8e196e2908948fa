"""A live mount on this computer: its own kernel asks, through /dev/fuse, what a machine's would ask."""

import contextlib
import ctypes
import os
import threading
from pathlib import Path

from pytest_microvm.live.folder import Folder, Growth
from pytest_microvm.live.messages import MAX_REQUEST
from pytest_microvm.live.server import Server

_libc = ctypes.CDLL(None, use_errno=True)
_MNT_DETACH = 2


def can_mount():
    return os.geteuid() == 0 and Path("/dev/fuse").exists()


@contextlib.contextmanager
def mounted(source, target, *, writable=True, limit=2**40):
    """Mount ``source`` at ``target`` as a machine would see it."""
    root = os.open(source, os.O_RDONLY | os.O_DIRECTORY)
    server = Server(Folder(root, Growth(limit), writable=writable))
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions".encode()
    if _libc.mount(b"microvm", os.fsencode(target), b"fuse", ctypes.c_ulong(2 | 4), options):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    failures = []
    thread = threading.Thread(target=_serve, args=(device, server, failures), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        _libc.umount2(os.fsencode(target), _MNT_DETACH)
        thread.join(30)
        os.close(device)
        server.close()
        assert not failures
        assert not thread.is_alive()


def _serve(device, server, failures):
    while True:
        try:
            request = os.read(device, MAX_REQUEST)
        except OSError:  # unmounted (ENODEV)
            return
        try:
            answer = server.answer(request)
        except BaseException as error:  # noqa: BLE001 - the test is told
            failures.append(error)
            return
        if answer is not None:
            with contextlib.suppress(FileNotFoundError):  # nobody waits for it any more
                os.write(device, answer)
