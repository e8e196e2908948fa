"""Templates on disk: whole or not there, held while in use, the least recently used go first."""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time

import pytest
from filelock import FileLock

from pytest_microvm.errors import HostError, UsageError
from pytest_microvm.templates import folders, integrity
from pytest_microvm.templates import store as store_module
from pytest_microvm.templates.store import UNUSABLE, TemplateStore

FORK = multiprocessing.get_context("fork")
META = {"kind": "boot", "image": "base"}
MIB = 1024**2


@pytest.fixture
def said():
    return []


@pytest.fixture
def store(tmp_path, said):
    return TemplateStore(tmp_path / "cache", cap=1024**3, say=said.append)


def make(store, key, size=MIB, content=None, **meta):
    with store.draft() as draft:
        (draft / "ram").write_bytes(content or os.urandom(size))
        (draft / "scratch").write_bytes(b"scratch")
        (draft / "state").write_bytes(b"state of " + key.encode())
        (draft / "collected").write_bytes(b"[]")
        store.publish(key, draft, {**META, **meta})


def flip_a_bit(path, *, keep_time=False):
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(before.st_size // 2)
        byte = file.read(1)[0]
        file.seek(before.st_size // 2)
        file.write(bytes([byte ^ 4]))
    if keep_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(path, content):
    before = path.stat()
    path.unlink()
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def names(store):
    return {path.name for path in store.folder.iterdir()}


def test_nothing_there(store):
    assert store.open("a" * 64) is None
    assert store.list() == []
    assert store.prune() == 0


def test_published_and_opened(store):
    make(store, "k1", parent="k0")
    with store.open("k1") as template:
        assert template.ram.stat().st_size == MIB
        assert template.scratch.read_bytes() == b"scratch"
        assert template.state.read_bytes() == b"state of k1"
        assert template.attachment("collected") == b"[]"
        assert template.meta["parent"] == "k0"
    assert names(store) == {"k1"}


def test_what_is_not_published_is_removed(store):
    with store.draft() as draft:
        (draft / "ram").write_bytes(b"x")
        assert names(store) == {draft.name}
    assert names(store) == set()


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "ram").unlink(),
        lambda folder: os.truncate(folder / "ram", 10),
        lambda folder: os.truncate(folder / "scratch", 0),
        lambda folder: (folder / "state").write_bytes(b"STATE of k1"),
        lambda folder: flip_a_bit(folder / "ram"),
        lambda folder: flip_a_bit(folder / "scratch"),
        lambda folder: flip_a_bit(folder / "state"),
        lambda folder: flip_a_bit(folder / "collected"),
        lambda folder: flip_a_bit(folder / "meta.json"),
        lambda folder: flip_a_bit(folder / "ram", keep_time=True),
        lambda folder: replace(folder / "scratch", b"SCRATCH"),
        lambda folder: (folder / "collected").unlink(),
        lambda folder: (folder / "meta.json").write_text("{"),
        lambda folder: (folder / "meta.json").write_text("[]"),
        lambda folder: (folder / "meta.json").write_text("{}"),
        lambda folder: (folder / "meta.json").write_text('{"files": 7}'),
        lambda folder: (folder / "meta.json").unlink(),
        lambda folder: [path.unlink() for path in folder.iterdir()],
    ],
    ids=[
        "no-ram", "short-ram", "empty-scratch", "other-state", "flipped-ram", "flipped-scratch",
        "flipped-state", "flipped-attachment", "flipped-meta", "hidden-flip", "replaced", "no-attachment",
        "meta-not-json", "meta-list", "meta-empty", "meta-odd", "no-meta", "nothing",
    ],
)  # fmt: skip
def test_a_damaged_template_is_none_and_can_be_made_anew(store, said, damage):
    make(store, "k1")
    held = store.open("k1")
    assert held.intact()
    damage(store.folder / "k1")
    assert store.open("k1") is None
    assert all("damaged (k1: " in line for line in said)
    assert bool(said) != (store.folder / "k1").exists()
    make(store, "k1")
    with store.open("k1") as template:
        assert template.state.read_bytes() == b"state of k1"
        assert template.intact()
    assert not held.intact()  # whoever still holds the damaged one is told to ask again
    held.close()
    assert names(store) == {"k1"}


@pytest.mark.parametrize("name", ["ram", "scratch", "state", "collected"])
def test_writing_the_same_again_is_no_damage(store, said, name):
    """Restored from an archive, copied, linked, touched: the content decides, and is read once."""
    make(store, "k1")
    held = store.open("k1")
    path = store.folder / "k1" / name
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    assert not held.intact()
    with store.open("k1") as again:
        assert again.intact()
    held.close()
    assert said == []


