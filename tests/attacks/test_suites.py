"""Hostile projects, each through `pytest --microvm`, `pytest-microvm test`, and unprotected as a control.

Each folder of projects/ is one: ``attack.toml`` tells the way in and what must come of it; the rest is data.
What runs the tests are local processes here, where a variable tells code that it is in "the machine". Real
machines run some of them in tests/integration/test_attacks.py.
"""

import os
import re
import socketserver
import sys
import threading
from pathlib import Path

import pytest

from pytest_microvm.config import tomllib
from support.comparison import BACKEND, ENTRIES

PROJECTS = Path(__file__).with_name("projects")
ATTACKS = sorted(folder.name for folder in PROJECTS.iterdir())
GUARDED = '(__import__("os").environ.get("LOCAL_GUEST") or __import__("os").path.exists("/run/microvm"))'


class Listener(socketserver.ThreadingTCPServer):
    """Counts connections; it stands for every proxy that a program could use."""

    daemon_threads = True

    def __init__(self):
        self.count = 0
        super().__init__(("127.0.0.1", 0), socketserver.BaseRequestHandler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def finish_request(self, request, client_address):
        self.count += 1


class Attack:
    """One hostile project, made in a folder, with what it aims at beside it."""

    def __init__(self, name, project):
        self.about = tomllib.loads((PROJECTS / name / "attack.toml").read_text())
        self.project = project
        self.beside = project.path.parent / f"{project.path.name}-outside"
        self.beside.mkdir()
        self.marker, self.ran = self.beside / "marker", self.beside / "ran"
        self.outside, self.folder = self.beside / "file", self.beside / "folder"
        self.outside.write_text("# the user's\n")
        self.folder.mkdir()
        (self.folder / "kept").write_text("the user's\n")
        self.before = self.look()
        self.write(name)

    def write(self, name):
        top = PROJECTS / name / "project"
        for source in top.rglob("*"):
            if source.is_file():
                self.file(os.fspath(source.relative_to(top)).removesuffix(".in"), source.read_text())
        if not list(self.project.path.rglob("test_it.py")) and "folder" not in self.about:
            self.file("test_it.py", "def test_it():\n    @RAN@\n")
        for path, target in self.about.get("links", {}).items():
            (self.project.path / path).parent.mkdir(parents=True, exist_ok=True)
            (self.project.path / path).symlink_to(self.filled(target))
        for path, (piece, count, end) in self.about.get("repeat", {}).items():
            (self.project.path / path).write_bytes((piece * count + end).encode("latin-1"))
        for path in self.about.get("fifos", []):
            os.mkfifo(self.project.path / path)

    def file(self, path, text):
        file = self.project.path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(self.filled(text))
        if text.startswith("#!"):
            file.chmod(0o755)

    def filled(self, text):
        def append(path):
            return f'{GUARDED} or open({os.fspath(path)!r}, "a").write(__name__ + "\\n")'

        values = {
            "TRAP": append(self.marker),
            "RAN": append(self.ran),
            "SH": f'[ -n "$LOCAL_GUEST" ] || echo sh >>"{self.marker}"',
            "IN_THE_GUEST": GUARDED,
            "OUTSIDE": self.outside,
            "FOLDER": self.folder,
            "OUTSIDE_NAME": f"{self.beside.name}/{self.outside.name}",
            "FOLDER_NAME": f"{self.beside.name}/{self.folder.name}",
            "FOLDER_FILE": "kept",
        }
        return re.sub(r"@([A-Z_]+)@", lambda found: str(values[found[1]]), text)

    def words(self, key):
        return [self.filled(word) for word in self.about.get(key, [])]

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
        if listener.count:
            found.append("a connection was made")
        return found


@pytest.fixture
def listener(monkeypatch):
    with Listener() as server:
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{server.server_address[1]}")
        yield server
        server.shutdown()


@pytest.fixture
def attack(request, project, monkeypatch, listener):
    made = Attack(request.param, project)
    if made.about.get("guest_acts") and BACKEND == "local" and request.function is not test_unprotected:
        pytest.skip("the machine obeys it as well, and here that is a process of this computer")
    monkeypatch.setenv("ATTACK_FOLDER", os.fspath(made.folder))
    monkeypatch.chdir(project.path / made.about.get("folder", "."))
    return made


def folders_where(key, *values):
    """Return the attacks of which ``key`` says one of ``values``; repetition is for `make test-all`."""
    found = {name: tomllib.loads((PROJECTS / name / "attack.toml").read_text()) for name in ATTACKS}
    return [
        pytest.param(name, marks=[pytest.mark.thorough] if about.get("repeats") else [])
        for name, about in found.items()
        if about.get(key, about["test"] if key == "action" else None) in values
    ]


def check(attack, listener, expected, result):
    text = result.stdout.str() + result.stderr.str()
    if expected in {"passed", "warned"}:
        assert result.ret == 0, text
        result.assert_outcomes(passed=1, warnings=int(expected == "warned"))
        assert "in 1 machine" in text
    else:
        assert result.ret == pytest.ExitCode.USAGE_ERROR, text
        assert not re.search(r"\d passed", text)
        assert "Traceback (most" not in text, text
    assert attack.about.get("said", "") in text
    assert "\x1b]" not in text
    assert not re.search(r"^::", text, re.MULTILINE)
    assert not attack.ran.exists(), "tests ran outside the machine"
    if expected in {"told", "warned"}:
        attack.marker.unlink(missing_ok=True)
    assert attack.sprung(listener) == [], text


@pytest.mark.parametrize("attack", folders_where("test", "passed", "refused"), indirect=True)
@pytest.mark.parametrize("entry", ENTRIES[1:])
def test_through_the_launcher(attack, listener):
    result = attack.project.launched(*attack.words("words"), *attack.words("test_words"))
    check(attack, listener, attack.about["test"], result)


@pytest.mark.thorough
@pytest.mark.parametrize("attack", folders_where("action", "passed", "refused"), indirect=True)
def test_through_the_action(attack, listener):
    """It has a report of its own, so a project's is left out."""
    expected = attack.about.get("action", attack.about["test"])
    check(attack, listener, expected, attack.project.in_the_action(*attack.words("words")))


@pytest.mark.parametrize(
    "attack", folders_where("pytest", "passed", "refused", "told", "warned"), indirect=True
)
def test_through_the_option(attack, listener):
    result = attack.project.command(*attack.words("words"))
    check(attack, listener, attack.about["pytest"], result)


@pytest.mark.parametrize("attack", folders_where("pytest", "sprung"), indirect=True)
def test_what_the_option_cannot_promise(attack, listener):
    """These are why there is a launcher; whoever mends one tells SECURITY.md."""
    if attack.about.get("python_m"):
        attack.project.run(sys.executable, "-m", "pytest", "--microvm")
    else:
        attack.project.command(*attack.words("words"))
    assert attack.marker.exists()


@pytest.mark.parametrize("attack", folders_where("native", None), indirect=True)
def test_unprotected(attack, listener):
    """The control: the same springs where pytest is run as it is."""
    plain = [sys.executable, "-m", "pytest"] if attack.about.get("python_m") else [attack.project.PYTEST]
    attack.project.run(*plain, *attack.words("control"))
    attack.ran.unlink(missing_ok=True)
    assert attack.sprung(listener) != []
