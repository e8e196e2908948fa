"""Live mounts as a kernel uses them: this computer's own, with programs that know nothing of it."""

import contextlib
import errno
import mmap
import os
import shutil
import sqlite3
import stat
import time

import pytest

from pytest_microvm.mounts.live.session import MAX_HANDLES
from support.live_mounts import can_mount, mounted
from support.repositories import git

pytestmark = pytest.mark.skipif(
    not can_mount(), reason="mounting needs root and /dev/fuse; machines do it anyway"
)


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    (folder / "sub").mkdir(parents=True)
    (folder / "a").write_text("a\n")
    (folder / "sub" / "b").write_text("b\n")
    return folder


@pytest.fixture
def there(tmp_path, source):
    """The place where ``source`` is mounted."""
    place = tmp_path / "there"
    place.mkdir()
    with mounted(source, place):
        yield place


@pytest.fixture
def read_only(tmp_path, source):
    place = tmp_path / "read_only"
    place.mkdir()
    with mounted(source, place, writable=False):
        yield place


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def refused(number):
    @contextlib.contextmanager
    def check():
        with pytest.raises(OSError) as caught:
            yield
        assert caught.value.errno == number, caught.value

    return check()


def test_what_is_there(there, source):
    assert sorted(path.name for path in there.iterdir()) == ["a", "sub"]
    assert (there / "a").read_text() == "a\n"
    assert (there / "sub" / "b").read_text() == "b\n"
    status, real = (there / "a").stat(), (source / "a").stat()
    assert (status.st_size, status.st_mtime_ns, status.st_ino) == (2, real.st_mtime_ns, real.st_ino)
    assert (status.st_uid, status.st_gid) == (0, 0)


def test_what_is_made(there, source):
    (there / "new").mkdir()
    (there / "new" / "file").write_text("one\n")
    with (there / "new" / "file").open("a") as file:
        file.write("two\n")
    (there / "new" / "link").symlink_to("../a")
    os.link(there / "new" / "file", there / "other")
    assert (source / "new" / "file").read_text() == "one\ntwo\n"
    assert (source / "new" / "link").readlink() == (there / "new" / "link").readlink()
    assert (there / "new" / "link").read_text() == "a\n"
    assert (source / "other").stat().st_nlink == (there / "other").stat().st_nlink == 2


def test_what_is_moved_and_removed(there, source):
    (there / "a").rename(there / "sub" / "c")
    (there / "sub").rename(there / "below")
    assert (there / "below" / "c").read_text() == "a\n"
    (there / "x").write_text("x")
    (there / "below" / "b").replace(there / "x")
    assert (source / "x").read_text() == "b\n"
    with refused(errno.ENOTEMPTY):
        (there / "below").rmdir()
    shutil.rmtree(there / "below")
    assert names(source) == ["x"]


def test_a_large_file_and_parts_of_it(there, source):
    data = os.urandom(3_000_000)
    (there / "large").write_bytes(data)
    assert (source / "large").read_bytes() == data
    with (there / "large").open("r+b") as file:
        file.seek(1_500_001)
        file.write(b"here")
        file.truncate(2_000_000)
        file.seek(1_500_000)
        assert file.read(6) == data[1_500_000:1_500_001] + b"here" + data[1_500_005:1_500_006]
    assert (source / "large").stat().st_size == 2_000_000
    os.truncate(there / "large", 10)
    assert (source / "large").read_bytes() == data[:10]


def test_many_names_in_one_directory(there, source):
    for number in range(3000):
        (source / "sub" / f"name-{number:05}-{'x' * 60}").touch()
    assert names(there / "sub") == names(source / "sub")
    with os.scandir(there / "sub") as entries:
        assert {entry.is_file() for entry in entries} == {True}


def test_rights_and_times(there, source):
    (there / "a").chmod(0o777)
    assert stat.S_IMODE((source / "a").stat().st_mode) == 0o755
    (there / "a").chmod(0o4600)
    assert stat.S_IMODE((source / "a").stat().st_mode) == 0o600
    (there / "sub").chmod(0o2777)
    assert stat.S_IMODE((source / "sub").stat().st_mode) == 0o755
    os.utime(there / "a", (1_000_000_000, 1_234_567_890.5))
    assert (source / "a").stat().st_mtime == 1_234_567_890.5
    before = time.time()
    os.utime(there / "a")
    assert (source / "a").stat().st_mtime >= before - 1
    os.chown(there / "a", 0, 0)
    with refused(errno.EPERM):
        os.chown(there / "a", 1000, 1000)
    assert (source / "a").stat().st_uid == os.getuid()