def test_the_content_is_read_once(store, monkeypatch):
    read = []
    digest = integrity.content_digest
    monkeypatch.setattr(integrity, "content_digest", lambda path: read.append(path.name) or digest(path))
    make(store, "k1")
    read.clear()
    store.open("k1").close()
    assert read == []  # the stamps are those of the publication
    os.utime(store.folder / "k1" / "ram")
    store.open("k1").close()
    store.open("k1").close()
    assert sorted(read) == ["collected", "ram", "scratch", "state"]
    (store.folder / "k1" / "stamps.json").write_text("{")
    store.open("k1").close()
    (store.folder / "k1" / "stamps.json").unlink()
    store.open("k1").close()
    store.open("k1").close()
    assert len(read) == 12


@pytest.mark.parametrize(
    "change",
    [
        lambda store: flip_a_bit(store.folder / "k1" / "ram"),
        lambda store: os.truncate(store.folder / "k1" / "scratch", 1),
        lambda store: (store.folder / "k1" / "state").unlink(),
        lambda store: shutil.rmtree(store.folder / "k1"),
        lambda store: shutil.rmtree(store.folder),
    ],
    ids=["written", "truncated", "one-file-gone", "gone", "cache-gone"],
)
def test_what_happens_to_a_held_template_is_noticed(store, change):
    make(store, "k1")
    with store.open("k1") as held:
        assert held.intact()
        change(store)
        assert not held.intact()
        assert store.open("k1") is None
    assert not held.intact()


def test_damaged_kept_machine_is_reported_and_not_removed(store):
    make(store, "vm-1", kind="kept")
    os.truncate(store.folder / "vm-1" / "ram", 5)
    with pytest.raises(HostError, match="vm-1 is damaged: ram has another size") as caught:
        store.open("vm-1")
    assert "rm vm-1" in caught.value.resolution
    assert store.prune() == 0
    assert names(store) == {"vm-1"}


def test_a_folder_without_facts_is_pruned(store):
    make(store, "k1")
    (store.folder / "k1" / "meta.json").unlink()
    assert store.prune() >= MIB
    assert names(store) == set()


def test_publishing_twice_keeps_the_first(store):
    make(store, "k1")
    first = (store.folder / "k1" / "ram").read_bytes()
    make(store, "k1")
    assert (store.folder / "k1" / "ram").read_bytes() == first
    assert names(store) == {"k1"}


def test_prune_removes_locks_that_are_not_held(store):
    make(store, "k1")
    store.locks.mkdir()
    (store.locks / "k1").touch()
    with FileLock(store.locks / "k2"):
        store.prune()
        assert [path.name for path in store.locks.iterdir()] == ["k2"]


def test_in_use_is_not_removed(store):
    make(store, "k1")
    make(store, "k2")
    with store.open("k1") as held:
        assert {entry.key: entry.in_use for entry in store.list()} == {"k1": True, "k2": False}
        with pytest.raises(UsageError, match="in use: k1"):
            store.remove("k1")
        assert store.prune() >= MIB
        assert names(store) == {"k1"}
        assert held.ram.exists()
    assert store.remove("k1") == ["k1"]
    assert names(store) == set()


def test_kept_machine_is_only_removed_by_name(store):
    make(store, "vm-1", kind="kept")
    make(store, "k1")
    store.prune()
    assert names(store) == {"vm-1"}
    store.cap = 1
    store.shrink()
    assert names(store) == {"vm-1"}
    assert store.remove("vm-1") == ["vm-1"]


def test_two_may_hold_one(store):
    make(store, "k1")
    first, second = store.open("k1"), store.open("k1")
    first.close()
    first.close()
    assert store.list()[0].in_use
    second.close()
    assert not store.list()[0].in_use


def test_in_use_by_another_process(store):
    make(store, "k1")
    ready, go = FORK.Event(), FORK.Event()

    def hold():
        with store.open("k1"):
            ready.set()
            go.wait()

    process = FORK.Process(target=hold)
    process.start()
    assert ready.wait(60)
    assert store.list()[0].in_use
    assert store.prune() == 0
    os.kill(process.pid, signal.SIGKILL)  # a process that dies holds nothing any more
    process.join()
    assert not store.list()[0].in_use
    assert store.prune() >= MIB


def test_open_during_a_removal_locks_the_new_template(store, monkeypatch):
    """The lock of a removed template must not pass for one of its successor."""
    make(store, "k1")
    entered, go_on = threading.Event(), threading.Event()
    discard = folders.discard
    opened = []

    def slowly(folder):
        discard(folder)
        monkeypatch.setattr(folders, "discard", discard)
        make(store, "k1")
        entered.set()
        go_on.wait()  # still holds the removed one's lock alone

    monkeypatch.setattr(folders, "discard", slowly)
    old = os.open(store.folder / "k1" / "meta.json", os.O_RDONLY)
    remover = threading.Thread(target=store.remove, args=("k1",))
    remover.start()
    entered.wait()
    real_open = os.open

    def open_the_old_one_once(path, flags, *rest, **options):
        if str(path).endswith("meta.json") and not opened:
            opened.append(path)
            go_on.set()
            return os.dup(old)
        return real_open(path, flags, *rest, **options)

    monkeypatch.setattr(folders.os, "open", open_the_old_one_once)
    with store.open("k1"):
        assert opened
        assert store.list()[0].in_use
        with pytest.raises(UsageError, match="in use"):
            store.remove("k1")
    remover.join()
    os.close(old)


