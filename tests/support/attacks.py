"""Hostile projects of tests/attacks/projects, made in a folder, and what tells whether one has sprung.

tests/attacks/README.md says what ``attack.toml`` may hold.
"""

import os
import platform
import re
import socket
import socketserver
import sys
import threading
from pathlib import Path

import pytest

from pytest_microvm.settings.configuration import tomllib
from support import guards

PROJECTS = Path(__file__).parents[1] / "attacks" / "projects"
ATTACKS = sorted(folder.name for folder in PROJECTS.iterdir())
PYTHON = Path(sys.executable).resolve()  # of the installation, not of a virtual environment
GUARDED = '(__import__("os").environ.get("LOCAL_GUEST") or __import__("os").path.exists("/run/microvm"))'


class Listener(socketserver.TCPServer):
    """Counts connections, one after another; it stands for every proxy that a program could use."""

    request_queue_size = 128

    def __init__(self):
        self._clients = []
        self._changed = threading.Condition()
        super().__init__(("127.0.0.1", 0), socketserver.BaseRequestHandler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def finish_request(self, request, client_address):
        """Take note of it, and say nothing."""
        with self._changed:
            self._clients.append(client_address)
            self._changed.notify_all()

    def connections(self):
        """Return how many have connected so far; one of our own is accepted behind them all."""
        with socket.create_connection(self.server_address, timeout=guards.PROCESS) as own, self._changed:
            name = own.getsockname()
            assert self._changed.wait_for(lambda: name in self._clients, guards.PROCESS)
            self._clients.remove(name)
            return len(self._clients)


class Attack:
    """One hostile project, made in a folder, with what it aims at beside it.

    Args:
        name: Its folder below projects/.
        path: The folder to make it in.

    Attributes:
        about: What ``attack.toml`` says.
        marker: A file that the project's code makes where it is not in a machine.
        ran: The same, made by a test.
        outside: A file of the user's beside the project.
        folder: A folder of the user's beside the project.
    """

    def __init__(self, name, path):
        self.about = tomllib.loads((PROJECTS / name / "attack.toml").read_text())
        self.path = path
        self.beside = path.parent / f"{path.name}-outside"
        self.beside.mkdir()
        self.marker, self.ran = self.beside / "marker", self.beside / "ran"
        self.outside, self.folder = self.beside / "file", self.beside / "folder"
        self.outside.write_text("# the user's\n")
        self.folder.mkdir()
        (self.folder / "kept").write_text("the user's\n")
        self.write(name)
        if self.about.get("writable"):
            self.folder.chmod(0o777)
        self.before = self.look()

    def write(self, name):
        """Make the project's files."""
        top = PROJECTS / name / "project"
        for source in top.rglob("*"):
            if source.is_file():
                self.file(os.fspath(source.relative_to(top)).removesuffix(".in"), source.read_text())
        if not list(self.path.rglob("test_it.py")) and "folder" not in self.about:
            self.file("test_it.py", "def test_it():\n    @RAN@\n")
        for path, target in self.about.get("links", {}).items():
            link = self.path / self.filled(path)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(self.filled(target))
        for path, (piece, count, end) in self.about.get("repeat", {}).items():
            (self.path / path).write_bytes((piece * count + end).encode("latin-1"))
        for path in self.about.get("fifos", []):
            os.mkfifo(self.path / path)

    def file(self, path, text):
        """Make one file, executable if it begins with ``#!``."""
        file = self.path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(self.filled(text))
        if text.startswith("#!"):
            file.chmod(0o755)

    def filled(self, text):
        """Return ``text`` with what ``@NAME@`` stands for."""

        def append(path):
            return f'{GUARDED} or open({os.fspath(path)!r}, "a").write(__name__ + "\\n")'

        values = {
            "TRAP": append(self.marker),
            "RAN": append(self.ran),
            "SH": f'[ -n "$LOCAL_GUEST" ] || [ -e /run/microvm ] || echo sh >>"{self.marker}"',
            "IN_THE_GUEST": GUARDED,
            "PROJECT": self.path,
            "BESIDE": self.beside,
            "OUTSIDE": self.outside,
            "FOLDER": self.folder,
            "OUTSIDE_NAME": f"{self.beside.name}/{self.outside.name}",
            "FOLDER_NAME": f"{self.beside.name}/{self.folder.name}",
            "FOLDER_FILE": "kept",
            "BASE_PYTHON": PYTHON,
            "BASE_FOLDER": PYTHON.parent,
            "BASE_VERSION": platform.python_version(),
            "BASE_LIBRARY": f"python{sys.version_info[0]}.{sys.version_info[1]}",
        }
        return re.sub(r"@([A-Z_]+)@", lambda found: str(values[found[1]]), text)

    def words(self, key, entry=None):
        """Return words of a command line from ``attack.toml``, or from its table for an entry."""
        about = self.about if entry is None else self.about[entry]
        return [self.filled(word) for word in about.get(key, [])]

    def look(self):
        """Return what is outside, but for the marks that code leaves."""
        return {
            os.fspath(path.relative_to(self.beside)): path.read_bytes() if path.is_file() else None
            for path in self.beside.rglob("*")
            if path not in (self.marker, self.ran)
        }

    def sprung(self, listener):
        """Return what it has done."""
        found = [path.read_text() for path in (self.marker, self.ran) if path.exists()]
        if self.look() != self.before:
            found.append("something outside has changed")
        if listener.connections():
            found.append("a connection was made")
        return found


def folders_where(key, *values):
    """Return attacks on suites of which ``key`` says one of ``values``; repetition is for `make test-all`."""
    return [
        _param(name, about)
        for name, about in _all().items()
        if "test" in about and about.get(key, about["test"] if key == "action" else None) in values
    ]


def entry_folders_where(entry, key, *values):
    """Return the attacks whose table for an entry says one of ``values`` under ``key``."""
    return [
        _param(name, about)
        for name, about in _all().items()
        if entry in about and about[entry].get(key) in values
    ]


def _all():
    return {name: tomllib.loads((PROJECTS / name / "attack.toml").read_text()) for name in ATTACKS}


def _param(name, about):
    return pytest.param(name, marks=[pytest.mark.thorough] if about.get("repeats") else [])
