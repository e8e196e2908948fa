"""A project that is run natively and with --microvm, and a comparison of what is shown."""

import difflib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pytest_microvm.ci.github.inputs import read_inputs
from pytest_microvm.ci.github.run import run_command
from pytest_microvm.images.store import cache_root
from support import guards

BACKEND = os.environ.get("PYTEST_MICROVM_TEST_BACKEND", "local")
"""``local`` (processes of this computer, no hypervisor needed) or ``machines`` (slow: real ones)."""

CACHE = cache_root()  # before pytester moves HOME away

only_locally = pytest.mark.skipif(
    BACKEND != "local", reason="looks at what the guest leaves on this computer"
)


ENTRIES = ("pytest --microvm", "pytest-microvm test")
TESTS = Path(__file__).parents[1]
LAUNCHER = Path(sys.executable).with_name("pytest-microvm")


class Project:
    """A project in a directory of its own, run natively and with machines.

    Args:
        pytester: The fixture; its folder is the project's.
        monkeypatch: The fixture.
        backend: Arguments for pytest and variables that choose what runs the tests.
        entry: One of :data:`ENTRIES`: how machines come in.
    """

    PYTEST = Path(sys.executable).with_name("pytest")

    def __init__(self, pytester, monkeypatch, backend, entry=ENTRIES[0]):
        self.entry = entry
        self.path = pytester.path
        self._monkeypatch = monkeypatch
        self._pytester = pytester
        self._arguments, variables = backend
        monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
        monkeypatch.delenv("COV_CORE_SOURCE", raising=False)
        monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "")
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    def write(self, **files):
        """Write files: ``a__b`` is ``a/b.py``, ``c__DOT__txt`` is ``c.txt``; indentation is taken off."""
        for name, content in files.items():
            suffix = "" if "__DOT__" in name else ".py"
            path = self.path / (name.replace("__DOT__", ".").replace("__", "/") + suffix)
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = content.strip("\n").splitlines()
            indent = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
            path.write_text("\n".join(line[indent:] for line in lines) + "\n")

    def native(self, *arguments):
        """Run pytest without machines; return pytester's result."""
        return self._pytester.runpytest_subprocess("-p", "no:hypothesispytest", *arguments)

    def microvm(self, *arguments):
        """Run it in machines, by its entry; return pytester's result."""
        if self.entry == ENTRIES[1]:
            return self.launched(*arguments)
        options = ["--microvm", *self._arguments, "-p", "no:hypothesispytest"]
        return self._pytester.runpytest_subprocess(*options, *arguments)

    def command(self, *arguments):
        """Run the command ``pytest``, which unlike ``python -m pytest`` imports nothing from here."""
        return self.run(self.PYTEST, "--microvm", *self._arguments, "-p", "no:hypothesispytest", *arguments)

    def run(self, *command):
        """Run any command in the current folder; return what pytester would.

        Unlike pytester's own, without the folder on PYTHONPATH.
        """
        started = time.monotonic()
        done = subprocess.run(
            [os.fspath(word) for word in command], stdin=subprocess.DEVNULL, capture_output=True,
            encoding="utf-8", errors="replace", timeout=guards.SUITE, check=False,
        )  # fmt: skip
        duration = time.monotonic() - started
        return pytest.RunResult(done.returncode, done.stdout.splitlines(), done.stderr.splitlines(), duration)

    def launched(self, *arguments):
        """Run it with ``pytest-microvm test``; return what pytester would."""
        self._name_backend()
        return self.run(LAUNCHER, "test", "-p", "no:hypothesispytest", *arguments)

    def in_the_action(self, *arguments):
        """Run it as the GitHub Action does with ``mode: pytest``; return what pytester would."""
        self._name_backend()
        folder = self.path.parent / f"{self.path.name}-action"
        inputs = read_inputs({"INPUT_ARGS": shlex.join(["-p", "no:hypothesispytest", *arguments])}, folder)
        return self.run(*run_command(inputs, {}))

    def _name_backend(self):
        """Name what runs the tests in a user's configuration: the launcher takes nothing from PYTHONPATH."""
        folder = self.path.parent / f"{self.path.name}-config"
        if self._arguments:
            file = folder / "pytest-microvm" / "config.toml"
            file.parent.mkdir(parents=True, exist_ok=True)
            lines = [
                "[test]",
                f"plugins = {json.dumps(self._arguments[1::2])}",
                f"plugin_path = {json.dumps([str(TESTS)])}",
            ]
            file.write_text("\n".join(lines))
        self._monkeypatch.setenv("XDG_CONFIG_HOME", os.fspath(folder))

    def assert_same(self, *arguments, prepare=lambda: None):
        """Run both ways, and fail the test unless what is shown and the exit code are the same.

        Args:
            arguments: For pytest.
            prepare: Called before each run.

        Returns:
            pytester's result of the run with ``--microvm``.
        """
        prepare()
        native = self.native(*arguments)
        prepare()
        remote = self.microvm(*arguments)
        difference = "\n".join(
            difflib.unified_diff(
                transcript(native), transcript(remote), "native", "--microvm", lineterm="", n=2
            )
        )
        if difference:
            pytest.fail(difference, pytrace=False)
        assert remote.ret == native.ret
        return remote


_ONLY_HERE = re.compile(r"microvm: |platform |rootdir: |configfile: |plugins: |cachedir: ")


def transcript(result):
    """Return what a run showed, without times, places and the lines that only one of the two has."""
    lines = [line.removeprefix("collecting ... ") for line in result.outlines if line != "collecting ... "]
    text = "\n".join(line for line in lines if not _ONLY_HERE.match(line))
    text = re.sub(r"\b\d+\.\d+s\b", "0s", text)
    text = re.sub(r"\b0x[0-9a-f]+\b", "0x0", text)
    if BACKEND == "machines":  # the guest has another Python, elsewhere, and other plug-ins
        text = re.sub(r"/\S*/(importlib/|ast\.py|_pytest/)", r"\1", text)
        text = re.sub(r"(<frozen importlib\._bootstrap>:)\d+", r"\1", text)
        text = re.sub(r"(available fixtures:).*", r"\1", text)
    return re.sub(r"^(=|-)\1+ | (=|-)\2+$", "", text, flags=re.MULTILINE).splitlines()
