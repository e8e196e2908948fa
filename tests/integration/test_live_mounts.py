"""Live mounts in real machines: one directory, used by programs of the host and of machines at once."""

import contextlib
import hashlib
import os
import re
import stat
import subprocess
import tarfile
import threading
import time
from pathlib import Path

import pytest

from pytest_microvm.errors import MachineCrashed, TransferError, UsageError
from pytest_microvm.mounts.live import lock
from pytest_microvm.settings.mounts import Changes
from support import guards
from support.commands import MICROVM, PYTEST
from support.repositories import git


@pytest.fixture(scope="module")
def vm(host):
    """One machine for all tests that mount something at a place of their own, and take it away again."""
    with host.start(image="base", timeout=guards.MACHINE) as machine:
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
    return folder


def descriptors_into(folder):
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one by which the folder is read
            found.append(str(link.readlink()))
    return [path for path in found if path.startswith(str(folder))]


def until(condition):
    deadline = time.monotonic() + guards.MACHINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def command(folder, *arguments):
    return subprocess.run(
        [*MICROVM, *arguments],
        cwd=folder,
        timeout=guards.MACHINE,
        check=False,
        capture_output=True,
        text=True,
    )


def test_both_sides_see_the_same(vm, place, source):
    with vm.mount(source, place, kind="live") as mounted:
        assert vm.run(f"cat {place}/a {place}/sub/b").stdout == "a\nb\n"
        assert vm.run(f"stat -c '%u:%g %a' {place}/a").stdout == "0:0 644\n"
        (source / "fresh").write_text("from the host\n")
        assert vm.run(f"cat {place}/fresh").stdout == "from the host\n"
        vm.run(
            f"cd {place}; mkdir -p d/e; echo new > d/e/f; mv a d; ln -s ../d/a sub/link; rm sub/b", check=True
        )
        assert (source / "d" / "e" / "f").read_text() == "new\n"
        assert (source / "sub" / "link").read_text() == "a\n"
        assert not (source / "sub" / "b").exists()
        (source / "d" / "a").write_text("much longer\n")
        until(lambda: vm.run(f"cat {place}/d/a").stdout == "much longer\n")
        assert mounted.copy_back() == Changes()
    assert vm.mounts == []
    assert not vm.path(place).exists()
    assert (source / "d" / "e" / "f").read_text() == "new\n"
    assert descriptors_into(source) == []


def test_a_program_that_runs_sees_what_the_host_does(vm, place, source):
    with (
        vm.mount(source, place, kind="live"),
        vm.popen(
            f"cd {place}; until [ -e go ]; do sleep 0.1; done; echo went > answer;"
            "while [ -e go ]; do sleep 0.1; done"
        ) as process,
    ):
        (source / "go").touch()
        until(lambda: (source / "answer").exists() and (source / "answer").read_text() == "went\n")
        (source / "go").unlink()
        assert process.wait(timeout=guards.MACHINE) == 0


def test_read_only(vm, place, source):
    with vm.mount(source, place, "ro", "live"):
        done = vm.run(f"cd {place} && cat a; echo A > a; rm sub/b; touch new")
        assert done.stdout == "a\n"
        assert done.stderr.count("Read-only file system") == 3
        # root may lift what its own kernel refuses; the host refuses it all the same
        remount = (
            "import ctypes, sys; print(ctypes.CDLL(None).mount(None, sys.argv[1].encode(), None, 32, None))"
        )
        again = [*runtime(vm), "-c", remount, place]
        assert vm.run(again, check=True).stdout == "0\n"
        assert "Read-only file system" in vm.run(f"echo A > {place}/a").stderr
        assert "Read-only file system" in vm.run(f"rm {place}/sub/b").stderr
    assert (source / "a").read_text() == "a\n"
    assert (source / "sub" / "b").read_text() == "b\n"


def runtime(vm):
    """The agent's own Python, for an image that has none."""
    root = "/run/microvm/runtime"
    loader = vm.run(f"echo {root}/lib64/ld-linux-*").stdout.strip()
    return [loader, "--library-path", f"{root}/lib", f"{root}/bin/python3", "-I", "-S"]


