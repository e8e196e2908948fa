"""The host's git is started by one module, which is hardened; any other way to start it is found here."""

import ast
import textwrap
from pathlib import Path

import pytest

import pytest_microvm

PACKAGE = Path(pytest_microvm.__file__).parent
FILES = sorted(PACKAGE.glob("**/*.py"))
ONLY = PACKAGE / "git/commands.py"
STARTERS = {
    "which",
    "_installed",
    "Popen",
    "call",
    "check_call",
    "check_output",
    "getoutput",
    "run",
    "system",
    "popen",
}
STARTERS |= {"execlp", "execvp", "execv", "execl", "spawnlp", "spawnvp", "posix_spawn", "posix_spawnp"}
STARTERS |= {"create_subprocess_exec", "create_subprocess_shell"}
LIBRARIES = {"git", "pygit2", "dulwich"}


def is_git(node):
    """Whether a node is a text that names git as a program, or begins a command line with it."""
    if isinstance(node, ast.JoinedStr) and node.values:
        return is_git(node.values[0])
    text = node.value if isinstance(node, ast.Constant) else None
    words = text.split() if isinstance(text, str) else []
    return bool(words) and words[0].rpartition("/")[2] == "git"


def is_machine(call):
    """Whether a call runs something in a machine: ``self._machine.run([...])``."""
    owner = getattr(call.func, "value", None)
    return getattr(owner, "attr", getattr(owner, "id", "")) in ("machine", "_machine")


def starts(tree):
    """Yield the lines of all that starts git, or might."""
    inside = {id(arg) for node in ast.walk(tree) if isinstance(node, ast.Call) and is_machine(node)
              for arg in node.args}  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.List) and node.elts and is_git(node.elts[0]) and id(node) not in inside:
            yield node.lineno
        elif isinstance(node, ast.Call) and node.args and is_git(node.args[0]):
            if getattr(node.func, "attr", getattr(node.func, "id", "")) in STARTERS:
                yield node.lineno
        elif (isinstance(node, ast.Import) and any(alias.name in LIBRARIES for alias in node.names)) or (
            isinstance(node, ast.ImportFrom) and node.module in LIBRARIES
        ):
            yield node.lineno


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_else_starts_git(path):
    if path != ONLY:
        lines = list(starts(ast.parse(path.read_text())))
        assert not lines, "start git through pytest_microvm.git.commands: ADR 0026"


def test_the_one_module_is_found():
    assert list(starts(ast.parse(ONLY.read_text())))


@pytest.mark.parametrize(
    "code",
    [
        'subprocess.run(["git", "status"])',
        'command = ["git", *safe]\nsubprocess.run(command)',
        '["/usr/bin/git", "status"]',
        'shutil.which("git")',
        'which("git")',
        'git = _installed("git", "git")',
        'os.system("git status")',
        'subprocess.run(f"git -C {folder} status", shell=True)',
        'os.execvp("git", words)',
        'async def f():\n    await asyncio.create_subprocess_exec("git", "status")',
        "import pygit2",
        "from git import Repo",
    ],
)
def test_a_way_to_start_git_is_found(code):
    assert list(starts(ast.parse(code)))


def test_git_in_a_machine_and_as_a_word_is_not():
    code = """
        KINDS = ("copy", "live", "git")
        PRESETS = ("git",)
        self._machine.run(["git", "-C", folder])
        said.get("git")
        """
    assert not list(starts(ast.parse(textwrap.dedent(code))))
