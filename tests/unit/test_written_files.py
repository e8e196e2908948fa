"""What is written on the host goes where the user says, whatever links a project has."""

from pathlib import Path

import pytest

from pytest_microvm.errors import UsageError
from pytest_microvm.suite.backend import RemoteSettings
from pytest_microvm.suite.plan import artifacts_folder
from pytest_microvm.untrusted.nofollow import refuse_links


def settings(rootdir, written, **values):
    return RemoteSettings(values=values, rootdir=rootdir, written=written)


def test_a_folder_of_the_user_s_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = settings(tmp_path, None, artifacts="saved")
    assert artifacts_folder(Path("saved"), given) == tmp_path / "saved"
    assert artifacts_folder(None, settings(tmp_path, None)) is None


def test_a_project_may_name_one_below_its_own(tmp_path):
    assert artifacts_folder(Path("a/b"), settings(tmp_path, tmp_path)) == tmp_path / "a" / "b"


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x", "link/x", "link"])
def test_a_project_may_name_no_other(tmp_path, name):
    project, outside = tmp_path / "project", tmp_path / "outside"
    project.mkdir()
    outside.mkdir()
    (project / "link").symlink_to(outside)
    with pytest.raises(UsageError, match=r"artifacts|is a link"):
        artifacts_folder(Path(name), settings(project, project))
    assert list(outside.iterdir()) == []


def test_launched_project_needs_a_reports_folder(tmp_path):
    with pytest.raises(UsageError, match="--microvm-reports=DIR"):
        artifacts_folder(Path("saved"), settings(tmp_path, None))
    reports = tmp_path / "reports"
    assert artifacts_folder(Path("saved"), settings(tmp_path, reports)) == reports / "saved"


def test_only_links_inside_the_project_are_refused(tmp_path):
    project, mine = tmp_path / "project", tmp_path / "mine"
    (project / "sub").mkdir(parents=True)
    mine.mkdir()
    (project / "sub" / "\x1b]0;x\x07").symlink_to(mine)
    (tmp_path / "my-link").symlink_to(mine)
    refuse_links(project, tmp_path / "my-link" / "report.xml")
    refuse_links(project, project / "sub" / "report.xml")
    with pytest.raises(UsageError, match="is a link of the project"):
        refuse_links(project, project / "sub" / "\x1b]0;x\x07" / "report.xml")
