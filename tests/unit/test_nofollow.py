"""What is read of a project's tree: no link is followed, nothing hangs, whatever takes a file's place."""

import io
import os
import socket
import tarfile
from pathlib import Path

import pytest

from pytest_microvm.ci.definition.task import WORKTREE
from pytest_microvm.ci.sources.repository import CodeRepository
from pytest_microvm.ci.sources.work_tree import WorkTree
from pytest_microvm.cli.ci import _emptied
from pytest_microvm.errors import KitError, UsageError
from pytest_microvm.images.kits import load_kit
from pytest_microvm.settings.configuration import load_settings
from pytest_microvm.suite.workspace import scan
from pytest_microvm.tox.requirements import needed
from pytest_microvm.untrusted.nofollow import MAX_DEPTH, OpenTree, open_named, read_below, refuse_links
from support.repositories import commit, filled, git, repository

ELSEWHERE = "secret of another folder"


@pytest.fixture
def outside(tmp_path):
    folder = tmp_path / "outside"
    folder.mkdir()
    for name in ("secret.txt", "b.txt", "requirements.txt"):
        (folder / name).write_text(ELSEWHERE)
    (folder / "kit.toml").write_text('parent = "base"\n')
    return folder


@pytest.fixture
def project(tmp_path):
    folder = tmp_path / "project"
    (folder / "sub" / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("a")
    (folder / "sub" / "b.txt").write_text("b")
    (folder / "sub" / "deep" / "c.txt").write_text("c")
    return folder


# One by one


def test_files_links_and_folders_are_found(project, outside):
    (project / "link").symlink_to(outside)
    with OpenTree(project) as tree:
        for path in ("a.txt", "sub/b.txt", "sub/deep/c.txt", "sub/b.txt"):
            with tree.open(path) as file:
                assert file.read() == path.rpartition("/")[2][:1].encode()
        assert tree.names() == ["a.txt", "link", "sub"]
        assert tree.names("sub") == ["b.txt", "deep"]
        assert tree.target("link") == str(outside)
        assert tree.target("a.txt") is tree.target("nothing") is None
        assert tree.status("sub/b.txt").st_size == 1


@pytest.mark.parametrize("path", ["link/secret.txt", "file/x", "nothing/x", "nothing", "x" * 300])
def test_what_is_not_there_or_behind_a_link_is_nothing(project, outside, path):
    (project / "link").symlink_to(outside)
    (project / "file").touch()
    with OpenTree(project) as tree:
        assert tree.open(path) is tree.status(path) is tree.target(path) is None
        assert tree.names(path) == []


def test_what_is_no_file_is_not_opened(project, outside):
    (project / "link").symlink_to(outside / "secret.txt")
    os.mkfifo(project / "pipe")
    with socket.socket(socket.AF_UNIX) as listening, OpenTree(project) as tree:
        listening.bind(str(project / "socket"))
        for name in ("link", "pipe", "socket", "sub"):
            assert tree.open(name) is None


@pytest.mark.parametrize(
    "path", ["", ".", "..", "../outside/secret.txt", "sub/../a.txt", "/etc/passwd", "a\0"]
)
def test_paths_outside_the_tree_are_refused(project, path):
    with OpenTree(project) as tree, pytest.raises(UsageError, match="no path below"):
        tree.open(path)


def test_folders_without_end_are_refused(project):
    with OpenTree(project) as tree, pytest.raises(UsageError, match="inside each other"):
        tree.open("/".join(["x"] * (MAX_DEPTH + 2)))


def test_descriptors_are_closed(project):
    before = len([*Path("/proc/self/fd").iterdir()])
    for _round in range(3):
        with OpenTree(project) as tree:
            for path in ("sub/deep/c.txt", "a.txt", "sub/b.txt", "nothing/x", "a.txt/x"):
                if file := tree.open(path):
                    file.close()
    assert len([*Path("/proc/self/fd").iterdir()]) == before


def test_one_file_is_read_and_no_other(project, outside):
    assert read_below(project, "sub/b.txt", 1) == b"b"
    assert read_below(project, "sub/nothing", 1) is None
    assert read_below(project / "nothing", "a.txt", 1) is None
    (project / "link").symlink_to(outside)
    os.mkfifo(project / "pipe")
    for path, why in {
        "link": "link is a link",
        "link/secret.txt": "link is a link",
        "pipe": "regular",
    }.items():
        with pytest.raises(UsageError, match=why):
            read_below(project, path, 1000)
    with pytest.raises(UsageError, match="more than 0 bytes"):
        read_below(project, "a.txt", 0)


def test_a_named_file_may_be_behind_links_but_no_pipe(project, outside):
    (project / "link").symlink_to(outside)
    with open_named(project / "link" / "secret.txt") as file:
        assert file.read() == ELSEWHERE.encode()
    os.mkfifo(project / "pipe")
    with pytest.raises(OSError, match="no regular file"):
        open_named(project / "pipe")


# Workspaces: something else takes a place after the files were listed


def replace_by_link(project, outside):
    (project / "sub").rename(project.parent / "moved")
    (project / "sub").symlink_to(outside)


def replace_by_pipe(project, _outside):
    (project / "sub" / "b.txt").unlink()
    os.mkfifo(project / "sub" / "b.txt")


def replace_file_by_link(project, outside):
    (project / "sub" / "b.txt").unlink()
    (project / "sub" / "b.txt").symlink_to(outside / "secret.txt")


CHANGES = [replace_by_link, replace_by_pipe, replace_file_by_link]


@pytest.mark.parametrize("change", CHANGES)
def test_workspace_that_changes_leads_nowhere(project, outside, change):
    workspace = scan(project)
    gone = workspace.digest()
    change(project, outside)
    assert workspace.digest() != gone
    tar = io.BytesIO()
    workspace.write_tar(tar)
    assert ELSEWHERE.encode() not in tar.getvalue()
    with tarfile.open(fileobj=io.BytesIO(tar.getvalue())) as archive:
        assert "sub/b.txt" not in archive.getnames()
        assert archive.extractfile("a.txt").read() == b"a"


@pytest.mark.parametrize("change", CHANGES)
def test_work_tree_that_changes_leads_nowhere(project, outside, change):
    git(project, "init", "-q")
    tree = WorkTree(project)
    gone = tree.digest()
    change(project, outside)
    assert tree.digest() != gone
    assert "sub/b.txt" not in filled(tree)[0]


def test_links_of_a_project_are_copied_as_links(project, outside):
    (project / "folder").symlink_to(outside)
    (project / "file").symlink_to(outside / "secret.txt")
    (project / "broken").symlink_to("nowhere")
    for how in ("without git", "with git"):
        if how == "with git":
            git(project, "init", "-q")
        entries = {entry.path: entry.target for entry in scan(project).entries if entry.target}
        assert entries == {
            "folder": str(outside), "file": str(outside / "secret.txt"), "broken": "nowhere"
        }  # fmt: skip


def test_folder_that_may_not_be_read_is_left_out(project):
    (project / "closed").mkdir(mode=0)
    found = [entry.path for entry in scan(project).entries]
    assert {"a.txt", "sub/b.txt"} <= {*found}


# Configuration


def test_configuration_that_is_a_link_is_refused(project, outside):
    (outside / "pyproject.toml").write_text('[tool.pytest-microvm]\nisolation = "module"\n')
    (project / "pyproject.toml").symlink_to(outside / "pyproject.toml")
    with pytest.raises(UsageError, match="is a link"):
        load_settings(project, {})


def test_configuration_that_is_a_pipe_or_too_large_is_refused(project):
    os.mkfifo(project / "pyproject.toml")
    with pytest.raises(UsageError, match="no regular file"):
        load_settings(project, {})
    (project / "pyproject.toml").unlink()
    (project / "pyproject.toml").write_text("#" * (1024 * 1024 + 1))
    with pytest.raises(UsageError, match="more than"):
        load_settings(project, {})


def test_job_definition_of_a_work_tree_is_no_link(tmp_path, outside):
    folder = repository(tmp_path / "repository")
    commit(folder, {"folder/b": "b"})
    (folder / "link").symlink_to(outside)
    os.mkfifo(folder / "pipe")
    sources = CodeRepository(folder)
    assert sources.read(WORKTREE, "folder/b", 10) == b"b"
    for path in ("link/secret.txt", "link", "pipe"):
        assert sources.read(WORKTREE, path, 1000) is None


@pytest.mark.parametrize("part", ["requirements.txt", "folder/requirements.txt", "pipe", "."])
def test_requirement_file_that_is_no_file_is_refused(project, outside, part):
    (project / "requirements.txt").symlink_to("sub/b.txt")
    (project / "folder").symlink_to("sub")
    (project / "sub" / "requirements.txt").write_text("x")
    os.mkfifo(project / "pipe")
    with pytest.raises(UsageError, match=r"is a link|no regular file|no path below"):
        needed(["-r", part], project)


def test_ci_results_do_not_follow_a_link_of_the_project(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "microvm-ci").symlink_to("empty")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="is a link"):
        _emptied(Path("microvm-ci"), named=False)
    assert not [*(tmp_path / "empty").iterdir()]
    assert _emptied(Path("microvm-ci"), named=True)


