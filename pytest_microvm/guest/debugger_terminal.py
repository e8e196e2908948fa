"""A program that lends its terminal to a debugger in another process: ``debugger_terminal.py SOCKET``.

The host starts it on a terminal of the machine. It passes its standard streams to the process that waits at
the socket, forwards Ctrl-C, and ends when that process closes the connection.
"""

from __future__ import annotations

import array
import os
import signal
import socket
import struct
import sys

_CREDENTIALS = struct.Struct("3i")  # process, user and group of the peer (unix(7))


def main(path: str) -> None:
    """Lend this process's standard streams to the process that listens at ``path``."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(path)
    peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    process = _CREDENTIALS.unpack(peer)[0]
    signal.signal(signal.SIGINT, lambda _number, _frame: os.kill(process, signal.SIGINT))
    streams = array.array("i", [0, 1, 2])
    connection.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
    while connection.recv(1):
        pass


if __name__ == "__main__":
    main(sys.argv[1])
