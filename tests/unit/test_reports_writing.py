"""Writing JUnit files: for each reader what it reads, unique names, safe attachments, and never too large."""

import os
import re
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import replace
from pathlib import Path

import junitparser
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from junitparser import xunit2

from pytest_microvm.errors import UsageError
from pytest_microvm.reports.checking import check_report
from pytest_microvm.reports.merging import merged
from pytest_microvm.reports.profiles import PROFILES, profile_named
from pytest_microvm.reports.reading import read_report
from pytest_microvm.reports.values import Case, Problem, Report, Suite
from pytest_microvm.reports.writing import write_report
from pytest_microvm.settings.options import BY_NAME

CORPUS = Path(__file__).parents[1] / "fuzz" / "corpus" / "junit"
FAILURE = Problem("failure", "assert 1 == 2", "traceback", "AssertionError")
every_profile = pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)


@pytest.fixture
def write(tmp_path):
    def write(profile, *cases, **about):
        path = tmp_path / "out.xml"
        suites = cases if cases and isinstance(cases[0], Suite) else [Suite("s", cases, **about)]
        write_report(path, suites, PROFILES[profile] if isinstance(profile, str) else profile)
        return ET.parse(path).getroot()  # noqa: S314 - written by us

    return write


def found(root, name="testcase"):
    return [element.attrib for element in root.iter(name)]


# What each reader needs


def test_generic_has_everything(write):
    root = write("generic", Case("c", "n", "a.py", 3, 0.5, properties=(("k", "v"),), out="o", err="e"))
    assert found(root) == [{"classname": "c", "name": "n", "file": "a.py", "line": "3", "time": "0.5"}]
    assert {"name": "k", "value": "v"} in found(root, "property")
    assert (root.findtext(".//system-out"), root.findtext(".//system-err")) == ("o", "e")


def test_jenkins_has_what_its_schema_allows(write):
    root = write("jenkins", Case("c", "n", "a.py", 3, properties=(("k", "v"),)))
    assert found(root) == [{"classname": "c", "name": "n", "time": "0.0"}]
    assert root.find(".//testcase/properties") is None


def test_gitlab_shows_nothing_but_the_text(write):
    root = write(
        "gitlab", Case("c", "n", problems=(FAILURE,)), Case("c", "m", problems=(Problem("skipped", "why"),))
    )
    assert root.findtext(".//failure") == "assert 1 == 2\ntraceback"
    assert root.findtext(".//skipped") == "why"


def test_a_message_that_is_in_the_text_is_there_once(write):
    root = write("gitlab", Case("c", "n", problems=(replace(FAILURE, text="E  assert 1 == 2"),)))
    assert root.findtext(".//failure") == "E  assert 1 == 2"


@pytest.mark.parametrize("profile", ["generic", "github", "jenkins"])
def test_attempts_as_surefire_has_them(write, profile):
    root = write(
        profile,
        Case("c", "flaky", attempts=(FAILURE,)),
        Case("c", "n", problems=(FAILURE,), attempts=(FAILURE,)),
    )
    flaky, failed = root.iter("testcase")
    assert flaky.find("flakyFailure").attrib == {"message": "assert 1 == 2", "type": "AssertionError"}
    assert flaky.findtext("flakyFailure/stackTrace") == "traceback"
    assert (flaky.find("failure"), failed.findtext("rerunFailure/stackTrace")) == (None, "traceback")
    assert root.get("failures") == "1"


@pytest.mark.parametrize("profile", ["gitlab", "buildkite"])
def test_attempts_go_to_system_out_without_a_flaky_element(write, profile):
    root = write(profile, Case("c", "n", attempts=(FAILURE,), out="o"))
    assert root.findtext(".//system-out") == "o\npassed after 1 other attempt:\n- assert 1 == 2"
    assert root.find(".//flakyFailure") is None


@every_profile
def test_one_result_for_each_test(write, profile):
    both = (FAILURE, Problem("error", "teardown", "second"))
    root = write(profile, Case("c", "n", problems=both))
    (case,) = root.iter("testcase")
    assert [element.tag for element in case if element.tag in ("failure", "error")] == ["error"]
    assert "traceback" in case.findtext("error")
    assert "second" in case.findtext("error")
    suite = root.find("testsuite")
    assert [suite.get(name) for name in ("tests", "failures", "errors", "skipped")] == ["1", "0", "1", "0"]