def test_a_file_that_was_removed_while_open(there):
    with (there / "gone").open("w+") as file:
        (there / "gone").unlink()
        file.write("still here")
        file.flush()
        assert os.fstat(file.fileno()).st_size == 10
        file.seek(0)
        assert file.read() == "still here"
    assert not (there / "gone").exists()


def test_programs_that_ask_a_lot(there):
    with contextlib.closing(sqlite3.connect(there / "data.sqlite")) as database, database:
        database.execute("create table numbers (number)")
        database.executemany("insert into numbers values (?)", [(number,) for number in range(1000)])
        assert database.execute("select sum(number) from numbers").fetchone() == (499500,)
    with (there / "mapped").open("w+b") as file:
        file.truncate(10_000)
        with mmap.mmap(file.fileno(), 10_000) as memory:
            memory[5_000:5_005] = b"hello"
    assert (there / "mapped").read_bytes()[5_000:5_005] == b"hello"


def test_the_host_changes_what_is_there(there, source):
    assert (there / "a").read_text() == "a\n"
    (source / "a").write_text("longer than before\n")
    (source / "fresh").write_text("fresh")
    assert (there / "fresh").read_text() == "fresh"
    deadline = time.monotonic() + 60
    while (there / "a").read_text() != "longer than before\n":  # what the kernel knows holds for a second
        assert time.monotonic() < deadline
    (source / "sub").rename(source / "moved")
    assert (there / "moved" / "b").read_text() == "b\n"


def test_links_do_not_lead_out(there, source):
    (there / "d" / "e").mkdir(parents=True)
    for target in ("/etc/passwd", "..", "../..", "d/../..", "./..", "d/e/../../../x"):
        with refused(errno.EPERM):
            (there / "out").symlink_to(target)
    for target in ("../../..", "../../../a", "../e/.."):
        with refused(errno.EPERM):
            (there / "d" / "e" / "out").symlink_to(target)
    (there / "d" / "e" / "up").symlink_to("../..")
    (there / "d" / "e" / "a").symlink_to("../../a")
    assert (there / "d" / "e" / "a").read_text() == "a\n"
    with refused(errno.EPERM):  # nearer to the top they would lead out
        (there / "d" / "e" / "a").rename(there / "d" / "a")
    with refused(errno.EPERM):
        (there / "d" / "e").rename(there / "e")
    with refused(errno.EPERM):  # a hard link to a link, there
        os.link(there / "d" / "e" / "a", there / "a2", follow_symlinks=False)
    (there / "d" / "f").mkdir()
    (there / "d" / "e" / "a").rename(there / "d" / "f" / "a")
    assert (there / "d" / "f" / "a").read_text() == "a\n"


