"""``--microvm-junit-profile``: pytest's own JUnit file, made for who reads it."""

import xml.etree.ElementTree as ET

import pytest

from pytest_microvm.reports.checking import check_report

SUITE = """
    import os, pytest

    def test_passes():
        print("::error::x [[ATTACHMENT|/etc/passwd]]")

    class TestIt:
        @pytest.mark.parametrize("x", [1, "a b"])
        def test_each(self, x, record_property):
            record_property("key", "value")

    def test_fails():
        assert 1 == 2

    def test_dies(): os._exit(3)

    def test_skips(): pytest.skip("why")
"""


def report(project):
    """Return the last run's suite and its tests by name, once the file is checked."""
    path = project.path / "out.xml"
    assert check_report(path) == []
    suite = ET.parse(path).getroot().find("testsuite")  # noqa: S314 - checked
    return suite, {case.get("name"): case for case in suite.iter("testcase")}


@pytest.mark.parametrize("workers", [[], ["-n2"]], ids=["alone", "xdist"])
def test_gitlab(project, workers):
    project.write(tests__test_it=SUITE)
    result = project.microvm(
        "--junitxml=out.xml", "--microvm-junit-profile=gitlab", "--microvm-artifacts=kept", *workers
    )
    result.assert_outcomes(passed=3, failed=2, skipped=1)
    suite, cases = report(project)
    assert [suite.get(name) for name in ("tests", "failures", "errors", "skipped")] == ["6", "2", "0", "1"]
    places = {
        name: (case.get("classname"), case.get("file"), case.get("line")) for name, case in cases.items()
    }
    assert places == {
        "test_passes": ("tests.test_it", "tests/test_it.py", "3"),
        "test_each[1]": ("tests.test_it.TestIt", "tests/test_it.py", "7"),
        "test_each[a b]": ("tests.test_it.TestIt", "tests/test_it.py", "7"),
        "test_fails": ("tests.test_it", "tests/test_it.py", "11"),
        "test_dies": ("tests.test_it", "tests/test_it.py", "14"),
        "test_skips": ("tests.test_it", "tests/test_it.py", "16"),
    }
    assert "assert 1 == 2" in cases["test_fails"].findtext("failure")
    attached = cases["test_dies"].findtext("system-out").splitlines()[-1]
    assert attached.startswith("[[ATTACHMENT|kept/tests-test_it.py-test_dies-")
    assert (project.path / attached[len("[[ATTACHMENT|") : -2]).is_file()
    assert {prop.get("name") for prop in suite.find("properties")} >= {
        "microvm.image",
        "microvm.junit_profile",
    }


def test_the_configuration(project):
    project.write(
        test_it=SUITE,
        pyproject__DOT__toml="""
            [tool.pytest-microvm]
            junit_profile = "jenkins"
            [tool.pytest.ini_options]
            junit_logging = "all"
        """,
    )
    project.microvm("--junitxml=out.xml")
    _, cases = report(project)
    assert cases["test_each[1]"].attrib.keys() == {"name", "classname", "time"}
    assert "[[ATTACHMENT\\|/etc/passwd]]" in cases["test_passes"].findtext("system-out")
    project.microvm().assert_outcomes(passed=3, failed=2, skipped=1)  # no file was asked for


def test_properties_where_they_are_read(project):
    project.write(test_it="def test_it(record_property): record_property('key', 'value')")
    project.microvm("--junitxml=out.xml", "--microvm-junit-profile=generic")
    _, cases = report(project)
    found = {prop.get("name"): prop.get("value") for prop in cases["test_it"].iter("property")}
    assert found["key"] == "value"
    assert found["microvm.outcome"] == "passed"


def test_a_profile_without_a_file(project):
    project.write(test_it=SUITE)
    result = project.microvm("--microvm-junit-profile=gitlab")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        ["*for whom a JUnit file is, but none is written", "next step: add --junitxml=FILE"]
    )


def test_an_unknown_profile(project):
    project.write(test_it=SUITE)
    result = project.microvm("--junitxml=out.xml", "--microvm-junit-profile=travis")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        ["*invalid choice: 'travis' (choose from *generic*github*gitlab*jenkins*buildkite*)*"]
    )


def test_without_a_profile_it_is_as_pytest_writes_it(project):
    project.write(test_it=SUITE)
    project.microvm("--junitxml=out.xml")
    assert ET.parse(project.path / "out.xml").getroot().get("name") != "pytest-microvm"  # noqa: S314 - pytest's own