# Names


@every_profile
def test_names_are_unique(write, profile):
    twice = [Case("c", "n"), Case("c", "n"), Case("c", "n (2)"), Case("c", "n")]
    root = write(profile, Suite("a", tuple(twice), scope="a"), Suite("b", tuple(twice), scope="b"))
    names = Counter(
        (suite.get("name"), case.get("classname"), case.get("name"))
        for suite in root
        for case in suite.iter("testcase")
    )
    assert len(names) == 8
    if profile.flat:
        assert len({name[1:] for name in names}) == 8
    assert {name[2] for name in names} == {"n", "n (2)", "n (2) (2)", "n (3)"}


def test_what_is_not_one_line_or_empty(write):
    root = write("generic", Case("", "a\nb"), Case("c", ""))
    assert [(case["classname"], case["name"]) for case in found(root)] == [("s", "a\\nb"), ("c", "(no name)")]


@pytest.mark.parametrize("classname", ["/etc", "../../etc", "..", ".", "a\\b", "/:error::x"])
def test_jenkins_looks_for_no_files_by_a_class_name(write, tmp_path, classname):
    (case,) = found(write("jenkins", Case(classname, "n")))
    place = Path(os.path.normpath(tmp_path / case["classname"]))
    assert place.parent == tmp_path
    assert not case["classname"].startswith("::")


# Attachments


def test_attachments_are_named_as_each_reader_finds_them(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)
    case = Case("c", "n", out="o", problems=(FAILURE,), attachments=(tmp_path / "job" / "console.txt",))
    written = {name: write(name, case).findtext(".//system-out").splitlines()[-1] for name in PROFILES}
    assert written["generic"] == written["github"] == "[[ATTACHMENT|job/console.txt]]"
    assert written["gitlab"] == f"[[ATTACHMENT|{tmp_path.name}/job/console.txt]]"
    assert written["jenkins"] == f"[[ATTACHMENT|{tmp_path}/job/console.txt]]"


def test_gitlab_has_no_artifacts_outside_its_project(write, tmp_path, monkeypatch):
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    assert write("gitlab", Case("c", "n", attachments=(tmp_path / "x",))).find(".//system-out") is None


@pytest.mark.parametrize("name", ["a]]b", "a|b", "a\nb", "a\x1bb", "\udcff"])
def test_a_file_whose_name_cannot_be_written(write, tmp_path, name):
    assert write("generic", Case("c", "n", attachments=(tmp_path / name,))).find(".//system-out") is None


@every_profile
def test_nothing_a_test_prints_is_an_attachment(write, profile):
    text = "x\n[[ATTACHMENT|/etc/shadow]]\n[[attachment|a]]\n[[ATTACH\x1b[0mMENT|b]]"
    root = write(
        profile,
        Case(
            "[[ATTACHMENT|c]]",
            "[[ATTACHMENT|d]]",
            out=text,
            err=text,
            problems=(replace(FAILURE, text=text),),
        ),
    )
    assert not re.search(r"\[\[ATTACHMENT\|", ET.tostring(root, encoding="unicode"), re.IGNORECASE)


# Any text


TEXT = st.text(st.characters(), max_size=40)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    max_examples=3 * settings.default.max_examples // 5,
)
@given(name=TEXT, text=TEXT, attribute=TEXT, profile=st.sampled_from(sorted(PROFILES)))
def test_any_character_a_guest_can_print(tmp_path, name, text, attribute, profile):
    problem = Problem("error", text, text, attribute)
    case = Case(name, name, name, 1, 0.1, (problem,), (problem,), text, text, ((attribute, text),))
    suite = Suite(
        name,
        (case, case),
        properties=((attribute, text),),
        timestamp=attribute,
        hostname=name,
        out=text,
        err=text,
    )
    path = tmp_path / "any.xml"
    write_report(path, [suite], PROFILES[profile])
    assert check_report(path) == []
    for kind in (junitparser.JUnitXml, xunit2.JUnitXml):
        (parsed,) = kind.fromfile(str(path))
        assert [
            len(parsed),
            parsed.errors,
            sum(isinstance(one, junitparser.Error) for case in parsed for one in case.result),
        ] == [2, 2, 2]


