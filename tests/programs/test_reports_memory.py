"""A hostile JUnit file costs the host a bounded amount of memory."""

import subprocess
import sys

import pytest

from pytest_microvm.reports.reading import FILE_LIMIT
from support.tiers import thorough_but

MIB = 1024 * 1024
BOUND = 80
"""MiB, where a quarter of the tests may be kept; a tree of the whole file takes several times as much."""
WAYS = {
    "tests": ('<testsuite name="s">', lambda number: f'<testcase name="a{number}"/>', "</testsuite>"),
    "lines": (
        '<testsuite name="s"><testcase name="a"><system-out>',
        lambda _: "[[ATTACHMENT|\n" * 1000,
        "</system-out></testcase></testsuite>",
    ),
    "attributes": ('<testsuite name="s"><testcase ', lambda number: f'a{number}="x" ', "/></testsuite>"),
}
CODE = """
import re, sys
from pathlib import Path
from pytest_microvm.reports import parsing
from pytest_microvm.reports.reading import read_report

parsing.CASE_LIMIT //= 4

def most():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024

before = most()
report = read_report(Path(sys.argv[1]))
print(most() - before, sum(len(suite.cases) for suite in report.suites))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what a process took")
@pytest.mark.parametrize("way", thorough_but(WAYS, "attributes"))
def test_memory(tmp_path, way):
    before, part, after = WAYS[way]
    path, number = tmp_path / "big.xml", 0
    with path.open("w") as file:
        file.write(before)
        while file.tell() < FILE_LIMIT - MIB:
            file.write("".join(part(number + more) for more in range(100)))
            number += 100
        file.write(after)
    assert path.stat().st_size > FILE_LIMIT / 2
    done = subprocess.run([sys.executable, "-c", CODE, path], check=True, capture_output=True, text=True)
    grown, cases = map(int, done.stdout.split())
    assert cases
    assert grown < BOUND, grown
