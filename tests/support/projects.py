"""A project whose tests run with --microvm while something fails, and a look at what is left."""

import os
import subprocess
import textwrap
from pathlib import Path

from junitparser import JUnitXml, Properties

from support import guards
from support.commands import PYTEST


def new_project(parent):
    """Return a new project in the folder ``parent``."""
    folder = parent / "project"
    folder.mkdir()
    (folder / "pytest.ini").write_text("[pytest]\n")
    return Project(folder)


class Project:
    """A folder with tests, and pytest in processes whose machines are recorded apart from all others.

    Args:
        folder: The project; the records are in ``runtime`` beside it.
    """

    def __init__(self, folder):
        self.folder = folder
        self.runtime = folder.parent / "runtime"
        self.runtime.mkdir(mode=0o700)

    def write(self, name, text):
        """Write a file of the project, without the indentation of ``text``."""
        (self.folder / name).write_text(textwrap.dedent(text))

    def plug_in(self, name, text):
        """Write a plug-in of this computer, outside the project; return the variables that it needs."""
        folder = self.folder.parent / "plugins"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(textwrap.dedent(text))
        return {"PYTHONPATH": os.fspath(folder)}

    def start(self, *arguments, **options):
        """Start pytest and return the process; stdout has stderr in it.

        Args:
            arguments: For pytest.
            options: For :class:`subprocess.Popen`; ``env`` is added to the environment.
        """
        variables = options.pop("env", {})
        environment = {**os.environ, "XDG_RUNTIME_DIR": os.fspath(self.runtime), **variables}
        return subprocess.Popen(
            [*PYTEST, *arguments], cwd=self.folder, env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, **options,
        )  # fmt: skip

    def run(self, *arguments, status=0, **options):
        """Run pytest and return what it printed.

        Raises:
            AssertionError: The exit status is another than ``status``, or a machine is left.
            subprocess.TimeoutExpired: It hangs.
        """
        with self.start(*arguments, **options) as process:
            output, _none = process.communicate(timeout=guards.SUITE)
        assert process.returncode == status, output
        self.assert_nothing_left(process.pid)
        return output

    def assert_nothing_left(self, pid):
        """Assert that the pytest process ``pid`` left no record of a machine."""
        assert list(self.runtime.glob("pytest-microvm/machines/*.json")) == []
        assert [path for path in Path("/sys/fs/cgroup").glob("**/*microvm*") if f"-{pid}-" in path.name] == []

    def outcomes(self, report="report.xml"):
        """Return each test's properties, by name; the XML must be well-formed."""
        found = {}
        for suite in JUnitXml.fromfile(str(self.folder / report)):
            for case in suite:
                properties = {entry.name: entry.value for entry in case.child(Properties) or []}
                found[case.name] = {**properties, "result": [type(each).__name__ for each in case.result]}
        return found
