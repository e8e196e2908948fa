"""Directories of the host in real machines: copied in and back, and handed over as git."""

import contextlib
import hashlib
import logging
import os
import shlex
import stat
import subprocess
import sys

import pytest

from pytest_microvm.errors import MachineCrashed, MountConflict, TransferError, UsageError
from pytest_microvm.settings.mounts import Changes
from support.repositories import git


@pytest.fixture(scope="module")
def vm(host):
    """One machine for all tests that mount something at a place of their own, and take it away again."""
    with host.start(image="base", timeout=300) as machine:
        yield machine


@pytest.fixture
def place(request):
    return "/mnt/" + hashlib.sha1(request.node.name.encode(), usedforsecurity=False).hexdigest()[:12]


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    (folder / "sub").mkdir(parents=True)
    (folder / "a").write_text("a\n")
    (folder / "sub" / "b").write_text("b\n")
    (folder / "script").write_text("#!/bin/sh\necho run\n")
    (folder / "script").chmod(0o755)
    (folder / "link").symlink_to("sub/b")
    (folder / "out").symlink_to("/usr/bin/env")
    return folder


def content(folder):
    """Every path below a directory: kind, mode, content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        kind = stat.S_IFMT(status.st_mode)
        what = str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(folder))] = (kind, stat.S_IMODE(status.st_mode), what)
    return found


def test_there_and_back(vm, place, source):
    with vm.mount(source, place) as mounted:
        assert vm.run([f"{place}/script"]).stdout == "run\n"
        assert vm.run(["stat", "-c", "%u:%g", f"{place}/a"]).stdout == "0:0\n"
        vm.run(
            f"cd {place}; echo new > new; echo A > a; rm -r sub; ln -s a there; chmod 600 script", check=True
        )
        changes = mounted.copy_back()
        assert changes == Changes(created=("new", "there"), changed=("a", "script"), deleted=("sub/b", "sub"))
        assert str(changes) == "2 created, 2 changed, 2 deleted"
        assert mounted.copy_back() == Changes()
        vm.run(f"echo again >> {place}/new", check=True)
    assert content(source) == {
        "a": (stat.S_IFREG, 0o644, b"A\n"),
        "link": (stat.S_IFLNK, 0o777, "sub/b"),
        "new": (stat.S_IFREG, 0o644, b"new\nagain\n"),
        "out": (stat.S_IFLNK, 0o777, "/usr/bin/env"),
        "script": (stat.S_IFREG, 0o600, b"#!/bin/sh\necho run\n"),
        "there": (stat.S_IFLNK, 0o777, "a"),
    }
    assert not vm.path(place).exists()
    assert [path.name for path in source.parent.iterdir()] == ["source"]
    assert vm.mounts == []


def test_read_only(vm, place, source):
    before = content(source)
    with vm.mount(source, place, "ro") as mounted:
        done = vm.run(f"cd {place} && cat a; echo A > a; rm sub/b; touch new")
        assert done.stdout == "a\n"
        assert done.stderr.count("Read-only file system") == 3
        assert mounted.copy_back() == Changes()
    assert content(source) == before
    assert not vm.path(place).exists()


def test_what_root_does_to_a_read_only_one_is_thrown_away(vm, place, source):
    before = content(source)
    mounted = vm.mount(source, place, "ro")
    vm.path(place)._ask("thaw")
    vm.run(f"echo A > {place}/a; rm -r {place}/sub", check=True)
    assert vm.copy_back() == [Changes()]
    assert content(source) == before
    vm.path(place)._ask("freeze")
    mounted.close()
    mounted.close()


def test_a_single_file(vm, place, tmp_path):
    (tmp_path / "one.conf").write_text("1")
    (tmp_path / "neighbour").write_text("untouched")
    with vm.mount(tmp_path / "one.conf", f"{place}/etc/app.conf"):
        vm.run(f"test $(cat {place}/etc/app.conf) = 1 && echo 2 > {place}/etc/app.conf", check=True)
    assert (tmp_path / "one.conf").read_text() == "2\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["neighbour", "one.conf"]
    assert not vm.path(place, "etc", "app.conf").exists()


def test_a_directory_that_is_missing(vm, place, tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        vm.mount(tmp_path / "none", place, "ro")
    with vm.mount(tmp_path / "out" / "put", place):
        vm.run(f"echo 1 > {place}/x", check=True)
    assert (tmp_path / "out" / "put" / "x").read_text() == "1\n"


def test_places_that_are_taken(vm, place, source):
    with pytest.raises(UsageError, match="something at /etc"):
        vm.mount(source, "/etc")
    with pytest.raises(UsageError, match="something at /etc/passwd"):
        vm.mount(source / "a", "/etc/passwd")
    vm.run(f"mkdir {place}-full && cd {place}-full && seq 10001 | xargs touch", check=True)
    with pytest.raises(UsageError, match="something at"):
        vm.mount(source, f"{place}-full")
    vm.run(["mkdir", place], check=True)
    with vm.mount(source, place), pytest.raises(UsageError, match="expected separate directories"):
        vm.mount(source / "sub", f"{place}/more")
    (source / ".git").mkdir()
    with pytest.raises(UsageError, match="git's own"):
        vm.mount(source / ".git", place)


def test_changed_on_both_sides(vm, place, source, caplog):
    mounted = vm.mount(source, place)
    vm.run(f"cd {place}; echo G > a; echo G > new; echo G > sub/b; rm script", check=True)
    (source / "a").write_text("H")
    (source / "new").write_text("H")
    (source / "script").unlink()
    with pytest.raises(MountConflict, match="2 of the changes") as caught:
        mounted.copy_back()
    assert caught.value.paths == ("a", "new")
    mine = f".microvm-{vm.id}"
    assert (source / "a").read_text() == (source / "new").read_text() == "H"
    assert (source / f"a{mine}").read_text() == (source / f"new{mine}").read_text() == "G\n"
    assert (source / "sub" / "b").read_text() == "G\n"
    assert mounted.copy_back() == Changes()  # told once
    mounted.close()
    assert vm.events[-1].kind != "crashed"
    assert any(event.kind == "copy_back" and "2 of the changes" in event.about for event in vm.events)


HOSTILE = r"""
cd {place}
ln -s /etc/passwd absolute; ln -s ../../.. up; ln -s sub/../../../x sideways; ln -sf /etc link
mkfifo pipe; mknod disk b 8 0
mkdir -p .git/hooks sub/.git; echo evil > .git/hooks/pre-commit; echo evil > sub/.git/config
ln a hard; truncate -s 5M holes; touch "$(printf 'a\nb')" "$(printf '\377')" "$(printf '\033[2J')"
chmod 6777 script
mkdir "$(head -c 255 /dev/zero | tr '\0' n)"; echo fine > fine
"""


def test_a_hostile_machine(vm, place, source, caplog):
    outside = content(source.parent)
    mounted = vm.mount(source, place)
    vm.run(HOSTILE.replace("{place}", place), check=True)
    with caplog.at_level(logging.WARNING), pytest.raises(MountConflict) as caught:
        mounted.copy_back()
    assert sorted(caught.value.paths) == ["disk", "link", "pipe"]
    assert all(f"{name}: a link that may lead out" in caplog.text for name in ("absolute", "sideways", "up"))
    assert "\x1b" not in str(caught.value)
    names = {path.name for path in source.iterdir()}
    assert {"fine", "hard", "holes", "a\nb", os.fsdecode(b"\xff"), "\x1b[2J", "n" * 255} < names
    assert not names & {"absolute", "up", "sideways", "pipe", "disk", ".git"}
    assert str((source / "link").readlink()) == "sub/b"
    assert not (source / "sub" / ".git").exists()
    assert stat.S_IMODE((source / "script").stat().st_mode) == 0o755
    assert (source / "hard").stat().st_nlink == (source / "a").stat().st_nlink == 1
    assert (source / "holes").stat().st_size == 5 * 1024**2
    assert "git's own files" in caplog.text
    assert set(content(source.parent)) >= set(outside)
    assert mounted.copy_back() == Changes()  # told once
    mounted.close()


@pytest.mark.parametrize(
    "deed",
    [
        "rm -r {place}", "rm -r {place} && ln -s /etc {place}", "rm -r {place} && touch {place}",
        "rm -r {place} && mkfifo {place}",
    ],
)  # fmt: skip
def test_a_directory_that_is_none_any_more(vm, place, source, deed):
    before = content(source)
    mounted = vm.mount(source, place)
    vm.run(deed.replace("{place}", place), check=True)
    with pytest.raises(TransferError, match="no directory in the machine any more"):
        mounted.copy_back()
    assert content(source) == before
    vm.run(["rm", "-rf", place], check=True)
    mounted.close()


def test_a_file_full_of_holes(vm, place, source):
    before = content(source)
    mounted = vm.mount(source, place)
    vm.run(["truncate", "-s", "200G", f"{place}/holes"], check=True)
    with pytest.raises(TransferError, match="bytes"):
        mounted.copy_back()
    assert content(source) == before
    assert [path.name for path in source.parent.iterdir()] == ["source"]
    mounted.close()


def test_a_source_that_was_replaced_by_a_link(vm, place, source):
    (source.parent / "elsewhere").mkdir()
    mounted = vm.mount(source, place)
    vm.run(f"echo G > {place}/a", check=True)
    source.rename(source.parent / "moved")
    source.symlink_to("elsewhere")
    with pytest.raises(TransferError, match="not what it was"):
        mounted.copy_back()
    assert list((source.parent / "elsewhere").iterdir()) == []
    mounted.close()


def test_a_source_behind_a_link(vm, place, source):
    (source.parent / "link").symlink_to("source")
    with vm.mount(source.parent / "link", place):
        vm.run(f"echo G > {place}/a", check=True)
    assert (source / "a").read_text() == "G\n"


def test_where_nothing_may_be_written_beside(vm, place, source):
    """Another file system: what is received lies within it until it is whole."""
    folder = source.parent / "shm"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], check=False, capture_output=True).returncode:
        pytest.skip("may not mount")
    try:
        with vm.mount(folder, place):
            vm.run(f"echo 1 > {place}/x", check=True)
        assert [path.name for path in folder.iterdir()] == ["x"]
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_machine_that_does_not_let_go_of_its_copy(vm, place, source):
    mounted = vm.mount(source, place)
    vm.path(place)._ask("freeze")
    with pytest.raises(TransferError, match=place):
        mounted.close()
    assert mounted not in vm.mounts
    assert (source / "a").read_text() == "a\n"
    vm.path(place)._ask("thaw")


def test_at_the_end_of_the_machine(host, tmp_path, caplog):
    with host.start(image="base", timeout=300) as machine:
        machine.mount(tmp_path / "out", "/out")
        machine.run("echo 1 > /out/x", check=True)
    assert (tmp_path / "out" / "x").read_text() == "1\n"
    with contextlib.suppress(RuntimeError), host.start(image="base", timeout=300) as machine:
        machine.mount(tmp_path / "out", "/out")
        machine.run("echo 2 > /out/x; echo 3 > /out/y", check=True)
        (tmp_path / "out" / "x").write_text("H")
        raise RuntimeError("more to the point than a conflict")
    assert (tmp_path / "out" / "y").read_text() == "3\n"
    assert (tmp_path / "out" / "x").read_text() == "H"
    assert "1 of the changes" in caplog.text


def test_of_a_machine_that_crashed_nothing_comes_back(host, tmp_path, caplog):
    with host.start(image="base", timeout=300) as machine:
        mounted = machine.mount(tmp_path / "out", "/out")
        machine.run("echo 1 > /out/x", check=True)
        with pytest.raises(MachineCrashed):
            machine.run("echo b > /proc/sysrq-trigger; sleep 60")
        with pytest.raises(MachineCrashed):
            mounted.copy_back()
    assert list((tmp_path / "out").iterdir()) == []
    assert "nothing came back of /out" in caplog.text


MEASURED = """
import os, resource, sys
from pathlib import Path
from pytest_microvm import MicroVM

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

