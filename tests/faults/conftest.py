"""What every fault must leave behind: nothing."""

import os
import threading
from collections import Counter
from pathlib import Path

import pytest

from pytest_microvm.settings.spec import MachineSpec
from support.processes import children
from support.projects import new_project

SPEC = MachineSpec(image="base", timeout=120)


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


@pytest.fixture
def project(tmp_path):
    return new_project(tmp_path)
