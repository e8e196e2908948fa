"""An IDE attaches to a test in a machine, as the how-to guide says, and stops at a breakpoint."""

import socket
import subprocess

import pytest

from support import guards
from support.commands import PYTEST
from support.debug_adapter import files_of_the_how_to, launch_configuration, stopped_in_ide

pytest.importorskip("debugpy")
TEST = """
from debugging import wait_for_ide


def price(pieces):
    total = pieces * 7
    return total


def test_price():
    wait_for_ide()
    assert price(3) == 21
"""
LINE = TEST.splitlines().index("    return total") + 1


@pytest.mark.parametrize(
    "opened",
    [
        pytest.param("project", id="same-path", marks=pytest.mark.thorough),
        pytest.param("link", id="mapped-path"),
    ],
)
def test_breakpoint_of_an_ide(tmp_path, opened):
    """The second one has opened the project under another path, and maps it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    folder = tmp_path / "project"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    (folder / "pytest.ini").write_text("[pytest]\npythonpath = .\n")
    (folder / "debugging.py").write_text(files_of_the_how_to()["debugging.py"].replace("5678", str(port)))
    (folder / "test_price.py").write_text(TEST)
    configuration = launch_configuration(tmp_path / opened, port)
    (mapping,) = configuration["pathMappings"]
    mapping["remoteRoot"] = str(folder)
    command = [*PYTEST, "--microvm", f"--microvm-debug-port={port}", f"--microvm-timeout={guards.MACHINE}"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        place = tmp_path / opened / "test_price.py"
        try:
            with stopped_in_ide(port, process, configuration, place, LINE) as (frame, evaluate):
                assert frame["name"] == "price"
                assert frame["source"]["path"] == str(place)
                assert evaluate("total + 1") == "22"
                assert evaluate("__import__('os').path.exists('/run/microvm')") == "True"
            shown, _ = process.communicate(timeout=guards.MACHINE)
        finally:
            process.kill()
    assert process.returncode == 0, shown
    assert "1 passed" in shown