source = Path(sys.argv[1])
with MicroVM.start(image="base", disk="2G") as machine:
    with machine.mount(source, "/warm-up"):
        machine.run("echo 1 > /warm-up/x", check=True)
    (source / "big").write_bytes(b"")
    with (source / "big").open("wb") as file:
        for _ in range(64):
            file.write(os.urandom(1024 * 1024))
    before = peak()
    with machine.mount(source, "/data"):
        machine.run("cp /data/big /data/copy", check=True)
    print(peak() - before)
"""


@pytest.mark.thorough
def test_the_host_s_memory_does_not_grow_with_the_files(tmp_path):
    (tmp_path / "source").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, tmp_path / "source"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 24 * 1024**2
    assert (tmp_path / "source" / "big").read_bytes() == (tmp_path / "source" / "copy").read_bytes()


# git


@pytest.fixture(scope="module")
def agent(host):
    with host.start(image="agent", timeout=300) as machine:
        yield machine


@pytest.fixture
def repository(tmp_path):
    """A repository with a remote that names a password, a hook, a stash, and work that is not committed."""
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "trunk")
    (folder / "a").write_text("a\n")
    (folder / "sub").mkdir()
    (folder / "sub" / "run").write_text("#!/bin/sh\n")
    (folder / "sub" / "run").chmod(0o755)
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    git(folder, "remote", "add", "origin", "https://user:hunter2@example.invalid/x")
    git(folder, "branch", "other")
    (folder / "a").write_text("stashed\n")
    git(folder, "stash")
    (folder / "a").write_text("dirty\n")
    (folder / "untracked").write_text("mine\n")
    (folder / ".git" / "hooks" / "pre-commit").write_text("#!/bin/sh\nexit 1\n")
    (folder / ".git" / "hooks" / "pre-commit").chmod(0o755)
    return folder


def untouched(folder):
    """All of the work tree, and of git's directory what is neither objects nor branches."""
    return {
        path: what
        for path, what in content(folder).items()
        if not path.startswith((".git/objects/", ".git/refs/heads/microvm", ".git/logs/refs/heads/microvm"))
    }


