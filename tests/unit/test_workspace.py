"""The workspace: what is copied, its digest, its tar."""

import io
import os
import tarfile

import pytest

from pytest_microvm.errors import UsageError
from pytest_microvm.suite.workspace import scan
from support.repositories import git


def paths(folder, **options):
    return [entry.path for entry in scan(folder, **options).entries]


def write(folder, **files):
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


@pytest.fixture
def project(tmp_path):
    folder = tmp_path / "project"
    folder.mkdir()
    write(folder, test_a_DOT_py="a", sub__b_DOT_txt="b", ignored_DOT_log="x", _DOT_gitignore="*.log\n")
    write(folder, cache_DOT_pyc="x")
    return folder


def test_without_git_everything_but_caches_is_copied(project):
    (project / "empty").mkdir()
    for name in (".venv", "__pycache__", ".tox", "node_modules", ".pytest_cache", ".git"):
        (project / name).mkdir()
        (project / name / "file").touch()
    (project / "env").mkdir()
    (project / "env" / "pyvenv.cfg").touch()
    (project / "link").symlink_to("sub")
    assert paths(project) == [".gitignore", "empty", "ignored.log", "link", "sub/b.txt", "test_a.py"]


def test_with_git_what_is_ignored_stays_here(project):
    git(project, "init")
    git(project, "add", "test_a.py")
    assert paths(project) == [".gitignore", "sub/b.txt", "test_a.py"]


def test_a_tracked_file_that_was_deleted_is_left_out(project):
    git(project, "init")
    git(project, "add", ".")
    (project / "test_a.py").unlink()
    assert paths(project) == [".gitignore", "sub/b.txt"]


def test_a_repository_inside_is_copied_by_its_own_rules(project):
    git(project, "init")
    git(project / "sub", "init")
    write(project / "sub", _DOT_gitignore="b.txt\n", c_DOT_txt="c")
    assert paths(project) == [".gitignore", "sub/.gitignore", "sub/c.txt", "test_a.py"]


def test_a_repository_cannot_run_a_program(project, tmp_path):
    git(project, "init")
    hook = tmp_path / "hook"
    hook.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    hook.chmod(0o755)
    git(project, "config", "core.fsmonitor", str(hook))
    paths(project)
    assert not (tmp_path / "ran").exists()


def test_digest_depends_on_content_mode_and_links_not_time(project):
    first = scan(project).digest()
    os.utime(project / "test_a.py", (1, 1))
    assert scan(project).digest() == first
    (project / "test_a.py").chmod(0o755)
    second = scan(project).digest()
    (project / "test_a.py").write_text("b")
    third = scan(project).digest()
    (project / "link").symlink_to("a")
    fourth = scan(project).digest()
    (project / "link").unlink()
    (project / "link").symlink_to("b")
    assert len({first, second, third, fourth, scan(project).digest()}) == 5


def test_the_same_files_make_the_same_tar(project):
    (project / "link").symlink_to("sub")
    os.utime(project / "test_a.py", (1, 1))
    tars = [io.BytesIO(), io.BytesIO()]
    for tar in tars:
        scan(project).write_tar(tar)
    assert tars[0].getvalue() == tars[1].getvalue()
    with tarfile.open(fileobj=io.BytesIO(tars[0].getvalue())) as archive:
        members = {member.name: member for member in archive}
        assert sorted(members) == paths(project)
        assert members["link"].linkname == "sub"
        assert members["test_a.py"].mtime == 1
        assert archive.extractfile("sub/b.txt").read() == b"b"
        assert {member.uid for member in members.values()} == {0}


def test_names_that_are_no_text_are_copied(project):
    (project / os.fsdecode(b"\xff.txt")).write_text("x")
    tar = io.BytesIO()
    workspace = scan(project)
    workspace.write_tar(tar)
    assert len(workspace.digest()) == 64
    tar.seek(0)
    with tarfile.open(fileobj=tar) as archive:
        assert os.fsdecode(b"\xff.txt") in archive.getnames()


def test_what_cannot_be_copied_is_left_out(project):
    os.mkfifo(project / "pipe")
    assert "pipe" not in paths(project)


@pytest.mark.parametrize("name", ["/", "/etc", "/tmp", "/nowhere/at/all"])
def test_a_system_directory_is_refused(name, tmp_path):
    with pytest.raises(UsageError, match="--rootdir"):
        scan(tmp_path.__class__(name))


def test_too_large_names_the_largest_file(project):
    (project / "big.bin").write_bytes(b"x" * 5000)
    with pytest.raises(UsageError, match=r"big\.bin") as caught:
        scan(project, limit=4096)
    assert ".gitignore" in str(caught.value)
