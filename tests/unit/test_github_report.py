"""What GitHub's page shows: counts, annotations and summary of a report, whatever its tests are called."""

from pathlib import Path, PurePosixPath
from xml.sax.saxutils import quoteattr

import pytest

from pytest_microvm.ci.github.report import (
    Ground,
    count,
    heading,
    path_in_repository,
    read_junit,
    remarks,
    suite_summary,
)
from pytest_microvm.ci.results.result import Counts

GROUND = Ground("kvm", "kvm boots a guest here", (("python", "a" * 64),), 1)
TOP = PurePosixPath()


def junit(folder, *cases):
    path = folder / "junit.xml"
    path.write_text(f"<testsuites><testsuite name='pytest'>{''.join(cases)}</testsuite></testsuites>")
    return read_junit(path)


def case(name="test_a", inside="", file="tests/test_a.py", line="4"):
    attributes = f"classname='tests.test_a' name={quoteattr(name)} file='{file}' line='{line}'"
    return f"<testcase {attributes}>{inside}</testcase>"


def failure(message="AssertionError", text="where it failed"):
    return f"<failure message={quoteattr(message)}>{text}</failure>"


def test_counts(tmp_path):
    report = junit(
        tmp_path,
        case(), case("b", failure()), case("c", "<error message='e'/>"), case("d", "<skipped message='s'/>"),
    )  # fmt: skip
    assert count(report) == Counts(passed=1, failed=1, errors=1, skipped=1)
    assert count(None) == Counts()


def test_no_report(tmp_path):
    assert read_junit(tmp_path / "junit.xml") is None
    ground = Ground("kvm", "it works", (), 4)
    assert suite_summary(None, ground).startswith("## pytest-microvm: no test ran (exit code 4)")
    [remark] = remarks(None, ground, TOP)
    assert "exit code 4" in remark.message


def test_failures_are_annotated(tmp_path):
    report = junit(tmp_path, case("test_b", failure("assert 1 == 2")), case())
    [remark] = remarks(report, GROUND, PurePosixPath("sub"))
    assert (remark.level, remark.file, remark.message) == ("error", "sub/tests/test_a.py", "assert 1 == 2")
    assert remark.title == "tests.test_a: test_b"


@pytest.mark.parametrize("file", ["../../etc/passwd", "/etc/passwd", "a/../../b", ""])
def test_no_file_outside_of_the_repository(tmp_path, file):
    report = junit(tmp_path, case("test_b", failure(), file=file))
    [remark] = remarks(report, GROUND, TOP)
    assert remark.file == ""


def test_no_file_where_it_is_not_checked_out(tmp_path):
    [remark] = remarks(junit(tmp_path, case("test_b", failure())), GROUND, None)
    assert remark.file == ""


def test_emulation_is_reported_as_a_warning(tmp_path):
    ground = Ground("tcg", "there is no /dev/kvm", (), 0)
    report = junit(tmp_path, case())
    [remark] = remarks(report, ground, TOP)
    assert (remark.level, remark.title) == ("warning", "pytest-microvm: no KVM")
    assert "there is no /dev/kvm" in remark.message
    assert "> [!WARNING]" in heading(ground)
    assert "WARNING" not in heading(GROUND)


def test_a_run_that_was_killed(tmp_path):
    ground = Ground("kvm", "it works", ())
    assert remarks(junit(tmp_path, case()), ground, TOP)[0].message == "the run did not end by itself"


def test_names_and_texts_are_no_markdown(tmp_path):
    name = "[click](http://evil.example) `x` | <img src=x> ## @you"
    text = "```\n# not a heading\n````\n&lt;script&gt;"
    summary = suite_summary(junit(tmp_path, case(name, failure(text=text))), GROUND)
    [title] = [line for line in summary.splitlines() if line.startswith("### ")]
    assert title == f"### ``tests.test_a: {name}``"  # a code span, which its backticks do not end
    fence = next(line for line in summary.splitlines() if line.endswith("text"))
    assert fence == "`````text"
    assert summary.count("\n`````\n") == 1


def test_the_summary_says_what_there_is(tmp_path):
    summary = suite_summary(junit(tmp_path, case(), case("b", failure())), GROUND)
    assert summary.splitlines()[0] == "## pytest-microvm: 1 failed, 1 passed"
    assert "| 2 | 1 | 1 | 0 | 0 | 0 |" in summary
    assert "`python` (aaaaaaaaaaaa)" in summary


def test_many_failures(tmp_path):
    report = junit(tmp_path, *(case(f"test_{number}", failure()) for number in range(60)))
    assert "10 more failures are in the JUnit report." in suite_summary(report, GROUND)


def test_passed_but_not_well(tmp_path):
    ground = Ground("kvm", "it works", (), 3)
    assert "1 passed, but exit code 3" in suite_summary(junit(tmp_path, case()), ground)


def test_where_a_folder_is():
    assert path_in_repository(Path("/a/b/c"), Path("/a/b")) == PurePosixPath("c")
    assert path_in_repository(Path("/a/b"), Path("/a/b")) == PurePosixPath()
    assert path_in_repository(Path("/a"), Path("/a/b")) is None
