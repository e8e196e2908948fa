"""Mounts whose machine, or whose host, fails in the middle."""

import contextlib
import errno
import os

import pytest

from pytest_microvm.agent.link import GuestError
from pytest_microvm.agent.transfer import as_os_error
from pytest_microvm.errors import MountConflict, TransferError, UsageError
from pytest_microvm.mounts import copying
from pytest_microvm.mounts import merging as takeover
from pytest_microvm.settings.mounts import Changes
from pytest_microvm.untrusted import manifest
from pytest_microvm.untrusted.redaction import Redactor

OPEN_STREAMS_TIMEOUT = 60  # seconds


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "a").write_text("a\n")
    return folder


@pytest.fixture
def failing(monkeypatch):
    """Let the machine answer, behind a whole archive of a place, that it could not read all of it."""
    receive_tree = copying.receive_tree
    places = set()

    def receive(link, path, *rest):
        receive_tree(link, path, *rest)
        if str(path) in places:
            raise as_os_error(GuestError("FileNotFoundError", "", 2), str(path))

    monkeypatch.setattr(copying, "receive_tree", receive)
    return places


def test_failed_copy_back_does_not_stop_other_mounts(vm, place, tmp_path, failing):
    first = vm.mount(tmp_path / "first", place.pure / "first")
    second = vm.mount(tmp_path / "second", place.pure / "second")
    (place / "second" / "x").write_text("1")
    failing.add(str(place / "first"))
    with pytest.raises(TransferError, match=r"first cannot be copied.*No such file"):
        vm.copy_back()
    assert (tmp_path / "second" / "x").read_text() == "1"
    assert second.copy_back() == Changes()
    for mounted in (first, second):
        mounted.close()


def test_what_the_host_cannot_hand_over_leaves_no_stream_open(vm, place, source, monkeypatch):
    monkeypatch.setattr(manifest, "MAX_PATHS", 0)
    with pytest.raises(UsageError, match="more than 0 files"):
        vm.mount(source, place.pure / "data")
    link = vm.client.link()
    with link.changed:
        assert link.changed.wait_for(lambda: not link.channel.open_streams, OPEN_STREAMS_TIMEOUT)


def test_what_disappears_while_it_is_handed_over(vm, place, source, monkeypatch):
    open_file = manifest.open_file

    def exchanged(parent, name):
        (source / name).unlink()
        (source / name).symlink_to("/etc/passwd")
        return open_file(parent, name)

    monkeypatch.setattr(manifest, "open_file", exchanged)
    with pytest.raises(TransferError, match="source cannot be copied"):
        vm.mount(source, place.pure / "data")
    assert list(place.iterdir()) == []  # nor does anything come later: the next test's machine is this one


def test_secret_in_a_refused_file_name_is_masked_in_the_error(vm, place, source, monkeypatch):
    monkeypatch.setattr(type(vm.client), "redactor", Redactor(["correct-horse"]))
    mounted = vm.mount(source, place.pure / "data")
    (place / "data" / "holes-of-correct-horse").write_text("")
    vm.run(["truncate", "-s", "300G", place.pure / "data" / "holes-of-correct-horse"], check=True)
    with pytest.raises(TransferError, match=r"holes-of-.*which is refused") as caught:
        mounted.copy_back()
    assert "correct-horse" not in str(caught.value)
    mounted.close()


def test_what_could_not_be_put_beside_is_tried_again(vm, place, source, monkeypatch):
    """On a full disk, say: the machine has the only copy."""
    mounted = vm.mount(source, place.pure / "data")
    (place / "data" / "a").write_text("G")
    (place / "data" / "b").write_text("G")
    (source / "a").write_text("H")

    def full(*_arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as disk:
        disk.setattr(takeover, "_new_name", full)
        with pytest.raises(MountConflict, match="1 of the changes") as caught:
            mounted.copy_back()
    assert "could not be put beside it: No space left" in caught.value.details
    with pytest.raises(MountConflict, match="1 of the changes"):
        mounted.copy_back()
    found = {path.name: path.read_text() for path in source.iterdir()}
    assert found == {"a": "H", f"a.microvm-{vm.id}": "G", "b": "G"}
    assert mounted.copy_back() == Changes()
    mounted.close()


def test_a_link_that_leads_out_through_one_of_the_host_s(vm, place, source, tmp_path, caplog):
    (tmp_path / "outside").mkdir()
    (source / "sub").mkdir()
    (source / "sub" / "out").symlink_to(tmp_path / "outside")
    mounted = vm.mount(source, place.pure / "data")
    for name, target in {"b": "sub", "c": "b/out", "d": "sub/out/key", "e": "e", "f": "nowhere"}.items():
        (place / "data" / name).symlink_to(target)
    with caplog.at_level("WARNING"):
        assert mounted.copy_back().links == ("c", "d")
    assert "c: a link that leads out by way of another; d: " in caplog.text
    assert sorted(path.name for path in source.iterdir()) == ["a", "b", "e", "f", "sub"]
    mounted.close()


def test_a_secret_in_what_took_too_long(vm, monkeypatch):
    monkeypatch.setattr(type(vm.client), "redactor", Redactor(["correct-horse"]))
    waiting = []

    @contextlib.contextmanager
    def limited(what):
        waiting.append(what)
        yield

    monkeypatch.setattr(vm.instance.guard, "limited", limited)
    vm.run("true correct-horse")
    assert waiting
    assert "correct-horse" not in "".join(waiting)