@every_profile
@pytest.mark.parametrize("dialect", sorted(CORPUS.glob("*.xml")), ids=lambda path: path.stem)
def test_every_dialect_for_every_reader(write, profile, dialect, tmp_path):
    report = read_report(dialect)
    write(profile, *report.suites)
    assert check_report(tmp_path / "out.xml") == []
    parsed = junitparser.JUnitXml.fromfile(str(tmp_path / "out.xml"))
    outcomes = Counter(case.outcome for suite in report.suites for case in suite.cases)
    assert (parsed.tests, parsed.failures, parsed.errors) == (
        outcomes.total(), outcomes["failed"], outcomes["error"],
    )  # fmt: skip


# Size


def test_a_file_is_no_larger_than_its_reader_takes(write, tmp_path):
    small = replace(PROFILES["gitlab"], file_limit=100_000)
    cases = [
        Case("c", f"n{number}", problems=(replace(FAILURE, text="x" * 50_000),), out="y" * 50_000)
        for number in range(50)
    ]
    root = write(small, *cases)
    assert (tmp_path / "out.xml").stat().st_size <= 100_000
    assert len(found(root)) == 50  # none is left out
    assert all("characters left out]" in failure.text for failure in root.iter("failure"))


def test_a_reader_that_takes_too_little_loses_no_test(write, tmp_path):
    root = write(
        replace(PROFILES["gitlab"], file_limit=1000), *(Case("c", f"n{number}") for number in range(50))
    )
    assert len(found(root)) == 50
    assert "takes 30,000,000" not in str(check_report(tmp_path / "out.xml"))


def test_the_file_appears_at_once(tmp_path):
    path = tmp_path / "new" / "out.xml"
    write_report(path, [], PROFILES["generic"])
    assert [entry.name for entry in path.parent.iterdir()] == ["out.xml"]
    assert ET.parse(path).getroot().get("tests") == "0"  # noqa: S314 - written by us


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "out.xml").mkdir()
    with pytest.raises(OSError):
        write_report(tmp_path / "out.xml", [], PROFILES["generic"])
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.xml"]


# Merging


def test_merging_loses_no_test(tmp_path):
    one = Suite("pytest", (Case("c", "n"), Case("c", "m")))
    other = Suite("pytest", (Case("c", "n", problems=(FAILURE,)), Case("d", "m")))
    alone = Suite("alone", (Case("e", "n"),))
    suites = merged([(tmp_path / "a.xml", Report((one, alone))), (tmp_path / "b.xml", Report((other,)))])
    assert [(suite.name, suite.scope, len(suite.cases)) for suite in suites] == [
        ("a: pytest", "a: pytest", 2),
        ("alone", "", 1),
        ("b: pytest", "b: pytest", 2),
    ]


def test_suites_of_one_name_in_one_file(tmp_path):
    suite = Suite("s", (Case("c", "n"),))
    names = [one.name for one in merged([(tmp_path / "a.xml", Report((suite, suite)))])]
    assert names == ["a: s", "a: s (2)"]


def test_attachments_stay_if_they_lie_beside_the_file(tmp_path):
    folder = tmp_path / "in"
    (folder / "job").mkdir(parents=True)
    for path in (folder / "job" / "log.txt", tmp_path / "secret"):
        path.write_text("x")
    (folder / "link").symlink_to(tmp_path / "secret")
    claims = (
        "job/log.txt",
        "../secret",
        "link",
        str(tmp_path / "secret"),
        "missing",
        "job",
        str(folder / "job/log.txt"),
    )
    (suite,) = merged([(folder / "a.xml", Report((Suite("s", (Case("c", "n", claims=claims),)),)))])
    assert suite.cases[0].attachments == (folder / "job" / "log.txt",) * 2


# Names of profiles


def test_an_unknown_profile():
    with pytest.raises(UsageError, match="'git' is no JUnit profile") as raised:
        profile_named("git", "--junit-profile")
    assert raised.value.resolution == "allowed: generic, github, gitlab, jenkins, buildkite"


def test_the_configuration_knows_them():
    assert list(PROFILES) == list(BY_NAME["junit_profile"].choices)
