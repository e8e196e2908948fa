"""What is written for each reader, against Jenkins' schema, which pytest's source distribution has."""

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import xmlschema

from pytest_microvm.reports.profiles import PROFILES
from pytest_microvm.reports.reading import read_report
from pytest_microvm.reports.values import Case, Problem, Suite
from pytest_microvm.reports.writing import write_report

CORPUS = Path(__file__).parents[1] / "fuzz" / "corpus" / "junit"
DIALECTS = sorted(CORPUS.glob("*.xml"))


@pytest.fixture(scope="module")
def schema(tmp_path_factory):
    folder = tmp_path_factory.mktemp("schema")
    wanted = f"pytest=={pytest.__version__}"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--no-binary",
        ":all:",
        wanted,
    ]
    subprocess.run([*command, "--dest", folder], check=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        (member,) = [member for member in tar if member.name.endswith("/junit-10.xsd")]
        content = tar.extractfile(member).read()
    (folder / "junit-10.xsd").write_bytes(content)
    return xmlschema.XMLSchema(folder / "junit-10.xsd")


def errors(schema, path):
    return [(error.path, error.reason) for error in schema.iter_errors(path)]


def everything():
    problem = Problem("error", "message", "text", "Type")
    return [
        Suite("empty"),
        Suite(
            "all",
            (
                Case(
                    "c",
                    "n",
                    "a.py",
                    3,
                    1234.5678,
                    (problem,),
                    (problem, Problem("failure")),
                    "o",
                    "e",
                    (("k", "v"),),
                ),
                Case("c", "flaky", attempts=(problem, Problem("failure", "m", "t"))),
                Case("c", "skip", problems=(Problem("skipped", "why"),), attachments=(Path("x.txt"),)),
            ),
            properties=(("k", "v"),),
            timestamp="2026-11-22T03:00:00+00:00",
            hostname="h",
            out="o",
            err="e",
        ),
    ]


def test_the_schema_refuses_what_it_does_not_know(schema, tmp_path):
    path = tmp_path / "bad.xml"
    path.write_text(
        '<testsuite name="s" tests="1" failures="0" errors="0"><testcase name="a" line="1"/></testsuite>'
    )
    assert errors(schema, path)


@pytest.mark.parametrize("path", [None, *DIALECTS], ids=lambda path: path.stem if path else "everything")
def test_jenkins(schema, tmp_path, path):
    suites = everything() if path is None else read_report(path).suites
    write_report(tmp_path / "out.xml", suites, PROFILES["jenkins"])
    assert errors(schema, tmp_path / "out.xml") == []


@pytest.mark.parametrize("name", sorted(set(PROFILES) - {"jenkins"}))
def test_the_others_have_nothing_more_than_places_and_properties(schema, tmp_path, name):
    write_report(tmp_path / "out.xml", everything(), PROFILES[name])
    found = errors(schema, tmp_path / "out.xml")
    assert found  # `file` and `line` are not in it
    for _path, reason in found:
        assert (
            "'file' attribute not allowed" in reason
            or "'line' attribute not allowed" in reason
            or "properties" in reason
        )
