"""Start of the network process: forked from the agent when the machine boots."""

from __future__ import annotations

import gc
import os
import resource
import signal
import socket
import sys
import traceback

from pytest_microvm.guest import tun
from pytest_microvm.guest.network import NetworkProcess
from pytest_microvm.guest.port import open_port
from pytest_microvm.wire.network import CONNECTIONS, PORT

_FILES = 4096


def listen() -> socket.socket:
    """Return the proxy's listening socket."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", PORT))
    listener.listen(CONNECTIONS)
    return listener


def start() -> None:
    """Fork the network process and wait until it is idle: no template may contain it half started."""
    reading, writing = os.pipe()
    if os.fork():
        os.close(writing)
        os.read(reading, 1)
        os.close(reading)
        return
    try:
        _leave_agent(writing)
        port = open_port("network")
        device = tun.open_device()
        if device is not None:
            tun.name_resolver()
        network = NetworkProcess(port, listen(), device)
        os.close(writing)
        network.serve()
    except EOFError:
        pass
    except BaseException:  # noqa: BLE001 - a fork of PID 1 must not return; the error is logged to the console
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(0)


def _leave_agent(keep: int) -> None:
    """Release the descriptors and signal handlers inherited from the agent, and set this process's own."""
    gc.freeze()  # keeps the pages of its objects shared
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.closerange(3, keep)
    os.closerange(keep + 1, 256)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(_FILES, hard), hard))
    for name, text in (("comm", "microvm-network"), ("oom_score_adj", "-1000")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