@pytest.mark.thorough
def test_many_files_and_a_large_one(vm, place, source, tmp_path):
    tree = tmp_path / "tree"
    for number in range(200):
        path = tree / f"d{number % 7}" / f"f{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(number * 37))
    (tree / "large").write_bytes(os.urandom(5_000_003))
    with tarfile.open(source / "tree.tar", "w") as archive:
        archive.add(tree, "tree")
    with vm.mount(source, place, kind="live"):
        vm.run(f"cd {place} && tar -x --no-same-owner -f tree.tar && cp -r tree copy", check=True)
        sums = vm.run(f"cd {place}/copy && find . -type f -exec sha256sum {{}} +", check=True).stdout
    expected = {
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  ./{path.relative_to(tree)}"
        for path in tree.rglob("*")
        if path.is_file()
    }
    assert set(sums.splitlines()) == expected
    assert subprocess.run(["diff", "-r", tree, source / "copy"], check=False).returncode == 0


def test_an_attacker_stays_inside(vm, place, source, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("secret")
    (source / "out").symlink_to(tmp_path / "outside")
    git(source, "init", "-q")
    hook = (source / ".git" / "config").read_text()
    with vm.mount(source, place, kind="live"):
        done = vm.run(
            f"cd {place}; cat out/secret; echo x > out/new;"
            f"ln -s {tmp_path}/outside evil; ln -s ../outside evil;"
            "mkdir -p d/e; ln -s ../../a d/e/up; mv d/e/up up; mv d/e e;"
            "echo evil > .git/hooks/post-checkout; echo evil >> .git/config;"
            "ln .git/config c; mkdir sub/.git;"
            "mkfifo pipe; mknod device c 1 3; chmod 4777 a; chown 1000 a; ls -la"
        )
        assert done.stderr.count("Operation not permitted") >= 10, done.stderr
        assert "secret" not in done.stdout.replace("outside", "")
    assert (tmp_path / "outside" / "secret").read_text() == "secret"
    assert [path.name for path in (tmp_path / "outside").iterdir()] == ["secret"]
    assert (source / ".git" / "config").read_text() == hook
    assert not (source / ".git" / "hooks" / "post-checkout").exists()
    for path in source.rglob("*"):
        assert not path.is_symlink() or path.name == "out" or path.resolve().is_relative_to(source)
        assert path.is_symlink() or path.is_dir() or path.is_file()
    assert stat.S_IMODE((source / "a").stat().st_mode) == 0o755
    assert (source / "a").stat().st_uid == os.getuid()


def test_files_of_a_cache_stay_as_they_were(vm, place, source, tmp_path):
    (tmp_path / "cache").mkdir()
    for name in ("appended", "emptied", "edited", "run", "again"):
        (tmp_path / "cache" / name).write_text("cached\n")
        os.link(tmp_path / "cache" / name, source / name)
    with vm.mount(source, place, kind="live"):
        vm.run(
            f"cd {place}; echo more >> appended; : > emptied; sed -i s/cached/changed/ edited; chmod 755 run;"
            "ln again another; echo more >> another",
            check=True,
        )
    for path in (tmp_path / "cache").iterdir():
        assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("cached\n", 0o644)
        assert path.stat().st_nlink == 1
    for name in ("appended", "again", "another"):
        assert (source / name).read_text() == "cached\nmore\n"
    assert ((source / "emptied").read_text(), (source / "edited").read_text()) == ("", "changed\n")
    assert stat.S_IMODE((source / "run").stat().st_mode) == 0o755


def test_links_that_lead_out_keep_their_names(vm, place, source, tmp_path):
    (tmp_path / "outside").mkdir()
    (source / "build").mkdir()
    (source / "sub" / "out").symlink_to(tmp_path / "outside")
    with vm.mount(source, place, kind="live"):
        done = vm.run(f"cd {place}; rmdir build; mv sub/out build; mv sub build; ln -s sub build; ls")
        assert done.stdout == "a\nsub\n"
        assert done.stderr.count("Operation not permitted") == 3, done.stderr
    assert sorted(path.name for path in source.iterdir()) == ["a", "sub"]


def test_unusable_lock_fails_writable_but_not_read_only_mounts(vm, place, source, tmp_path, monkeypatch):
    (tmp_path / "locks").write_text("no folder")
    monkeypatch.setattr(lock, "lock_file", lambda: tmp_path / "locks" / "live.lock")
    with pytest.raises(TransferError, match="its lock cannot be used"):
        vm.mount(source, place, kind="live")
    with vm.mount(source, place, "ro", "live"):
        assert vm.run(f"cat {place}/a").stdout == "a\n"
    assert descriptors_into(source) == []


def test_what_it_adds_is_limited_by_its_disk(host, source):
    with (
        host.start(image="base", disk="64M", timeout=guards.MACHINE) as vm,
        vm.mount(source, "/live", kind="live"),
    ):
        done = vm.run("dd if=/dev/zero of=/live/big bs=1M count=100; df -k --output=avail /live | tail -1")
        assert "Disk quota exceeded" in done.stderr
        assert int(done.stdout) < 64 * 1024
        assert (source / "big").stat().st_size <= 64 * 1024**2
        vm.run("rm /live/big && echo again > /live/again", check=True)
    assert (source / "again").read_text() == "again\n"


def test_two_machines_work_in_one_directory(host, vm, place, source):
    with host.start(image="base", timeout=guards.MACHINE) as other:
        with vm.mount(source, place, kind="live"), other.mount(source, place, kind="live"):
            vm.run(f"echo one > {place}/one", check=True)
            other.run(f"cat {place}/one; echo two > {place}/two", check=True)
            until(lambda: vm.run(f"cat {place}/two").stdout == "two\n")
        with vm.mount(source, place, kind="live"):
            assert vm.run(f"cat {place}/one").stdout == "one\n"


def test_files_written_before_a_machine_crash_stay_on_the_host(host, source):
    machine = host.start(image="base", timeout=guards.MACHINE)
    machine.mount(source, "/live", kind="live")
    machine.run("echo kept > /live/kept", check=True)
    with pytest.raises(MachineCrashed):
        machine.run("echo b > /proc/sysrq-trigger; sleep 600")
    machine.close()
    assert (source / "kept").read_text() == "kept\n"
    until(lambda: not descriptors_into(source))
    until(lambda: not [each for each in threading.enumerate() if each.name.startswith("microvm-live")])


def test_a_machine_that_is_kept_lets_go_of_it(source):
    done = command(source, "run", "--keep", "--image", "base", "--mount", ".:/live:live", "--",
                   "sh", "-c", "cp /live/a /root/mine; echo kept > /live/kept")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (source / "kept").read_text() == "kept\n"
    name = re.search(r"kept: pytest-microvm shell (\S+)", done.stderr)[1]
    try:
        entered = command(source, "shell", name, "--", "sh", "-c", "cat /root/mine; ls -A /live")
        assert (entered.returncode, entered.stdout) == (0, "a\n"), entered.stderr
    finally:
        assert command(source, "rm", name).returncode == 0


def test_killed_network_process_fails_live_mounts_only(host, source):
    with host.start(image="base", timeout=guards.MACHINE) as machine:
        machine.mount(source, "/live", kind="live")
        machine.run("kill -9 $(grep -l microvm-network /proc/[0-9]*/comm | cut -d/ -f3)")
        until(lambda: "not connected" in machine.run("cat /live/a").stderr)
        with pytest.raises(TransferError, match="microvm-network"):
            machine.mount(source, "/other", kind="live")
        assert machine.run("echo still runs").stdout == "still runs\n"
    assert (source / "a").read_text() == "a\n"


def test_what_cannot_be_mounted(vm, place, source):
    with pytest.raises(UsageError, match="is a file"):
        vm.mount(source / "a", place, kind="live")
    with pytest.raises(UsageError, match="something at /etc"):
        vm.mount(source, "/etc", kind="live")
    with pytest.raises(UsageError, match="does not exist"):
        vm.mount(source / "none", place, "ro", "live")
    with vm.mount(source, place, kind="live"):
        with pytest.raises(TimeoutError, match="live mount"):
            vm.wait_for_port(f"{place}/socket", timeout=1)
        with pytest.raises(UsageError, match="expected separate directories"):
            vm.mount(source, f"{place}/more", kind="live")
    assert descriptors_into(source) == []


def test_run(source):
    done = command(source, "run", "--image", "base", "--mount", ".:/work:live", "--workdir", "/work", "--",
                   "sh", "-c", "cat a > made")  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (source / "made").read_text() == "a\n"


def test_tests_of_a_suite(source, tmp_path):
    (tmp_path / "test_live.py").write_text(
        "from pathlib import Path\n\n"
        "def test_one():\n    Path('/live/one').write_text(Path('/live/a').read_text() + 'one')\n\n"
        "def test_two():\n    assert Path('/live/one').read_text() == 'a\\none'\n"
    )
    suite = [*PYTEST, "-q", "--microvm"]
    done = subprocess.run(
        [*suite, "--microvm-mount", f"{source}:/live:live", "test_live.py"],
        cwd=tmp_path, timeout=guards.MACHINE, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
    assert (source / "one").read_text() == "a\none"
