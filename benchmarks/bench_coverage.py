"""What measuring coverage costs a test in its machine.

Forty small tests of a module run in machines, in turn without and with ``--cov``, with pytest-cov of this
environment. The time of a test is that between the end of one and the end of the next, the median of all.
"""

from __future__ import annotations

import os
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
from bench_per_test import Clock
from measure import Samples, promise

ROUNDS = 3
TESTS = 40
MODULE = """
def sign(number):
    if number < 0:
        return -1
    return 1
"""
SUITE = f"""
import pytest
import signs

@pytest.mark.parametrize("number", range({TESTS}))
def test_sign(number):
    assert signs.sign(number) == 1
"""


def main() -> list[dict[str, object]]:
    """Measure in turn, print, and return what was promised."""
    plain, measured = Samples(), Samples()
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pytest.ini").write_text("[pytest]\npythonpath = .\n")
        (folder / "signs.py").write_text(MODULE)
        (folder / "test_signs.py").write_text(SUITE)
        os.chdir(folder)
        try:
            for number in range(ROUNDS + 1):
                for samples, options in ((plain, []), (measured, ["--cov=signs"])):
                    taken = seconds_of_a_test(options)
                    if number:  # the first round makes the templates
                        samples.values.append(taken)
        finally:
            os.chdir(before)
    print(f"a test                {plain} s")
    print(f"a test with coverage  {measured} s")
    return [promise("a test with coverage, against one without", measured.median / plain.median, 1.35, " x")]


def seconds_of_a_test(options: list[str]) -> float:
    """Run the suite, and return the median seconds from the end of a test to the end of the next."""
    clock = Clock()
    status = pytest.main(["-q", "--microvm", "-p", "no:cacheprovider", *options], plugins=[clock])
    if status != 0 or clock.passed != TESTS:
        raise SystemExit(f"the suite ended with {status}, {clock.passed} passed")
    gaps = Samples([after - before for before, after in pairwise(clock.ended)])
    return gaps.median