def in_guest(machine, place, script, **options):
    return machine.run(f"cd {shlex.quote(place)} && {{ {script}\n}}", check=True, **options)


def test_commits_come_back_as_a_branch(agent, place, repository):
    before = untouched(repository)
    mounted = agent.mount(repository, place, kind="git")
    assert in_guest(agent, place, "git status --porcelain; git branch; cat a").stdout == "* trunk\na\n"
    config = agent.path(place, ".git", "config").read_text()
    assert "hunter2" not in config
    assert "remote" not in config
    assert agent.run(["grep", "-rl", "hunter2", place]).stdout == ""
    assert agent.run(f"ls {place}/.git/hooks; git -C {place} stash list").stdout == ""
    in_guest(agent, place, "echo b > b; git add b; git commit -qm 'a \x1b[2Jsubject'; echo c > c; echo A > a")
    changes = mounted.copy_back()
    branch = f"microvm/{agent.id}"
    assert (changes.branch, changes.commits, changes.uncommitted) == (branch, 1, 2)
    assert changes.subjects == ("a \\x1b[2Jsubject",)
    assert git(repository, "show", f"{branch}:b") == "b"
    assert git(repository, "log", "-1", "--format=%an <%ae>", branch) == (
        f"microvm {agent.id} <{agent.id}@microvm.invalid>"
    )
    assert mounted.copy_back() == changes  # nothing new
    in_guest(agent, place, "git commit -qam 'second'")
    assert mounted.copy_back().branch == branch
    assert git(repository, "rev-list", "--count", f"trunk..{branch}") == "2"
    in_guest(agent, place, "git reset -q --hard HEAD~1; git commit -q --allow-empty -m other")
    assert mounted.copy_back().branch == f"{branch}-2"
    assert git(repository, "rev-list", "--count", f"trunk..{branch}") == "2"
    assert untouched(repository) == before
    mounted.close()
    git(repository, "fsck", "--strict")


