"""The folder of running machines: nothing of another user at its name is used, and no link there followed."""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pytest_microvm.ci.cluster.connection import own_cluster
from pytest_microvm.ci.gitlab.held import HeldMachine
from pytest_microvm.errors import HostError
from pytest_microvm.templates.budget import HostBudget
from pytest_microvm.templates.runtime_folder import own_folder, runtime_folder

NOBODY = 65534


@pytest.fixture
def shared(monkeypatch, tmp_path):
    """A folder for temporary files that is everybody's, as /tmp is; pytest's own stays where it is."""
    folder = Path(tempfile.mkdtemp(prefix="microvm-test-"))
    folder.chmod(0o1777)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def name(shared):
    return shared / f"pytest-microvm-{os.getuid()}"


def as_nobody(*command):
    """Run a command as another user."""
    if os.getuid() != 0:
        pytest.skip("only root can act as another user")
    subprocess.run(command, user=NOBODY, group=NOBODY, extra_groups=[], check=True)


def users():
    return {"budget": lambda: HostBudget(runtime_folder(), 1, 1), "held": lambda: HeldMachine("k").end()}


@pytest.mark.parametrize("user", users())
def test_another_users_link_is_not_followed(shared, name, tmp_path, user):
    """What it leads to is ours: its owner says nothing."""
    as_nobody("ln", "-s", tmp_path, name)
    with pytest.raises(HostError, match="is a link"):
        users()[user]()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("user", users())
def test_another_users_folder_is_not_used(shared, name, user):
    as_nobody("mkdir", "-m", "777", name)
    with pytest.raises(HostError, match=f"belongs to another user \\(uid {NOBODY}\\)"):
        users()[user]()
    assert list(name.iterdir()) == []


def test_a_link_of_ones_own_is_not_followed(name, tmp_path):
    name.symlink_to(tmp_path)
    with pytest.raises(HostError, match="is a link") as caught:
        runtime_folder()
    assert "XDG_RUNTIME_DIR" in caught.value.resolution
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["machines", "held"])
def test_a_link_below_is_not_followed(name, tmp_path, place):
    (own_folder(name) / place).symlink_to(tmp_path)
    with pytest.raises(HostError, match="is a link"):
        users()["held" if place == "held" else "budget"]()
    assert list(tmp_path.iterdir()) == []


def test_a_file_at_the_name(name):
    name.touch()
    with pytest.raises(HostError, match="is no folder"):
        runtime_folder()


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_that_others_may_write_to(name, mode):
    name.mkdir()
    name.chmod(mode)
    with pytest.raises(HostError, match=f"written to by other users \\(mode {mode:o}\\)"):
        runtime_folder()


def test_a_folder_that_others_may_read_is_closed(name):
    name.mkdir()
    name.chmod(0o755)
    assert runtime_folder() == name
    assert stat.S_IMODE(name.stat().st_mode) == 0o700


def test_a_new_folder_is_closed(name):
    before = os.umask(0)
    try:
        HostBudget(runtime_folder(), 1, 1)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in (name, name / "machines")} == {0o700}


def test_a_folder_that_others_may_exchange(shared):
    shared.chmod(0o777)  # without the sticky bit
    with pytest.raises(HostError, match="everybody can change"):
        runtime_folder()


def test_xdg_runtime_dir(name, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert runtime_folder() == tmp_path / "pytest-microvm"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "missing"))
    assert runtime_folder() == name


def test_xdg_runtime_dir_of_another_user(shared, name, monkeypatch):
    """Left by sudo(8): its owner could exchange what is in it."""
    theirs = shared / "theirs"
    as_nobody("mkdir", "-m", "777", theirs)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(theirs))
    assert runtime_folder() == name


def test_dask_imports_nothing_of_another_user(shared, name):
    """Its own folder is on ``sys.path`` of scheduler and workers."""
    theirs = shared / "dask-scratch-space"
    as_nobody("mkdir", "-m", "777", theirs)
    with own_cluster(1) as client:
        paths = {*sys.path, *client.run(lambda: sys.path).popitem()[1]}
    assert {path.split("/")[3] for path in paths if path.startswith(str(shared))} == {name.name}
    assert list(theirs.iterdir()) == []
