"""Hostile projects in whose folder a user types ``pytest-microvm run`` or ``pytest-microvm python``."""

import functools
import http.server
import json
import os
import pty
import re
import shutil
import subprocess
import sys

import pytest

from support import guards
from support.attacks import ATTACKS, PROJECTS, Attack, tomllib
from support.commands import MICROVM
from support.comparison import CACHE
from support.local_servers import LocalServer
from support.repositories import git
from support.wheels import wheel

ABOUT = {name: tomllib.loads((PROJECTS / name / "attack.toml").read_text()) for name in ATTACKS}
_WHEEL = "pip-99.0-py3-none-any.whl"
_ESCAPE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f-\x9f]|\x1b(?!\[[0-9;]*m)")
_COMMAND = re.compile(r"^\s*::|##(?:|vso|teamcity)\[", re.MULTILINE)


def names_where(chosen, *, repeats):
    """Return the attacks whose table ``run`` is ``chosen``, those that repeat others or those that do not."""
    return [
        name
        for name, about in ABOUT.items()
        if "run" in about and chosen(about["run"]) and about.get("repeats", False) == repeats
    ]


def attacks_where(chosen):
    """Return the attacks whose table ``run`` is ``chosen``; repetition is for `make test-all`."""
    repetition = names_where(chosen, repeats=True)
    return [
        *names_where(chosen, repeats=False),
        *(pytest.param(name, marks=[pytest.mark.thorough]) for name in repetition),
    ]


def obeyed(text):
    """Return what a terminal or a CI system would obey in what was shown."""
    found = _ESCAPE.search(text) or _COMMAND.search(text)
    return [] if found is None else [f"shown: {found[0]!r}"]


class Index(LocalServer):
    """The index of pip, and the registry of npm, that the user has configured."""

    def __init__(self):
        super().__init__(_Pages)

    @property
    def url(self):
        """Where it is, without a slash at the end."""
        return f"http://127.0.0.1:{self.port}"


class _Pages(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        pages = {
            "/simple/pip/": ("text/html", f'<!DOCTYPE html><html><body><a href="/{_WHEEL}">{_WHEEL}</a>'),
            f"/{_WHEEL}": ("application/zip", wheel("pip", "99.0")),
            "/npm": ("application/json", _package(f"http://{self.headers['Host']}")),
        }
        kind, body = pages.get(self.path, ("text/plain", None))
        self.send_response(404 if body is None else 200)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(body if isinstance(body, bytes) else (body or "").encode())

    def log_message(self, *_):
        pass


def _package(url):
    version = {"name": "npm", "version": "1.0.0", "dist": {"tarball": f"{url}/npm.tgz"}}
    return json.dumps({"name": "npm", "dist-tags": {"latest": "1.0.0"}, "versions": {"1.0.0": version}})


class RunAttack(Attack):
    """One of them.

    Args:
        name: Its folder below projects/.
        folder: The folder to make its project in, and the user's file and folder beside that.
        listener: What counts connections.
        index: The user's own package index.
    """

    def __init__(self, name, folder, listener, index):
        self.name, self.listener = name, listener
        self.run = ABOUT[name]["run"]
        self.values = {
            "PORT": listener.server_address[1],
            "INDEX": index.url,
            "PYTHON": sys.executable,
            "PATH": os.environ["PATH"],
        }
        path = folder / name
        path.mkdir()
        super().__init__(name, path)
        self.values["MARKER"] = self.marker
        home = _home(folder, index)
        self.environment = {
            "PATH": os.environ["PATH"], "HOME": str(home), "PYTEST_MICROVM_CACHE": str(CACHE),
            "PIP_CONFIG_FILE": str(home / "pip.conf"), "ATTACK_TOKEN": "hunter22", "LC_ALL": "C.UTF-8",
            "GIT_CEILING_DIRECTORIES": str(folder),
            **{key: self.filled(value) for key, value in self.run.get("variables", {}).items()},
        }  # fmt: skip

    def write(self, name):
        """Make the project's files, its repository and its hard links."""
        self.values["MARKER"] = self.marker
        super().write(name)
        for path, target in self.run.get("hard_links", {}).items():
            os.link(self.filled(target), self.path / path)
        if self.run.get("repository"):
            shutil.rmtree(self.path / ".git", ignore_errors=True)
            git(self.path, "init", "-q", "-b", "main", "--template=")
            (self.path / ".git" / "hooks").mkdir()
            git(self.path, "add", "-A")
            git(self.path, "commit", "-qm", "first")
        for path, text in self.run.get("git", {}).items():
            kept = (self.path / ".git" / "config").read_text() if path == "config" else ""
            self.file(f".git/{path}", kept + text)

    def filled(self, text):
        """Return ``text`` with what ``@NAME@`` stands for."""
        for name, value in self.values.items():
            text = text.replace(f"@{name}@", str(value))
        return super().filled(text)

    def command(self, words):
        """Run ``pytest-microvm`` as the user does; return its exit status, and what is shown."""
        command = [*MICROVM, self.run.get("verb", "run"), *words]
        if self.run.get("terminal"):
            return self._on_terminal(command)
        done = subprocess.run(
            command, cwd=self.path, env=self.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, timeout=guards.MACHINE, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout.decode(errors="surrogateescape")

    def _on_terminal(self, command):
        ours, theirs = pty.openpty()
        with subprocess.Popen(
            command, cwd=self.path, env=self.environment, stdin=theirs, stdout=theirs, stderr=theirs
        ) as process:
            os.close(theirs)
            said = b""
            while data := _read(ours):
                said += data
            os.close(ours)
        return process.returncode, said.decode()

    def unprotected(self):
        """Do the same without a machine; return what is shown."""
        self.shell("meanwhile")
        default = ["sh", "attack.sh"] if "mount" in self.run else []
        words = [self.filled(word) for word in self.run.get("control", default)]
        return self.native(words) + self.shell("after")

    def shell(self, key):
        """Run on this computer what ``attack.toml`` has the user do; return what is shown."""
        script = self.run.get(key)
        return self.native(["sh", "-c", self.filled(script)]) if script else ""

    def native(self, words):
        """Run a command in the project's folder, with the user's home in the test's; return what is shown."""
        done = subprocess.run(
            words, cwd=self.path, env=self.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, timeout=guards.PROCESS, check=False,
        )  # fmt: skip
        return done.stdout.decode(errors="surrogateescape")


def _read(terminal):
    try:
        return os.read(terminal, 65536)
    except OSError:  # EIO: nobody has its other end any more
        return b""


@functools.cache
def _home(folder, index):
    """Make the user's home, with what pip, npm and git are told there."""
    home = folder / "home"
    home.mkdir()
    (home / "pip.conf").write_text(f"[global]\nindex-url = {index.url}/simple\n")
    (home / ".npmrc").write_text(f"registry={index.url}/\n")
    (home / ".gitconfig").write_text("[user]\nname = me\nemail = me@example.com\n")
    return home
