"""What tox recorded about an environment, compared with what it would install now."""

import os

import pytest
from tox.tox_env.errors import Fail
from tox.tox_env.python.pip.req_file import PythonConstraints, PythonDeps

from pytest_microvm.errors import UsageError
from pytest_microvm.tox import recorded
from pytest_microvm.tox.recorded import EnvironmentRecord

DEPS = {"options": [], "requirements": ["one==1.0"], "constraints": [], "env": {"PIP_PRE": "1"}}


def compare(old, new, section="PythonRun", sub="deps"):
    record = EnvironmentRecord({} if old is None else {section: {sub: old}}, UsageError)
    with record.compare(new, section, sub) as (same, found):
        assert same
        assert found == old


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (DEPS, {**DEPS, "env": {}}),  # of the computer, not of the configuration
        ({**DEPS, "redaction_format": 1}, DEPS),
        (["one"], {"req": ["one"], "env": {}}),  # an older tox
        (None, {"options": [], "requirements": [], "constraints": []}),
        (None, {"req": []}),
    ],
)
def test_same_installation_is_accepted(old, new):
    compare(old, new)


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        (DEPS, {**DEPS, "requirements": ["one==1.0", "two"]}, "deps: now also two"),
        (DEPS, {**DEPS, "requirements": []}, "deps: no longer one==1.0"),
        (DEPS, {**DEPS, "options": ["pre=True"]}, "deps: now also pre=True"),
        (DEPS, {**DEPS, "constraint_options": {"a": True}}, "deps: other options"),
        (DEPS, {**DEPS, "requirements": [f"a{i}" for i in range(9)]}, r"a0, .*a4, \.\.\.; no longer one"),
        ({"req": ["a" * 1000]}, {"req": []}, "deps: no longer a{120}$"),
        (None, DEPS, "deps: now also one==1.0"),
        ([{"a": []}], DEPS, "deps: now also one==1.0"),
        ("text", DEPS, "deps: now also one==1.0"),
        ({"requirements": [["one==1.0"]]}, DEPS, "deps: now also one==1.0"),
        ({"requirements": {"one==1.0": 1}}, DEPS, "deps: now also one==1.0"),
    ],
)  # fmt: skip
def test_other_installation_is_stale(old, new, why):
    with pytest.raises(UsageError, match=why):
        compare(old, new)


def test_section_that_is_no_table_is_stale():
    for section in ([], "text", 1, None):
        with (
            pytest.raises(UsageError, match="deps: now also one"),
            EnvironmentRecord({"PythonRun": section}, UsageError).compare(DEPS, "PythonRun", "deps"),
        ):
            pass


def read(root, text, kind=PythonDeps):
    file = kind(text, root)
    recorded._keep_inside(file, root)
    return file.unroll()


def test_included_files_of_the_project_are_read(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("one\n-r ../b.txt\n-c c.txt\n--pre\n")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbftwo \\\n  ==2\n")
    (tmp_path / "sub" / "c.txt").write_text("three<3\n")
    assert read(tmp_path, "-r sub/a.txt\nfour") == (["pre=True"], ["four", "one", "two==2", "-c three<3"])
    assert read(tmp_path, f"a; {'(' * 20_000}")[1] == [f"./a; {'(' * 20_000}"]  # tox takes it for a path
    assert read(tmp_path, "sub/c.txt", PythonConstraints) == ([], ["-c three<3"])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("-r ../a.txt", r"\.\./a\.txt is not in the project"),
        ("-r /etc/hostname", "is not in the project"),
        ("-r link.txt", "is a link, and links of a project are not followed"),
        ("-r pipe.txt", "is no regular file"),
        ("-r none.txt", "none.txt does not exist"),
        ("-r https://u:secret@example.com/r.txt", "a requirement file is at a URL, which is not fetched"),
        ("-r file:///etc/hostname", "a requirement file is at a URL"),
        ("-r many.txt", "more than 200 requirement files"),
        ("-r large.txt", r"has more than \d+ bytes"),
    ],
)
def test_other_included_files_are_not_read(tmp_path, text, why):
    project = tmp_path / "project"
    project.mkdir()
    (tmp_path / "a.txt").write_text("one\n")
    (project / "link.txt").symlink_to("../a.txt")
    os.mkfifo(project / "pipe.txt")
    (project / "many.txt").write_text("-r one.txt\n" * 300)
    (project / "one.txt").write_text("one\n")
    (project / "large.txt").write_text("# long\n" * 200_000)
    with pytest.raises(Fail, match=why) as failed:
        read(project, text)
    assert "secret" not in str(failed.value)
