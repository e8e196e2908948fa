"""What every fault must leave behind: nothing."""

import os
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from pathlib import Path

import pytest
from junitparser import JUnitXml, Properties

from pytest_microvm.spec import MachineSpec
from support import guards

SPEC = MachineSpec(image="base", timeout=120)


def children(pid=None):
    """Return the ids of all processes below ``pid``, the living ones."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            parents.setdefault(int(fields[1]), []).append(int(folder.name))
    found, below = [], [pid or os.getpid()]
    while below:
        below = [child for parent in below for child in parents.get(parent, [])]
        found += below
    return found


def groups():
    """Return the control groups of machines that belong to this process."""
    mine = f"-{os.getpid()}-"
    return [path for path in Path("/sys/fs/cgroup").glob("**/*microvm*") if mine in path.name]


def inventory(host):
    """Count what machines use: processes, descriptors by kind, threads, records, drafts, control groups."""
    kinds = Counter()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = str(entry.readlink())
        except OSError:
            continue
        if not target.endswith("meta.json"):  # a template that the host holds on purpose
            kinds[target.partition(":")[0] if ":[" in target else "file " + target] += 1
    return {
        "processes": len(children()),
        "sockets": kinds["socket"],
        "pipes": kinds["pipe"],
        "files": sorted(name for name in kinds if name.startswith("file ")),
        "threads": sorted(thread.name for thread in threading.enumerate() if "quotas" not in thread.name),
        "records": [record.id for record in host.budget.records() if record.owner == os.getpid()],
        "drafts": sorted(host.templates._drafts),
        "groups": groups(),
    }


@pytest.fixture
def nothing_left(host):
    """Count before and after the test: what was started and made is gone."""
    host.start(SPEC).close()  # what stays once per process (threads, a template) is there before
    before = inventory(host)
    yield
    assert inventory(host) == before


def new_project(parent):
    folder = parent / "project"
    folder.mkdir()
    (folder / "pytest.ini").write_text("[pytest]\n")
    return Project(folder)


@pytest.fixture
def project(tmp_path):
    return new_project(tmp_path)


class Project:
    """A folder with tests, run by a pytest of its own whose machines are recorded where nobody else's are."""

    def __init__(self, folder):
        self.folder = folder
        self.runtime = folder.parent / "runtime"
        self.runtime.mkdir(mode=0o700)

    def write(self, name, text):
        (self.folder / name).write_text(textwrap.dedent(text))

    def plug_in(self, name, text):
        """Write a plug-in of this computer, outside the project: the one that injects the fault."""
        folder = self.folder.parent / "plugins"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(textwrap.dedent(text))
        return {"PYTHONPATH": os.fspath(folder)}

    def start(self, *arguments, **options):
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
        variables = options.pop("env", {})
        environment = {**os.environ, "XDG_RUNTIME_DIR": os.fspath(self.runtime), **variables}
        return subprocess.Popen(
            command, cwd=self.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, **options,
        )  # fmt: skip

    def run(self, *arguments, status=0, **options):
        """Return what a run printed; its machines must be gone."""
        with self.start(*arguments, **options) as process:
            output, _none = process.communicate(timeout=guards.SUITE)
        assert process.returncode == status, output
        self.assert_nothing_left(process.pid)
        return output

    def assert_nothing_left(self, pid):
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