def test_the_least_recently_used_go_first(tmp_path):
    store = TemplateStore(tmp_path, cap=int(3.5 * MIB))
    for number, key in enumerate(("k1", "k2", "k3")):
        make(store, key)
        os.utime(store.folder / key / "meta.json", (number, number))
    store.open("k1").close()  # used now
    make(store, "k4")
    assert names(store) == {"k1", "k3", "k4"}
    assert [entry.key for entry in store.list()][-1] == "k3"


def test_the_cap_spares_what_is_in_use_and_what_was_just_made(tmp_path):
    store = TemplateStore(tmp_path, cap=MIB // 2)
    make(store, "k1")
    assert names(store) == {"k1"}
    with store.open("k1"):
        make(store, "k2")
        assert names(store) == {"k1", "k2"}
    make(store, "k3")
    assert names(store) == {"k3"}


@pytest.mark.parametrize("prefix", ["", "zz"])
def test_removing_what_is_not_there(store, prefix):
    make(store, "k1")
    with pytest.raises(UsageError, match="no template"):
        store.remove(prefix)
    assert names(store) == {"k1"}


def test_removing_by_prefix(store):
    for key in ("aa1", "aa2", "ab1"):
        make(store, key)
    assert sorted(store.remove("aa")) == ["aa1", "aa2"]
    assert names(store) == {"ab1"}


def test_what_killed_processes_left_is_swept(store):
    make(store, "k1")
    ready = FORK.Event()

    def begin():
        with store.draft() as draft:
            (draft / "ram").write_bytes(b"half")
            ready.set()
            signal.pause()

    process = FORK.Process(target=begin)
    process.start()
    assert ready.wait(60)
    assert len(names(store)) == 2
    with store.draft():  # its process lives: it stays
        assert len(names(store)) == 3
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    broken_off = store.folder / f".removed-{process.pid}-abc"
    broken_off.mkdir()
    (broken_off / "ram").write_bytes(b"x")
    store.prune()
    assert names(store) == set()


def test_full_disk_removes_unused_templates_then_fails(store, said, monkeypatch):
    make(store, "vm-1", kind="kept")
    make(store, "k1")
    make(store, "k2")
    monkeypatch.setattr(store_module, "_SPACE_LEFT", 2**62)
    with store.open("k2"), pytest.raises(HostError, match="MiB are free") as caught:
        store.new_draft()
    assert "prune" in caught.value.resolution
    assert said == ["the disk with the cache is nearly full: removed 1 templates not in use"]
    assert names(store) == {"vm-1", "k2"}


def test_template_with_changed_facts_is_unusable(store):
    make(store, "k1")
    meta = store.folder / "k1" / "meta.json"
    facts = json.loads(meta.read_text())
    meta.write_text(json.dumps({**facts, "kind": "kept"}))
    assert [(entry.key, entry.kind) for entry in store.list()] == [("k1", UNUSABLE)]
    assert store.list()[0].size >= MIB
    assert store.open("k1") is None
    assert names(store) == set()


def _publish_often(store, key, count):
    for _ in range(count):
        make(store, key, size=1000)
        template = store.open(key)
        if template is not None:  # somebody may have removed it since
            assert template.state.read_bytes() == b"state of " + key.encode()
            template.close()


def _use_often(store, key, rounds):
    """Whoever finds a template wrong must be able to know it from the template."""
    for _ in range(rounds):
        template = store.open(key)
        if template is None:
            make(store, key, size=1000, content=b"r" * 1000)
            continue
        with template:
            try:
                sound = template.ram.read_bytes() == b"r" * 1000
            except FileNotFoundError:
                sound = False
            assert sound or not template.intact()


def test_processes_use_what_is_damaged_again_and_again(store):
    store.folder.mkdir(parents=True)
    processes = [FORK.Process(target=_use_often, args=(store, "k1", 500)) for _ in range(3)]
    for process in processes:
        process.start()
    ram = store.folder / "k1" / "ram"
    damaged = 0
    while any(process.is_alive() for process in processes):
        with contextlib.suppress(FileNotFoundError):
            # The kernel's time stamps are some milliseconds apart (CONFIG_HZ): two writes may share one.
            if time.time() - ram.stat().st_ctime > 0.02:
                flip_a_bit(ram)
                damaged += 1
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert damaged > 0
    store.prune()
    assert names(store) == set()


def test_processes_publish_open_and_remove_the_same_at_once(store):
    processes = [FORK.Process(target=_publish_often, args=(store, "k1", 30)) for _ in range(3)]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        store.prune()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    store.prune()
    assert names(store) == set()
