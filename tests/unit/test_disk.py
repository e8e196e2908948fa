"""What the cache's disk refuses, in words."""

import errno
import multiprocessing
import os

import pytest

from pytest_microvm.cache.disk import explained, free_bytes, need_space
from pytest_microvm.errors import HostError, MachineCrashed, UsageError
from pytest_microvm.templates.store import TemplateStore

FORK = multiprocessing.get_context("fork")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full(tmp_path, number):
    with pytest.raises(HostError, match="the disk with the cache is full") as caught, explained(tmp_path):
        raise OSError(number, os.strerror(number))
    assert os.strerror(number) in caught.value.details
    assert "prune" in caught.value.resolution


def test_read_only(tmp_path):
    with pytest.raises(HostError, match="cannot be written") as caught, explained(tmp_path):
        raise OSError(errno.EROFS, "read-only")
    assert "PYTEST_MICROVM_CACHE" in caught.value.resolution


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "gone"), MachineCrashed("ended")])
def test_removed(tmp_path, error):
    with pytest.raises(HostError, match="removed while it was in use"), explained(tmp_path / "not-there"):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "something else"),
        PermissionError(errno.EACCES, "something else"),
        ConnectionResetError(errno.ECONNRESET, "reset"),
        MachineCrashed("ended"),
        UsageError("wrong"),
        KeyError("a mistake of ours"),
    ],
)
def test_what_is_no_matter_of_the_disk_stays_what_it_is(tmp_path, error):
    with pytest.raises(type(error)) as caught, explained(tmp_path):
        raise error
    assert caught.value is error


def test_space_is_that_of_the_folder_that_will_be(tmp_path):
    deep = tmp_path / "not" / "there" / "yet"
    assert abs(free_bytes(deep) - free_bytes(tmp_path)) < 1024**3
    need_space(deep, 1)
    with pytest.raises(HostError, match="the disk with the cache is full: only"):
        need_space(deep, 2**62)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_cache_of_another_user_is_reported_as_not_writable(tmp_path):
    store = TemplateStore(tmp_path / "cache", 2**40)
    with store.draft() as draft:
        (draft / "ram").write_bytes(b"x")
        store.publish("k1", draft, {"kind": "boot", "image": "base"})
    told = FORK.Queue()

    def look():
        os.chdir(tmp_path)  # which a stranger may not enter by its path
        tmp_path.chmod(0o755)
        os.setuid(65534)
        near = TemplateStore(tmp_path.relative_to(tmp_path) / "cache", 2**40)
        for ask in (near.new_draft, lambda: near.open("k1")):
            try:
                ask()
            except HostError as error:
                told.put(error.brief)

    process = FORK.Process(target=look)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert all("cannot be written" in told.get(timeout=10) for _ in range(2))