def test_links_of_the_host_are_not_followed_here(there, source, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("secret")
    names(there / "sub")  # the kernel knows it
    (source / "sub").rename(source / "old")
    (source / "sub").symlink_to(tmp_path / "outside")
    descriptor = os.open(there, os.O_PATH)
    try:
        deadline = time.monotonic() + 60
        while not stat.S_ISLNK(os.stat("sub", dir_fd=descriptor, follow_symlinks=False).st_mode):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # or stale
                assert "secret" not in names(there / "sub"), "of a directory that is a link by now"
            assert time.monotonic() < deadline
    finally:
        os.close(descriptor)
    assert (there / "sub").readlink() == tmp_path / "outside"


def test_git_s_own_files_are_read_and_never_written(there, source):
    git(source, "init", "-q")
    (source / "sub" / ".GIT").mkdir()
    assert (there / ".git" / "HEAD").read_text().startswith("ref:")
    hook, config = there / ".git" / "hooks" / "post-checkout", there / ".git" / "config"
    with refused(errno.EPERM):
        hook.write_text("#!/bin/sh\n")
    with refused(errno.EPERM):
        config.write_text("[core]\nfsmonitor = evil\n")
    with refused(errno.EPERM):
        config.open("a")
    with refused(errno.EPERM):
        os.truncate(config, 0)
    with refused(errno.EPERM):
        config.chmod(0o600)
    with refused(errno.EPERM):
        os.link(config, there / "config")
    with refused(errno.EPERM):
        (there / ".git").rename(there / "git")
    (there / "hooks").mkdir()
    with refused(errno.EPERM):
        (there / "hooks").rename(there / "sub" / ".git")
    with refused(errno.EPERM):
        (there / "sub" / ".GIT" / "config").write_text("x")
    for name in (".git", ".GiT", "git~1", ".git."):
        with refused(errno.EPERM):
            (there / "hooks" / name).mkdir()
        with refused(errno.EPERM):
            (there / "hooks" / name).symlink_to("x")
    (there / ".gitignore").write_text("build\n")
    git(source, "status")  # fails if the repository is damaged


def test_changed_files_are_separated_from_outside_hard_links(there, source, tmp_path):
    for name in ("appended", "emptied", "mapped", "run", "touched"):
        (tmp_path / name).write_text("as it was\n")
        os.link(tmp_path / name, source / name)
    before = {path: unchanging(path.stat()) for path in tmp_path.iterdir() if path.is_file()}
    with (there / "appended").open() as reading, (there / "appended").open("a") as file:
        assert reading.readline() == "as it was\n"
        file.write("and more\n")
        file.flush()
        assert reading.readline() == "and more\n"
        assert os.fstat(file.fileno()).st_size == (there / "appended").stat().st_size == 19
    (there / "emptied").write_text("new\n")
    with (there / "mapped").open("r+b") as file, mmap.mmap(file.fileno(), 9) as memory:
        assert memory[:2] == b"as"
        memory[:2] = b"AS"
    (there / "run").chmod(0o755)
    os.utime(there / "touched", (0, 0))
    assert (there / "appended").read_text() == (source / "appended").read_text() == "as it was\nand more\n"
    assert (there / "emptied").read_text() == "new\n"
    assert (source / "mapped").read_text() == "AS it was\n"
    assert stat.S_IMODE((source / "run").stat().st_mode) == 0o755
    assert (source / "touched").stat().st_mtime == 0
    for path, status in before.items():
        assert path.read_text() == "as it was\n"
        assert unchanging(path.stat()) == status


def unchanging(status):
    return status.st_mode, status.st_ino, status.st_uid, status.st_size, status.st_mtime_ns


def test_what_is_neither_file_nor_directory_is_not_there(there, source):
    os.mkfifo(source / "pipe")
    assert "pipe" not in names(there)
    with refused(errno.ENOENT):
        os.open(there / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with refused(errno.EPERM):
        os.mkfifo(there / "made")
    with refused(errno.EPERM):
        os.mknod(there / "device", stat.S_IFCHR | 0o600, os.makedev(1, 3))


def test_read_only(read_only, source):
    assert (read_only / "sub" / "b").read_text() == "b\n"
    with refused(errno.EROFS):
        (read_only / "a").write_text("x")
    for change in (
        (read_only / "new").touch,
        (read_only / "new").mkdir,
        lambda: (read_only / "new").symlink_to("a"),
        lambda: (read_only / "a").rename(read_only / "b"),
        (read_only / "a").unlink,
        lambda: (read_only / "a").chmod(0o600),
        lambda: os.utime(read_only / "a", (0, 0)),
        lambda: os.truncate(read_only / "a", 0),
        lambda: os.link(read_only / "a", read_only / "b"),
        lambda: read_only.chmod(0o700),
    ):
        with refused(errno.EROFS):
            change()
    assert (source / "a").read_text() == "a\n"
    assert names(source) == ["a", "sub"]


def test_growth_is_limited(tmp_path, source):
    place = tmp_path / "there"
    place.mkdir()
    (source / "old").write_bytes(bytes(500_000))
    with mounted(source, place, limit=1_000_000):
        with refused(errno.EDQUOT):
            (place / "large").write_bytes(bytes(2_000_000))
        assert (source / "large").stat().st_size < 1_000_000
        (place / "large").unlink()
        (place / "large").write_bytes(bytes(900_000))
        with refused(errno.EDQUOT):
            os.truncate(place / "large", 2**40)
        (place / "old").write_bytes(b"")  # room that was the host's
        (place / "more").write_bytes(bytes(400_000))
        (place / "large").unlink()
        (place / "more").unlink()
        with refused(errno.EDQUOT):
            for number in range(1000):
                (place / f"empty-{number}").touch()
        assert 200 < len(names(source)) < 500
        with refused(errno.EDQUOT):
            (place / "folder").mkdir()


def test_open_files_are_limited(there):
    with contextlib.ExitStack() as stack:
        for number in range(MAX_HANDLES):
            stack.enter_context((there / f"{number}").open("w"))
        with refused(errno.ENFILE):
            (there / "one-more").open("w")
        assert not (there / "one-more").exists()
    (there / "one-more").touch()


def test_names_that_are_no_text(there, source):
    name = os.fsdecode(b"caf\xe9\n\x1b[31m")
    (there / name).write_text("x")
    assert names(there) == names(source)
    assert name in names(source)
    with refused(errno.ENAMETOOLONG):
        (there / ("x" * 256)).touch()
