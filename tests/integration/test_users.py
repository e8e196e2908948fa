"""Users of machines that are not root: their environment, their mounts, and what they cannot do."""

import logging
import os
import shlex
import stat
import subprocess

import pytest

from pytest_microvm.errors import MountConflict, TransferError, UsageError
from pytest_microvm.settings.mounts import Changes
from support import guards
from support.commands import MICROVM
from support.repositories import commit, git, repository

USER = "worker"


@pytest.fixture(scope="module")
def vm(host):
    """One machine with a user, for all tests."""
    with host.start(image="agent", timeout=guards.MACHINE) as machine:
        assert machine.user(USER, create=True).created
        yield machine


@pytest.fixture
def place(tmp_path):
    return f"/mnt/{tmp_path.name}"


@pytest.fixture
def source(tmp_path):
    folder = repository(tmp_path / "source")
    commit(folder, {"a": "a\n", "sub/b": "b\n"})
    (folder / "private").write_text("private\n")
    (folder / "private").chmod(0o600)
    return folder


def run(*arguments):
    return subprocess.run(
        [*MICROVM, "run", "--image", "agent", *arguments],
        capture_output=True, text=True, timeout=guards.MACHINE, check=False,
    )  # fmt: skip


def as_user(machine, script, **options):
    return machine.run(script, user=USER, check=True, **options).stdout


def owners(folder):
    return {(path.lstat().st_uid, path.lstat().st_gid) for path in [folder, *folder.rglob("*")]}


