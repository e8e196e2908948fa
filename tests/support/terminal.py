"""A program on a terminal of its own, at which a test types and reads."""

import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios

from support import guards

_CONTROL = re.compile(rb"\x1b\[[0-?]*[ -/]*[@-~]")  # such as the switch to bracketed paste


def _take_terminal():
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class OnTerminal:
    """A program on a terminal.

    Args:
        command: Its words.
        variables: More environment variables.
        options: Of :class:`subprocess.Popen`.
    """

    def __init__(self, command, variables=None, **options):
        # Workers of pytest-xdist have a size in these two, which programs believe more than the terminal.
        mine = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        self._master, slave = pty.openpty()
        self.resize(30, 100)
        self.said = b""
        self._seen = 0
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            env={**mine, **(variables or {})},
            preexec_fn=_take_terminal,  # noqa: PLW1509 - the child only makes a system call
            **options,
        )  # fmt: skip
        os.close(slave)

    def __enter__(self):
        return self

    def __exit__(self, *_exc):
        self.process.kill()
        self.process.wait()
        os.close(self._master)

    def resize(self, rows, columns):
        """Give the terminal a size."""
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text):
        """Type a text."""
        os.write(self._master, text.encode())

    def until(self, text):
        """Read until the program says a text that it has not said before; return what it said by then."""
        wanted = text.encode()
        while wanted not in self._plain()[self._seen :]:
            assert select.select([self._master], [], [], guards.SUITE)[0], self.said
            try:
                self.said += os.read(self._master, 65536)
            except OSError:  # the program has ended
                raise AssertionError(f"{text!r} is missing in {self.said!r}") from None
        plain = self._plain()
        place = plain.index(wanted, self._seen) + len(wanted)
        found, self._seen = plain[self._seen : place], place
        return found.decode()

    def end(self):
        """Read to the end; return the rest and the exit status."""
        with contextlib.suppress(OSError):
            while select.select([self._master], [], [], guards.SUITE)[0]:
                piece = os.read(self._master, 65536)
                if not piece:
                    break
                self.said += piece
        return self._plain()[self._seen :].decode(), self.process.wait(guards.SUITE)

    def _plain(self):
        return _CONTROL.sub(b"", self.said)