def test_a_clone_to_read(agent, place, repository):
    with agent.mount(repository, place, "ro", "git") as mounted:
        assert in_guest(agent, place, "git log --format=%s").stdout == "first\n"
        assert agent.run(f"cd {place} && git commit -q --allow-empty -m x").returncode
        assert mounted.copy_back() == Changes()
    assert git(repository, "branch", "--list", "microvm/*") == ""
    assert not agent.path(place).exists()


def test_a_secret_in_what_is_shown(host, repository, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("SECRET_OF_MOUNTS", "correct-horse")
    secret = {"KEY": {"env": "SECRET_OF_MOUNTS"}}
    with host.start(image="agent", timeout=300, secrets=secret) as machine:
        machine.mount(repository, "/repository", kind="git")
        in_guest(machine, "/repository", 'git commit -q --allow-empty -m "the key is $KEY"')
        machine.mount(tmp_path / "out", "/out")
        machine.run('ln -s /etc "/out/$KEY"', check=True)
        assert machine.mounts[0].copy_back().subjects == ("the key is ***",)
        with caplog.at_level(logging.WARNING):
            assert machine.mounts[1].copy_back().links == ("correct-horse",)
        assert "***: a link that may lead out" in caplog.text
        assert "correct-horse" not in caplog.text


def test_nothing_committed(agent, place, repository):
    with agent.mount(repository, place, kind="git") as mounted:
        in_guest(agent, place, "echo b > b")
        assert mounted.copy_back() == Changes(uncommitted=1)
    assert git(repository, "branch", "--list", "microvm/*") == ""


def test_clone_reset_to_its_parent_commit_makes_no_branch(agent, place, repository):
    git(repository, "commit", "-qnam", "second")
    with agent.mount(repository, place, kind="git") as mounted:
        in_guest(agent, place, "git reset -q --hard HEAD~1")
        assert mounted.copy_back() == Changes()
    assert git(repository, "branch", "--list", "microvm/*") == ""


def test_a_branch_of_that_name_stays(agent, place, repository):
    git(repository, "branch", f"microvm/{agent.id}", "trunk")
    with agent.mount(repository, place, kind="git") as mounted:
        in_guest(agent, place, "git commit -q --allow-empty -m x")
        assert mounted.copy_back().branch == f"microvm/{agent.id}-2"
    assert git(repository, "rev-parse", f"microvm/{agent.id}") == git(repository, "rev-parse", "trunk")


@pytest.mark.parametrize("kind", ["worktree", "bare", "detached", "shallow"])
def test_other_kinds_of_repositories(agent, place, repository, tmp_path, kind):
    source = tmp_path / kind
    if kind == "worktree":
        git(repository, "worktree", "add", "-q", "-b", "side", source)
        (source / "w").write_text("w")
        git(source, "add", "w")
        git(source, "commit", "-qnm", "w")
    elif kind == "bare":
        git(tmp_path, "clone", "-q", "--bare", repository, source)
    else:
        git(repository, "commit", "-qnam", "second")
        depth = ["--depth=1"] if kind == "shallow" else []
        git(tmp_path, "clone", "-q", *depth, f"file://{repository}", source)
        if kind == "detached":
            git(source, "checkout", "-q", "--detach", "HEAD~1")
    head = git(source, "rev-parse", "HEAD")
    with agent.mount(source, place, kind="git") as mounted:
        assert in_guest(agent, place, "git rev-parse HEAD").stdout.strip() == head
        in_guest(agent, place, "echo x > x; git add x; git commit -qm x")
        branch = mounted.copy_back().branch
    assert git(source, "show", f"{branch}:x") == "x"
    assert git(source, "rev-parse", f"{branch}^", "HEAD").split() == [head, head]


EVIL = r"""
cat > /tmp/trap <<'END'
#!/bin/sh
touch /tmp/sprung
cat
END
chmod +x /tmp/trap
mkdir -p .git/hooks
for hook in pre-commit post-checkout reference-transaction post-merge; do cp /tmp/trap .git/hooks/$hook; done
git config core.fsmonitor /tmp/trap
git config core.sshCommand /tmp/trap
git config core.hooksPath /tmp
git config filter.evil.clean /tmp/trap
git config filter.evil.smudge /tmp/trap
git config alias.bundle '!/tmp/trap'
git config diff.external /tmp/trap
printf '* filter=evil diff=evil\n' > .gitattributes
cp /tmp/trap payload
git add .; git commit -qnm evil
"""


def test_nothing_of_the_machine_s_is_run_on_the_host(agent, place, repository):
    before = untouched(repository)
    mounted = agent.mount(repository, place, kind="git")
    in_guest(agent, place, EVIL)
    branch = mounted.copy_back().branch
    assert untouched(repository) == before
    assert not os.path.lexists("/tmp/sprung")
    assert git(repository, "show", f"{branch}:.gitattributes") == "* filter=evil diff=evil"
    mounted.close()


FAKE_GIT = """#!/bin/sh
case "$*" in
  *rev-parse*) {rev_parse};;
  *status*) printf 'not a number'; exit 0;;
  *bundle*) {bundle};;
esac
"""
SOME = "echo 1111111111111111111111111111111111111111"


@pytest.mark.parametrize(
    ("rev_parse", "bundle", "message"),
    [
        ("echo ../../x", "true", "names no commit"),
        ("echo --upload-pack=x", "true", "names no commit"),
        ("head -c 100000 /dev/zero", "true", "names no commit"),
        ("echo oops >&2; exit 1", "true", "rev-parse failed"),
        (SOME, "exit 3", "bundle failed"),
        (SOME, "true", "cannot be read"),
        (SOME, "echo nonsense > $6", "no bundle"),
        (SOME, "ln -s /etc/passwd $6", "no bundle"),
        (SOME, "truncate -s 300G $6", "cannot be read"),
        (SOME, "mkdir $6", "cannot be read"),
        (SOME, r"printf '# v2 git bundle\n%s ../../x\n\nPACK' 1111111111111111111111111111111111111111 > $6",
         "other references"),
        (SOME, r"printf '# v2 git bundle\n%s HEAD\n\nPACK' 1111111111111111111111111111111111111111 > $6",
         "git does not accept"),
    ],
)  # fmt: skip
def test_a_git_that_lies(agent, place, repository, rev_parse, bundle, message):  # noqa: PLR0917 - a table
    before = content(repository)
    mounted = agent.mount(repository, place, kind="git")
    fake = agent.path("/usr/local/bin/git")
    fake.write_text(FAKE_GIT.replace("{rev_parse}", rev_parse).replace("{bundle}", bundle))
    fake.chmod(0o755)
    try:
        with pytest.raises(TransferError, match=message):
            mounted.copy_back()
    finally:
        fake.unlink()
    assert content(repository) == before
    mounted.close()


def test_a_machine_without_git(vm, place, repository):
    with pytest.raises(UsageError, match="image base has no git"):
        vm.mount(repository, place, kind="git")
    assert not vm.path(place).exists()
    assert vm.mounts == []


def test_what_is_no_repository(agent, place, repository, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no git repository"):
        agent.mount(tmp_path / "empty", place, kind="git")
    with pytest.raises(UsageError, match="within a repository"):
        agent.mount(repository / "sub", place, kind="git")
    with pytest.raises(UsageError, match="no directory"):
        agent.mount(tmp_path / "none", place, kind="git")
    git(tmp_path / "empty", "init", "-q")
    with pytest.raises(UsageError, match="no commit yet"):
        agent.mount(tmp_path / "empty", place, kind="git")
