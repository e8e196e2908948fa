"""The guest and the wire import the standard library, each other downwards, and nothing else."""

import ast
import sys
from pathlib import Path

import pytest

import pytest_microvm

PACKAGE = Path(pytest_microvm.__file__).parent
FILES = sorted([*PACKAGE.joinpath("guest").glob("**/*.py"), *PACKAGE.joinpath("wire").glob("**/*.py")])
RUNNER_ONLY = {"pytest", "_pytest", "pluggy", "coverage"}


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they lead"
            yield node.module


def allowed(path, name):
    top = name.split(".")[0]
    if top == "pytest_microvm":
        own = "pytest_microvm.guest" if "guest" in path.parts else "pytest_microvm.wire"
        return (name + ".").startswith((own + ".", "pytest_microvm.wire."))
    return top in sys.stdlib_module_names or (path.name.startswith("runner") and top in RUNNER_ONLY)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports(path):
    names = set(imported(ast.parse(path.read_text())))
    assert not {name for name in names if not allowed(path, name)}


def test_there_is_something_to_check():
    assert {"port.py", "frames.py", "channel.py"} <= {path.name for path in FILES}


def test_the_check_sees_what_is_forbidden():
    agent = PACKAGE / "guest" / "agent.py"
    names = set(
        imported(
            ast.parse(
                "import rich.console, os\nfrom pytest_microvm.settings.spec import MachineSpec\nimport pytest"
            )
        )
    )
    assert {name for name in names if not allowed(agent, name)} == {
        "rich.console",
        "pytest_microvm.settings.spec",
        "pytest",
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_syntax_of_python_3_8(path):
    ast.parse(path.read_text(), feature_version=(3, 8))
