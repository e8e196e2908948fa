"""The verdict of benchmarks/plugin_table.py on recorded runs."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "benchmarks" / "plugin_verdict.py"
NAMES = ("pytest-report", "--report")
BACKWARDS = ["test_b failed", "test_a passed"]


@pytest.fixture(scope="module")
def verdicts():
    spec = importlib.util.spec_from_file_location("plugin_verdict", SOURCE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def native(verdicts):
    return verdicts.Result(
        status=1,
        outcomes=("test_a passed", "test_b failed"),
        files={"report.json": "[1]", "out/log.txt": "x"},
        counts="1 failed, 1 passed",
    )


def gone(*names):
    return f"microvm: written by tests and gone with their machines: 1 file ({', '.join(names)}); ..."


def test_equal_runs_are_the_same(verdicts, native):
    said = replace(native, announced=("microvm: 2 tests in 2 machines",))
    assert verdicts.judge(NAMES, native, said) == verdicts.Verdict("same")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"status": 0}, "exit status 1, in machines 0"),
        ({"counts": "1 failed"}, "counts '1 failed, 1 passed', in machines '1 failed'"),
        ({"internal_error": True}, "an internal error in machines"),
        ({"missing": ("Generated",)}, "not printed in machines: 'Generated'"),
        ({"files": {"report.json": "[1]"}}, "out/log.txt is not written in machines"),
        (
            {"files": {"report.json": "[2]", "out/log.txt": "x"}},
            "report.json has another content in machines",
        ),
        (
            {"files": {"report.json": "[1]", "out/log.txt": "x", "new": ""}},
            "new is written only in machines",
        ),
        (
            {"outcomes": ("test_a passed", "test_b passed")},
            "outcomes ['test_b failed'], in machines ['test_b passed']",
        ),
        (
            {"outcomes": ("test_b failed", "test_a passed")},
            f"outcomes come in the order {['test_a passed', 'test_b failed']}, in machines {BACKWARDS}",
        ),
        (
            {"outcomes": ("test_a passed", "test_b failed", "test_b failed")},
            "outcomes 2, in machines 3",
        ),
    ],
)
def test_a_difference_that_no_line_announces_is_silent(verdicts, native, change, text):
    verdict = verdicts.judge(NAMES, native, replace(native, **change))
    assert verdict.word == "DIFFERENT"
    assert [each.text for each in verdict.silent] == [text]


@pytest.mark.parametrize(
    "line",
    [
        "microvm: pytest-report keeps what it knows in memory: use --microvm-isolation=session",
        "microvm: --report has no effect",
        "microvm: --report=x has no effect",
    ],
)
def test_a_line_about_the_plugin_announces_every_difference(verdicts, native, line):
    verdict = verdicts.judge(NAMES, native, replace(native, status=0, files={}, announced=(line,)))
    assert (verdict.word, verdict.silent) == ("warned", ())
    assert len(verdict.differences) == 3


@pytest.mark.parametrize(
    "line",
    [
        "microvm: pytest-reporter keeps what it knows in memory",
        "microvm: my-pytest-report keeps what it knows in memory",
        "microvm: --report-all has no effect",
        "microvm: in the machine: pytest-report 1.0",
        "microvm: written by tests: 1 file (out/--report)",
        "microvm: 2 tests in 2 machines",
    ],
)
def test_a_line_about_something_else_announces_nothing(verdicts, native, line):
    verdict = verdicts.judge(NAMES, native, replace(native, status=0, announced=(line,)))
    assert verdict.word == "DIFFERENT"


def test_a_named_file_announces_its_own_difference_alone(verdicts, native):
    remote = replace(native, files={}, announced=(gone("out/log.txt"),))
    verdict = verdicts.judge(NAMES, native, remote)
    assert verdict.word == "DIFFERENT"
    assert [each.file for each in verdict.differences] == ["out/log.txt", "report.json"]
    assert [each.file for each in verdict.silent] == ["report.json"]


def test_a_file_that_came_back_with_another_content_is_silent(verdicts, native):
    remote = replace(
        native,
        files={**native.files, "report.json": "[2]"},
        announced=("microvm: written by tests: 1 file (report.json)",),
    )
    assert verdicts.judge(NAMES, native, remote).word == "DIFFERENT"


def test_all_files_named_is_a_warning(verdicts, native):
    remote = replace(native, files={}, announced=(gone("out/log.txt", "report.json"),))
    assert verdicts.judge(NAMES, native, remote).word == "warned"


def test_usage_error_that_names_the_plugin_is_a_refusal(verdicts, native):
    refused = verdicts.Result(status=4, announced=("ERROR: --report cannot be used with machines",))
    assert verdicts.judge(NAMES, native, refused).word == "refused"
    unnamed = replace(refused, announced=("ERROR: No module named 'x'",))
    assert verdicts.judge(NAMES, native, unnamed).word == "DIFFERENT"


def test_normalised_text_has_no_times_numbers_and_ids(verdicts):
    one = "took 0.25s  at 0x7f00aa, id 01234567-89ab-cdef-0123-456789abcdef, 1e-05"
    two = "took 12s at 0x7F11BB, id fedcba98-7654-3210-fedc-ba9876543210, 3"
    assert verdicts.normalised(one) == verdicts.normalised(two) == "took TIME at ID, id ID, 0"
