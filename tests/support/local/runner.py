"""The guest's runner as a local process: once it has collected, every lease is a fork of it.

Usage: runner.py CODE_FOLDER CONTROL_FD. The control socket passes one descriptor per lease in, and
the fork's process id out. Nothing of this computer is changed on resume.
"""

import os
import socket
import sys

sys.path[0] = sys.argv[1]

from pytest_microvm.guest import runner as guest  # noqa: E402 - the code folder comes first
from pytest_microvm.guest.port import Port, out_of_the_way  # noqa: E402
from pytest_microvm.guest.runner_requests import Runner, reseed  # noqa: E402

first_control = socket.socket(fileno=int(sys.argv[2]))


def next_descriptor(control):
    """Return the descriptor of the next lease; end the process when the backend has ended."""
    message, fds, _flags, _address = socket.recv_fds(control, 1, 1)
    if not message:
        os._exit(0)
    return out_of_the_way(fds[0])


class ForkingRunner(Runner):
    """A runner that becomes a template once it has collected."""

    collected = template = False

    def next_request(self):
        """Return the next request; a template forks first, and only its forks return."""
        if self.template and self.collected:
            self.fork_until_child(first_control)
        request = super().next_request()
        while request.get("op") == "checkpoint":
            self.take_checkpoint(request)
            request = super().next_request()
        self.collected = request.get("op") == "collect"
        return request

    def take_checkpoint(self, request):
        """Fork a child that forks for every lease; return in the parent, and in the forks of the child."""
        if os.fork() == 0:
            os.close(self.port.fd)  # else the host would not notice that the parent has ended
            self.port.fd = -1
            control = socket.socket(socket.AF_UNIX)
            control.connect(request["path"])
            self.fork_until_child(control)
        else:
            self.reply(request, {})

    def fork_until_child(self, control):
        """Fork for every lease; return in the fork alone."""
        while True:
            fd = next_descriptor(control)
            pid = os.fork()
            if pid == 0:
                control.close()
                if self.port.fd >= 0:
                    os.close(self.port.fd)
                self.port, self.pid, self.template = Port(fd, "runner"), os.getpid(), False
                return
            os.close(fd)
            control.sendall(pid.to_bytes(8, "big"))


reseed(sys.modules.get)
forking = ForkingRunner(
    Port(next_descriptor(first_control), "runner"), lambda message: {"skipped": ["everything"]}
)
forking.template = True
guest.start(forking)
os._exit(0)