# Kits


@pytest.fixture
def kits(project):
    kit = project / "microvm" / "kits" / "own"
    kit.mkdir(parents=True)
    (kit / "kit.toml").write_text('parent = "base"\nfiles = {"/x" = "sub/f"}\n')
    (kit / "sub").mkdir()
    (kit / "sub" / "f").write_text("f")
    return kit.parent


@pytest.mark.parametrize("part", ["own/kit.toml", "own", ".", ".."])
def test_kit_behind_a_link_is_no_kit_of_the_project(project, kits, part):
    place = Path(os.path.normpath(kits / part))
    assert load_kit("own", project=project).files[0].content() == b"f"
    place.rename(project.parent / "moved")
    place.symlink_to(project.parent / "moved")
    with pytest.raises(KitError, match="no kit 'own'"):
        load_kit("own", project=project)
    with pytest.raises(KitError, match="link"):
        load_kit("./microvm/kits/own", project=project)


@pytest.mark.parametrize("part", ["own/sub/f", "own/sub"])
def test_file_of_a_kit_is_not_behind_a_link(project, kits, part):
    kit = load_kit("own", project=project)
    (kits / part).rename(kits / "own" / "moved")
    (kits / part).symlink_to(kits / "own" / "moved")
    with pytest.raises(KitError, match="link"):
        load_kit("own", project=project)
    with pytest.raises(KitError, match="cannot be read") as caught:
        kit.recipe()
    assert "link" in caught.value.details


