"""Answer the requests for a live mount until it is unmounted, as a program: DEVICE_FD SOURCE ro|rw LIMIT."""

import contextlib
import os
import sys

from pytest_microvm.mounts.live.folder import Folder, Growth
from pytest_microvm.mounts.live.messages import MAX_REQUEST
from pytest_microvm.mounts.live.server import Server


def serve(device, source, access, limit):
    """Answer what the kernel asks of a mount of ``source``.

    Args:
        device: The descriptor of /dev/fuse that is mounted.
        source: The folder.
        access: ``rw`` or ``ro``.
        limit: Bytes by which the folder may grow.
    """
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
    serve(int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
