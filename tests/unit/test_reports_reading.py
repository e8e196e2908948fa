"""Reading JUnit files: every dialect, and those that are written to do harm."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_microvm.reports import parsing, reading
from pytest_microvm.reports.reading import UNREADABLE, read_report
from pytest_microvm.reports.values import Case, Problem

CORPUS = Path(__file__).parents[1] / "fuzz" / "corpus" / "junit"
DIALECTS = {path.stem: path.read_text() for path in sorted(CORPUS.glob("*.xml"))}  # as the tools write them


@pytest.fixture
def read(tmp_path):
    def read(content, **options):
        path = tmp_path / "report.xml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_report(path, **options)

    return read


def cases(report):
    return [case for suite in report.suites for case in suite.cases]


def outcomes(report):
    return {case.name: case.outcome for case in cases(report)}


def suite(content, attributes='name="s"'):
    return f"<testsuite {attributes}>{content}</testsuite>"


def only(report):
    (case,) = cases(report)
    return case


def trouble(report):
    """Return why a file was refused, which one case must say."""
    (case,) = [case for case in cases(report) if case.name == UNREADABLE]
    assert case.outcome == "error"
    assert report.trouble in case.problems[0].message
    assert report.trouble
    return report.trouble


# Dialects


def test_pytest(read):
    report = read(DIALECTS["pytest-xunit1"])
    ok, bad, skip, xfail, both = cases(report)
    assert (ok.classname, ok.name, ok.seconds) == ("tests.test_a.TestIt", "test_ok[1-x]", 0.001)
    assert (ok.file, ok.line, bad.line) == ("tests/test_a.py", 1, 5)
    assert [case.outcome for case in (ok, bad, skip, xfail)] == ["passed", "failed", "skipped", "skipped"]
    assert bad.problems[0].text.endswith("E       assert 1 == 2")
    assert "#x1B[31mred" in bad.out
    assert skip.problems == (Problem("skipped", "no reason", "tests/test_a.py:9: no reason", "pytest.skip"),)
    assert (both.outcome, both.attempts) == ("error", ())  # once, though it is written twice
    assert [problem.text for problem in both.problems] == ["in the test", "in the teardown"]
    assert (report.suites[0].hostname, report.suites[0].timestamp[:10]) == ("h", "2026-11-22")


def test_pytest_without_files(read):
    case = only(read(DIALECTS["pytest-xunit2"]))
    assert (case.file, case.line, case.properties) == ("", None, (("key", "1"),))


def test_surefire(read):
    report = read(DIALECTS["surefire"])
    always, sometimes = cases(report)
    assert (always.outcome, always.flaky) == ("error", False)
    assert always.attempts == (Problem("error", "Always", "again", "java.lang.RuntimeException"),)
    assert "\tat example.ExampleTests.throwsAlways" in always.problems[0].text
    assert (sometimes.outcome, sometimes.flaky, sometimes.seconds) == ("passed", True, 1000.25)
    assert sometimes.attempts == (Problem("failure", "was 1", "once", "AssertionError"),)
    assert sometimes.out == "hello"
    assert report.suites[0].properties == (("java.version", "17"),)


def test_go(read):
    report = read(DIALECTS["go"])
    assert outcomes(report) == {"TestZ": "passed", "TestA": "failed"}
    assert cases(report)[1].problems[0].text == "file_test.go:11: Error message"


def test_jest(read):
    report = read(DIALECTS["jest"])
    assert [(case.classname, case.name, case.outcome) for case in cases(report)] == [
        ("adds", "adds", "passed"),
        ("adds", "adds", "passed"),
        ("broken", "(suite)", "error"),
    ]
    assert cases(report)[2].problems[0].message == "Cannot find module 'x'"


def test_googletest(read):
    report = read(DIALECTS["googletest"])
    assert outcomes(report) == {"Adds": "passed", "DISABLED_Slow": "skipped", "Breaks": "failed"}
    adds, _, breaks = cases(report)
    assert (adds.file, adds.line, adds.seconds) == ("math_test.cc", 7, 0.25)
    assert [problem.message for problem in breaks.problems] == ["one\ntwo", "three"]


def test_suites_in_suites(read):
    report = read(DIALECTS["nested"])
    assert [(suite.name, [case.name for case in suite.cases]) for suite in report.suites] == [
        ("outer / inner", ["t"]),
        ("outer", ["u"]),
    ]
    assert (cases(report)[0].classname, cases(report)[0].file) == ("outer / inner", "a.js")
    assert report.suites[1].out == "around"


@pytest.mark.parametrize(
    ("status", "outcome"),
    [("notrun", "skipped"), ("Disabled", "skipped"), ("failed", "failed"), ("run", "passed"), ("", "passed")],
)
def test_an_outcome_in_an_attribute(read, status, outcome):
    assert only(read(suite(f'<testcase name="a" status="{status}"/>'))).outcome == outcome


def test_a_disabled_element(read):
    assert only(read(suite('<testcase name="a"><disabled/></testcase>'))).outcome == "skipped"


# Attempts


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ("fp", [("passed", True, 1)]),
        ("ffp", [("passed", True, 2)]),
        ("ff", [("failed", False, 1)]),
        ("ef", [("error", False, 1)]),
        ("pp", [("passed", False, 0), ("passed", False, 0)]),
        ("pf", [("passed", False, 0), ("failed", False, 0)]),
        ("fpf", [("passed", True, 1), ("failed", False, 0)]),
        ("fs", [("failed", False, 0), ("skipped", False, 0)]),
        ("ss", [("skipped", False, 0), ("skipped", False, 0)]),
    ],
)
def test_entries_of_one_name(read, entries, expected):
    inner = {"p": "", "f": "<failure/>", "e": "<error/>", "s": "<skipped/>"}
    written = "".join(f'<testcase classname="c" name="n" time="1">{inner[one]}</testcase>' for one in entries)
    found = cases(read(suite(written)))
    assert [(case.outcome, case.flaky, len(case.attempts)) for case in found] == expected
    assert sum(case.seconds for case in found) == len(entries)


def test_same_name_in_another_class_or_file_is_another_test(read):
    report = read(
        suite(
            '<testcase name="n" classname="a"><failure/></testcase><testcase name="n" classname="b"/>'
            '<testcase name="n" classname="a" file="other"/>'
        )
    )
    assert [case.outcome for case in cases(report)] == ["failed", "passed", "passed"]


# Numbers


@pytest.mark.parametrize("text", ["nan", "inf", "-1", "1e999", "", "x", "1e10", "0x10", "1..2"])
def test_a_time_that_is_none(read, text):
    assert only(read(suite(f'<testcase name="a" time="{text}"/>'))).seconds == 0


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *[("1", 1), (" 0.5 ", 0.5), ("1,234.5", 1234.5), ("1e-3", 0.001), ("1,024", 1024)],
        *[("0,160", 0.16), ("12,5", 12.5), ("1,024.12", 1024.12), ("1.024,12", 1024.12)],
    ],
)
def test_a_time(read, text, seconds):
    assert only(read(suite(f'<testcase name="a" time="{text}"/>'))).seconds == seconds


@pytest.mark.parametrize(
    ("text", "line"), [("7", 7), ("0", None), ("-1", None), ("x", None), ("9" * 30, None)]
)
def test_a_line(read, text, line):
    assert only(read(suite(f'<testcase name="a" line="{text}"/>'))).line == line


def test_lines_of_our_own_files_count_from_1(read):
    mark = f'<properties><property name="{parsing.OUR_MARK}" value="generic"/></properties>'
    content = suite(f'{mark}<testcase name="a" line="3"/>', 'name="pytest"')
    assert only(read(content, ours=True)).line == 3
    assert only(read(content)).line == 4  # a branch does not say which files are ours


# What is not believed


def test_names_of_ours_are_not_believed(read):
    content = suite(
        '<properties><property name="microvm.verdict" value="passed"/><property name="a" value="b"/>'
        '</properties><testcase name="t"><properties><property name="microvm.outcome" value="passed"/>'
        "</properties></testcase>"
    )
    assert read(content).suites[0].properties == (("a", "b"),)
    assert only(read(content)).properties == ()
    assert only(read(content, ours=True)).properties == (("microvm.outcome", "passed"),)


def test_attachments_are_claims(read):
    case = only(
        read(
            suite(
                '<testcase name="t"><system-out>one\n[[ATTACHMENT|shot.png]]\nx [[ATTACHMENT|/etc/shadow]]'
                "</system-out><system-err>[[ATTACHMENT|/root/key]]</system-err></testcase>"
            )
        )
    )
    assert case.claims == ("shot.png", "/root/key")
    assert case.attachments == ()
    assert (case.out, case.err) == ("one\nx [[ATTACHMENT\\|/etc/shadow]]", "")


def test_text_can_neither_act_nor_hide(read):
    case = only(
        read(
            suite(
                '<testcase name="::error::\u202ex"><failure message="##[error]">::set-output::\u2066'
                "</failure></testcase>"
            )
        )
    )
    assert case.name == ":\\:error::\\u202ex"
    assert case.problems == (Problem("failure", "#\\#[error]", ":\\:set-output::\\u2066"),)


# Files that are written to do harm

BOMB = (
    '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY a "aaaaaaaaaa">'
    + "".join(f'<!ENTITY a{n} "{f"&a{n - 1 if n else str()};" * 10}">' for n in range(1, 10))
    + "]>"
    + suite('<testcase name="a">&a9;</testcase>')
)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (BOMB, "document type"),
        (f'<!DOCTYPE a SYSTEM "file:///etc/passwd">{suite("")}', "document type"),
        ("", "no element found"),
        ("nothing", "syntax error"),
        ("<html/>", "its root is <html>"),
        (b'<?xml version="1.0" encoding="utf-7"?><testsuite/>', "its encoding utf-7"),
        (b'<?xml version="1.0" encoding="antigravity"?><testsuite/>', "its encoding antigravity"),
        ("<testsuite>" * 100, "deeper"),
        (suite("&unknown;"), "undefined entity"),
        (b"\x00" * 1000, "not well-formed"),
    ],
    ids=range(10),
)
def test_refused_file_is_reported_with_its_reason(read, content, reason):
    assert reason in trouble(read(content))


def test_a_file_that_ends_too_early_keeps_what_it_has(read):
    report = read(
        '<testsuites><testsuite name="s"><testcase name="a"/><testcase name="b"><failure>x</failure><system'
    )
    assert trouble(report)
    assert [(case.name, case.outcome) for case in cases(report)][:2] == [("a", "passed"), ("b", "failed")]
    assert "2 of its tests are in this report" in cases(report)[2].problems[0].text


def test_a_file_that_is_too_large(read, monkeypatch):
    monkeypatch.setattr(reading, "FILE_LIMIT", 100)
    assert "at most 100" in trouble(read(suite("x" * 100)))


def test_too_many_tests(read, monkeypatch):
    monkeypatch.setattr(parsing, "CASE_LIMIT", 3)
    report = read(suite('<testcase name="a"/>' * 5))
    assert "more than 3 tests" in trouble(report)
    assert len(cases(report)) == 4


def test_too_many_elements(read, monkeypatch):
    monkeypatch.setattr(parsing, "_ELEMENT_LIMIT", 100)
    assert "more elements" in trouble(read(suite("<a/>" * 200)))


@pytest.mark.parametrize("part", ["<!-- {} -->", '<testcase name="{}"/>', "<testcase {}/>"], ids=range(3))
def test_a_tag_that_has_no_end(read, monkeypatch, part):
    monkeypatch.setattr(parsing, "_PART_LIMIT", 300_000)
    assert "a tag, or a comment, of more than 300,000" in trouble(read(suite(part.format("x" * 1_000_000))))


def test_a_long_text_is_no_tag(read, monkeypatch):
    monkeypatch.setattr(parsing, "_PART_LIMIT", 300_000)
    report = read(suite('<testcase name="a"><failure>' + "x" * 1_000_000 + "</failure></testcase>"))
    assert (report.trouble, only(report).problems[0].text) == ("", "x" * 1_000_000)


def test_what_is_no_file_of_its_own(tmp_path):
    (tmp_path / "link").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "fifo")
    assert trouble(read_report(tmp_path / "link"))
    assert "regular" in trouble(read_report(tmp_path / "fifo"))
    assert "directory" in trouble(read_report(tmp_path)).lower() or "regular" in read_report(tmp_path).trouble
    assert trouble(read_report(tmp_path / "nothing")) == "No such file or directory"


def test_much_in_one_test_is_bounded(read):
    case = only(
        read(
            suite(
                '<testcase name="a"><properties>'
                + '<property name="p" value="v"/>' * 5000
                + "</properties>"
                + "<failure/>" * 5000
                + "<flakyFailure/>" * 5000
                + "<system-out>[[ATTACHMENT|a]]</system-out>" * 5000
                + "</testcase>"
            )
        )
    )
    assert (len(case.problems), len(case.attempts), len(case.claims)) == (100, 100, 100)
    assert len(case.properties) == 1000


def test_many_attempts_are_bounded(read):
    case = only(read(suite('<testcase name="a"><failure/></testcase>' * 5000)))
    assert (case.outcome, len(case.problems), len(case.attempts)) == ("failed", 1, 100)


def test_cut_text_states_the_number_of_characters_left_out(read):
    report = read(suite(f'<testcase name="{"n" * 3000}"><failure>{"x" * 2_000_000}END</failure></testcase>'))
    case = only(report)
    assert "[... 2,000 characters left out]" in case.name
    assert "characters left out]" in case.problems[0].text
    assert case.problems[0].text.endswith("END")
    assert len(case.problems[0].text) < 1_100_000


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        (b"a\x1b[31mb", r"a\x1b[31mb"),
        (b"a&#27;b&#x1B;c", r"a\x1bb\x1bc"),
        (b"a&#xFFFF;b&#xD800;c&#x110000;", r"a\xffffb\xd800c\x110000"),
        (b"a\x00b", r"a\x00b"),
        (b"a\xffb", "a\ufffdb"),
        (b"a&#233;&#x1F600;b", "aé😀b"),
    ],
)
def test_what_xml_has_no_way_to_write(read, raw, shown):
    report = read(b'<testsuite><testcase name="t"><failure>' + raw + b"</failure></testcase></testsuite>")
    assert not report.trouble
    assert only(report).problems[0].text == shown


@pytest.mark.parametrize("cut", range(1, 8))
def test_a_reference_between_two_pieces(read, monkeypatch, cut):
    start = b'<testsuite><testcase name="t"><failure>'
    monkeypatch.setattr(reading, "_PIECE", len(start) + cut)
    report = read(start + b"a&#x1b;&lt;b</failure></testcase></testsuite>")
    assert only(report).problems[0].text == r"a\x1b<b"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1", "windows-1252", "us-ascii"])
def test_encodings(read, encoding):
    name = "utf-8" if encoding == "utf-8-sig" else encoding
    text = (
        f'<?xml version="1.0" encoding="{name}"?>{suite("<testcase name=" + chr(34) + "é" + chr(34) + "/>")}'
    )
    report = read(text.encode(encoding, "xmlcharrefreplace"))
    assert (report.trouble, only(report).name) == ("", "é")


@given(st.binary(max_size=300), st.sampled_from(list(DIALECTS)), st.integers(0, 3000))
def test_any_bytes_anywhere(tmp_path_factory, data, dialect, place):
    whole = DIALECTS[dialect].encode()
    path = tmp_path_factory.mktemp("any") / "x.xml"
    path.write_bytes(whole[:place] + data + whole[place:])
    report = read_report(path)
    assert all(isinstance(case, Case) and case.name and case.classname for case in cases(report))
    assert bool(report.trouble) == any(case.name == UNREADABLE for case in cases(report))


def test_a_nameless_test_without_result_did_not_finish(read):
    report = read(
        '<testsuites name="pytest tests"><testsuite name="pytest" tests="1">'
        '<testcase classname="t" name="a" time="0.01"/><testcase time="0.009"/></testsuite></testsuites>'
    )
    assert outcomes(report) == {"a": "passed", "(no name)": "error"}
    assert "did not finish" in cases(report)[1].problems[0].message


def test_a_nameless_test_with_a_result_keeps_it(read):
    assert only(read(suite("<testcase><skipped/></testcase>"))).outcome == "skipped"