def test_file_of_a_kit_that_became_a_pipe_does_not_hang(project, kits):
    kit = load_kit("own", project=project)
    (kits / "own" / "sub" / "f").unlink()
    with pytest.raises(KitError, match="not there any more"):
        kit.recipe()
    os.mkfifo(kits / "own" / "sub" / "f")
    with pytest.raises(KitError, match="cannot be read"):
        kit.recipe()


def test_parent_of_a_kit_is_not_behind_a_link(project, kits, outside):
    (kits / "linked").symlink_to(outside)
    (kits / "own" / "kit.toml").write_text('parent = "../linked"\n')
    with pytest.raises(KitError, match="link"):
        load_kit("own", project=project)
    (kits / "linked").unlink()
    (kits / "linked").mkdir()
    (kits / "linked" / "kit.toml").write_text('parent = "base"\n')
    assert load_kit("own", project=project).suite


def test_kit_that_the_user_names_may_be_behind_a_link(project, outside):
    (project.parent / "shared").symlink_to(outside)
    assert load_kit("../shared", project=project).name == "outside"
    assert load_kit(project.parent / "shared", project=project).name == "outside"


@pytest.mark.parametrize(
    "named", ["led", "led/x", "led/../x", "sub/../led/x", "{project}/led", "{alias}/led"]
)
def test_named_path_through_project_link_is_refused(project, outside, tmp_path, named):
    (project / "led").symlink_to(outside)
    (tmp_path / "alias").symlink_to(project)
    path = named.format(project=project, alias=tmp_path / "alias")
    with pytest.raises(UsageError, match=r"is a link of the project to '.*outside'"):
        refuse_links(project, Path(path))


def test_named_path_through_users_own_link_is_taken(project, outside, tmp_path):
    (tmp_path / "alias").symlink_to(project)
    (tmp_path / "mine").symlink_to(outside)
    for path in ("a.txt", "new/x", "../mine/x", tmp_path / "mine", tmp_path / "alias" / "sub"):
        refuse_links(project, Path(path))
