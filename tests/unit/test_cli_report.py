"""``pytest-microvm report``: what it says, writes, and ends with."""

import os

import junitparser
import pytest

from pytest_microvm.cli import main


def suite(content, tests=1, name="s", **more):
    counts = {"failures": 0, "errors": 0, **more}
    told = " ".join(f'{key}="{value}"' for key, value in counts.items())
    return f'<testsuite name="{name}" tests="{tests}" {told}>{content}</testsuite>'


GOOD = suite('<testcase classname="c" name="n" time="1"/>')


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(**contents):
        for name, content in contents.items():
            (tmp_path / f"{name}.xml").write_text(content)

    return write


def test_merge(files, capsys):
    files(a=GOOD, b=suite('<testcase classname="c" name="n"><failure/></testcase>', failures=1))
    assert main(["report", "merge", "out.xml", "a.xml", "b.xml"]) == 0
    assert capsys.readouterr().out == "out.xml: 2 tests (1 passed, 1 failed), for generic\n"
    parsed = junitparser.JUnitXml.fromfile("out.xml")
    assert [(one.name, one.tests, one.failures) for one in parsed] == [("a: s", 1, 0), ("b: s", 1, 1)]


def test_merge_with_a_file_that_cannot_be_read(files, capsys):
    files(a=GOOD, b="<testsuite>")
    assert main(["report", "merge", "out.xml", "a.xml", "b.xml"]) == 1
    out, err = capsys.readouterr()
    assert "2 tests (1 passed, 1 error)" in out
    assert err.startswith("pytest-microvm: b.xml could not be read: no element found")


def test_merge_counts_flaky_tests(files, capsys):
    files(a=suite('<testcase name="n"><failure/></testcase><testcase name="n"/>', tests=2))
    assert main(["report", "merge", "out.xml", "a.xml", "--profile", "gitlab"]) == 0
    assert capsys.readouterr().out == "out.xml: 1 tests (1 passed, 1 of them flaky), for gitlab\n"


def test_convert_in_place(files, capsys):
    files(
        a='<testsuites name="pytest tests">'
        + suite('<testcase classname="c" name="n" file="a" line="0"/>')
        + "</testsuites>"
    )
    assert main(["report", "verify", "a.xml"]) == 1
    assert main(["report", "convert", "--profile=github", "a.xml", "a.xml"]) == 0
    assert main(["report", "verify", "a.xml"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "a.xml:1: test 'n': pytest counts lines from 0, readers from 1",
        "a.xml: 1 tests (1 passed), for github",
        "a.xml: ok",
    ]


def test_a_reader_must_be_named_to_convert(files, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["report", "convert", "a.xml", "b.xml"])
    assert "--profile" in capsys.readouterr().err


CASE = '<testcase classname="c" name="n"{}</testcase>'


@pytest.mark.parametrize(
    ("profile", "content", "said"),
    [
        ("generic", suite('<testcase classname="c"/>'), "a test without a name"),
        ("generic", suite('<testcase name="n"/>'), "test 'n' has no classname"),
        ("generic", suite('<testcase classname="c" name="n"/>' * 2, 2), "is in this suite more than once"),
        (
            "gitlab",
            "<testsuites>" + GOOD + suite(CASE.format(">"), name="t") + "</testsuites>",
            "is in this file more than once",
        ),
        ("generic", suite(CASE.format(' line="0">')), "line='0' is no line; the first is 1"),
        ("generic", suite(CASE.format(' line="x">')), "line='x' is no line"),
        ("generic", suite(CASE.format(' line="0">'), name="pytest"), "pytest counts lines from 0"),
        ("generic", suite(CASE.format(' time="fast">')), "time='fast' is no number of seconds"),
        ("generic", suite(CASE.format(' time="0,160">')), "time='0,160' has a decimal comma"),
        ("generic", suite(CASE.format("><failure/><error/>"), failures=1), "has 2 results (failure, error)"),
        ("generic", suite(CASE.format(">"), tests=2), "suite 's' says tests='2', but has 1"),
        ("generic", suite(CASE.format(">"), skipped=1), "suite 's' says skipped='1', but has 0"),
        ("generic", f'<testsuite name="s">{CASE.format(">")}</testsuite>', "does not say how many tests"),
        ("generic", suite(CASE.format(">"), name=""), "a suite without a name"),
        ("generic", suite("", 0), "it has no test"),
        ("generic", suite(CASE.format(">\x1b")), "it is not well-formed XML"),
        ("generic", "<!DOCTYPE a>" + GOOD, "it cannot be read: it declares a document type"),
        ("gitlab", suite(CASE.format('><failure message="m"/>'), failures=1), "<failure> without text"),
        ("gitlab", suite(CASE.format("><properties/>")), "properties of a test: gitlab has no place"),
        ("jenkins", suite(CASE.format(' file="a">')), "jenkins's schema has no place"),
        ("jenkins", suite('<testcase classname="/etc" name="n"/>'), "its classname is a path"),
    ],
)  # fmt: skip
def test_verify(files, capsys, profile, content, said):
    files(a=content, good=GOOD)
    assert main(["report", "verify", "--profile", profile, "a.xml", "good.xml"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert any(said in line and line.startswith("a.xml:") for line in out), out
    assert out[-1] == "good.xml: ok"


def test_verify_reports_the_line_number(files, capsys):
    files(a='<testsuite name="s" tests="1" failures="0"\nerrors="0">\n\n<testcase name="n"/></testsuite>')
    main(["report", "verify", "a.xml"])
    assert capsys.readouterr().out == "a.xml:4: test 'n' has no classname\n"


def test_verify_says_no_more_than_people_read(files, capsys):
    files(a=suite('<testcase classname="c"/>' * 1000, 1000))
    assert main(["report", "verify", "a.xml"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert (len(out), out[-1]) == (201, "a.xml: and more; these are the first 200")


@pytest.mark.parametrize("verb", [["merge", "out.xml"], ["verify"], ["convert", "--profile=github"]])
def test_a_file_that_is_not_there(files, capsys, verb, tmp_path):
    more = ["out.xml"] if verb[0] == "convert" else []
    assert main(["report", *verb, "missing.xml", *more]) == 4
    assert "there is no file missing.xml\nnext step: " in capsys.readouterr().err
    assert main(["report", *verb, os.fspath(tmp_path), *more]) == 4
    assert not (tmp_path / "out.xml").exists()


def test_a_file_that_cannot_be_written(files, capsys, tmp_path):
    files(a=GOOD)
    (tmp_path / "out.xml").mkdir()
    assert main(["report", "merge", "out.xml", "a.xml"]) == 1
    assert "out.xml cannot be written" in capsys.readouterr().err