def test_run_with_a_user_that_the_image_lacks(tmp_path, source):
    secret = tmp_path / "key"
    secret.write_text("correct-horse-battery")
    (tmp_path / "out").mkdir()
    script = """
    echo $(id -un) $USER $LOGNAME $HOME $SHELL $PWD
    touch $HOME/file; mkdir ~/.config/tool/more; echo out > /dev/stderr; cat /run/secrets/KEY
    git status --porcelain; git log --format=%s; echo b > b; git add b; git commit -qm second
    echo data > /out/data; test -w /etc || echo no rights; rm ~/.config/tool/conf
    """
    done = run(
        "--user", "anna", "--mount", f"{source}:/home/anna/code:git", "--mount", f"{tmp_path / 'out'}:/out",
        "--push", f"{secret}:/home/anna/.config/tool/conf", "--secret", f"KEY=file:{secret},as=file",
        "--", "sh", "-ec", script,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == ("anna anna anna /home/anna /bin/bash /home/anna/code\n***more\nno rights\n")
    assert "the image has no user anna: made anna (uid 1000, home /home/anna)" in done.stderr
    assert "out\n" in done.stderr
    branch = git(source, "for-each-ref", "--format=%(refname:short)", "refs/heads/microvm")
    assert git(source, "log", "-1", "--format=%s", branch) == "second"
    assert (tmp_path / "out" / "data").read_text() == "data\n"
    assert owners(tmp_path / "out") == owners(source) == {(os.geteuid(), os.getegid())}


def test_run_with_a_number(tmp_path):
    done = run("--user", "4321", "--quiet", "--", "sh", "-c", "id; echo $HOME $PWD; touch ~/file")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("uid=4321(user4321) gid=4321(user4321) groups=4321(user4321)\n")
    assert done.stdout.endswith("/home/user4321 /home/user4321\n")


def test_run_with_names_that_cannot_be(tmp_path):
    done = run("--user", "no such", "--", "true")
    assert done.returncode == 4, done.stderr
    assert "user 'no such': the machine has no user 'no such', and none can be made" in done.stderr
    assert "Traceback" not in done.stderr


def test_unknown_owner_is_refused(vm, place, source):
    with pytest.raises(UsageError, match="no user 'mallory'"):
        vm.mount(source, place, owner="mallory")
    with pytest.raises(UsageError, match="no group 'mallory'"):
        vm.user(f"{USER}:mallory")
    assert not vm.path(place).exists()


def test_copy_belongs_to_its_user_and_comes_back_as_the_hosts(vm, place, source):
    with vm.mount(source, place, owner=USER) as mounted:
        script = f"cd {place}; cat private; git status --porcelain; stat -c %U . a sub sub/b"
        assert as_user(vm, script, env={"GIT_OPTIONAL_LOCKS": "0"}) == (
            f"private\n?? private\n{USER}\n{USER}\n{USER}\n{USER}\n"
        )
        as_user(vm, f"cd {place}; echo A > a; echo c > sub/c; rm sub/b; ln -s a link; chmod 6777 a")
        vm.run(f"cd {place}; echo r > from-root; chown 0:0 a; chmod 600 from-root", check=True)
        changes = mounted.copy_back()
    assert changes == Changes(created=("from-root", "link", "sub/c"), changed=("a",), deleted=("sub/b",))
    assert owners(source) == {(os.geteuid(), os.getegid())}
    assert stat.S_IMODE((source / "a").stat().st_mode) == 0o755
    assert (source / "from-root").read_text() == "r\n"


def test_single_file_and_read_only_copy(vm, place, source):
    with vm.mount(source / "private", f"{place}/one", owner=USER):
        as_user(vm, f"echo changed >> {place}/one")
    assert (source / "private").read_text() == "private\nchanged\n"
    with vm.mount(source, f"{place}-ro", "ro", owner=USER):
        done = vm.run(f"cd {place}-ro; cat private; git log --format=%s; echo A > a; rm a", user=USER)
        assert done.stdout == "private\nchanged\nmore\n"
        assert done.stderr.count("Read-only file system") == 2
    assert (source / "a").read_text() == "a\n"


def test_live_mount_belongs_to_its_user(vm, place, source):
    (source / "closed").mkdir(mode=0o700)
    with vm.mount(source, place, kind="live", owner=USER):
        said = vm.run(
            f"cd {place}; cat private; git log --format=%s; stat -c %U:%G . a closed; mkdir new; "
            "echo n > new/n; echo c > closed/c; chown $(id -u):$(id -g) a; echo A > a; chmod 4777 a; "
            "stat -c %U:%G new/n; chown 0 a; ln -s /etc out; true",
            user=USER,
        )
        assert said.stdout == "private\nmore\n" + f"{USER}:{USER}\n" * 4
        assert said.stderr.count("Operation not permitted") == 2
        vm.run(f"echo root > {place}/from-root", check=True)
        assert as_user(vm, f"stat -c %U {place}/from-root; rm {place}/from-root") == f"{USER}\n"
    assert (source / "a").read_text() == "A\n"
    assert stat.S_IMODE((source / "a").stat().st_mode) == 0o755
    assert owners(source) == {(os.geteuid(), os.getegid())}


def test_live_mount_of_root_is_closed_to_others(vm, place, source):
    with vm.mount(source, place, kind="live"):
        done = vm.run(f"cd {place}; cat private; echo A > a; touch new", user=USER)
    assert done.stdout == ""
    assert done.stderr.count("Permission denied") == 3
    assert not (source / "new").exists()


def test_commits_of_a_user_come_back(vm, place, source):
    with vm.mount(source, place, kind="git", owner=USER) as mounted:
        said = as_user(
            vm, f"cd {place}; git status --porcelain; echo b > b; git add b; git commit -qm second"
        )
        assert said == ""
        assert vm.run(
            ["git", "-C", place, "status"]
        ).returncode  # root's git does not trust another's repository
        changes = mounted.copy_back()
    assert (changes.commits, changes.subjects) == (1, ("second",))
    assert git(source, "show", f"{changes.branch}:b") == "b"


HOSTILE = """
cd {place}
printf '#!/bin/sh\\nid -u >> /tmp/{name}\\n' > /tmp/{name}.sh; chmod +x /tmp/{name}.sh
git config core.fsmonitor /tmp/{name}.sh
git config core.hooksPath /tmp
ln -s /etc/shadow .git/microvm.bundle
git -c core.fsmonitor= commit -q --allow-empty -m more
"""


def test_repository_of_a_user_runs_nothing_as_root(vm, place, source, tmp_path):
    mounted = vm.mount(source, place, kind="git", owner=USER)
    as_user(vm, HOSTILE.format(place=shlex.quote(place), name=tmp_path.name))
    shadow = vm.path("/etc/shadow").read_bytes()
    with pytest.raises(TransferError, match=r"microvm\.bundle"):
        mounted.copy_back()
    vm.run(["rm", f"{place}/.git/microvm.bundle"], check=True)
    assert mounted.copy_back().commits == 1
    assert set(vm.path(f"/tmp/{tmp_path.name}").read_text().split()) == {str(vm.user(USER).uid)}
    assert vm.path("/etc/shadow").read_bytes() == shadow
    mounted.close()


def test_user_cannot_do_what_root_can(vm, place, source):
    mounted = vm.mount(source, place, "ro", owner=USER)
    attempts = [
        f"umount {place}", f"mount -o remount,rw {place}", f"touch {place}/new", "touch /etc/new",
        "echo x >> /etc/passwd", "cat /etc/shadow", "touch /run/new", "echo b > /proc/sysrq-trigger",
        "cat /dev/vda", "cat /dev/virtio-ports/*", "head -c 1 /dev/fuse", "su -c id root </dev/null",
        "python3 -c 'import os; os.setuid(0)'", "kill -9 1", "mknod disk b 8 0", "ls /proc/1/fd",
    ]  # fmt: skip
    script = "; ".join(f"({each}) >/dev/null 2>&1 && echo {shlex.quote(each)}" for each in attempts)
    assert vm.run(f"cd /tmp; {script}; true", user=USER).stdout == ""
    assert vm.alive
    mounted.close()


def test_what_a_hostile_user_leaves_does_not_act_here(vm, place, tmp_path, caplog):
    mounted = vm.mount(tmp_path / "out", place, owner=USER)
    as_user(
        vm,
        f"cd {place}; cp /bin/true tool; chmod 6755 tool; ln -s /etc/passwd leads-out; mkfifo pipe; "
        "ln tool hard; mkdir -p .git/hooks; cp tool .git/hooks/pre-commit; echo fine > fine",
    )
    with caplog.at_level(logging.WARNING), pytest.raises(MountConflict) as caught:
        mounted.copy_back()
    assert caught.value.paths == ("pipe",)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["fine", "hard", "tool"]
    assert stat.S_IMODE((tmp_path / "out" / "tool").stat().st_mode) == 0o755
    assert owners(tmp_path / "out") == {(os.geteuid(), os.getegid())}
    mounted.close()
