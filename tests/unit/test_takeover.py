"""Three sides of a directory: handed over, changed in the machine, changed on the host meanwhile."""

import errno
import os
import shutil
import stat
import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_microvm.errors import UsageError
from pytest_microvm.mounts import merging as takeover
from pytest_microvm.mounts.merging import Conflict, TakeOver
from pytest_microvm.untrusted.manifest import Handover, is_git, scan
from pytest_microvm.untrusted.nofollow import open_folder

MINE = ".microvm-vm-1"


def lay_out(folder, tree):
    """Write a tree: text is a file, ``("link", target)``, a dict is a directory."""
    folder.mkdir(exist_ok=True)
    for name, what in tree.items():
        path = folder / name
        if isinstance(what, dict):
            lay_out(path, what)
        elif isinstance(what, tuple):
            path.symlink_to(what[1])
        else:
            path.write_text(what)


def read(folder):
    """Return a directory as :func:`lay_out` takes it."""
    tree = {}
    for path in folder.iterdir():
        if path.is_symlink():
            tree[path.name] = ("link", str(path.readlink()))
        else:
            tree[path.name] = read(path) if path.is_dir() else path.read_text()
    return tree


def manifest(folder):
    descriptor = open_folder(folder.resolve())
    try:
        return scan(descriptor)
    finally:
        os.close(descriptor)


def taken_over(base, host, guest, folder, left_out=None, *, staging=None):
    """Return what the host's directory holds after the taking over, and its result."""
    staging = staging or folder
    for name, tree in (("base", base), ("host", host)):
        lay_out(folder / name, tree)
    for name, tree in (("guest", guest), ("spare", {})):
        lay_out(staging / name, tree)
    places = [folder / "host", staging / "guest", staging / "spare"]
    opened = [open_folder(place.resolve()) for place in places]
    try:
        work = TakeOver(*opened, MINE)
        result = work.run(manifest(folder / "base"), manifest(staging / "guest"), left_out or {})
    finally:
        for descriptor in opened:
            os.close(descriptor)
    assert list((staging / "spare").iterdir()) == []
    return read(folder / "host"), result


@pytest.mark.parametrize(
    ("base", "guest", "lists"),
    [
        ({}, {"a": "1"}, (["a"], [], [])),
        ({"a": "1"}, {"a": "2"}, ([], ["a"], [])),
        ({"a": "1"}, {}, ([], [], ["a"])),
        ({}, {"d": {"e": {"f": "1"}}}, (["d", "d/e", "d/e/f"], [], [])),
        ({"d": {"e": {"f": "1"}}}, {}, ([], [], ["d/e/f", "d/e", "d"])),
        ({"d": {"f": "1"}}, {"d": "now a file"}, (["d"], [], ["d/f"])),
        ({"d": "a file"}, {"d": {"f": "1"}}, (["d", "d/f"], [], [])),
        ({"a": "1"}, {"a": ("link", "b"), "b": "2"}, (["b"], ["a"], [])),
        ({"a": ("link", "b")}, {"a": ("link", "c")}, ([], ["a"], [])),
        ({"a": ("link", "b")}, {"a": "now a file"}, ([], ["a"], [])),
        ({"d": {"x": "1"}}, {"d": ("link", "e")}, (["d"], [], ["d/x"])),
        ({"a\nb": "1"}, {"a\nb": "2", "\x1b[2J": "3"}, (["\x1b[2J"], ["a\nb"], [])),
        ({"a": "1", "d": {}}, {"a": "1", "d": {}}, ([], [], [])),
    ],
)
def test_what_the_machine_changed_is_taken_over(base, guest, lists, tmp_path):
    now, result = taken_over(base, base, guest, tmp_path)
    assert now == guest
    assert (result.created, result.changed, result.deleted) == lists
    assert result.conflicts == []


def test_what_the_host_changed_alone_stays(tmp_path):
    base = {"a": "1", "b": "2", "d": {"c": "3"}}
    host = {"a": "changed", "d": {"c": "3", "new": "4"}, "new": {}}
    now, result = taken_over(base, host, base, tmp_path)
    assert now == host
    assert (result.created, result.changed, result.deleted, result.conflicts) == ([], [], [], [])


def test_both_did_the_same(tmp_path):
    base, both = {"a": "1", "b": "2"}, {"a": "new", "c": "3", "d": {"e": "4"}}
    now, result = taken_over(base, both, both, tmp_path)
    assert now == both
    assert result.conflicts == []


@pytest.mark.parametrize(
    ("base", "host", "guest", "after", "why"),
    [
        ({"a": "1"}, {"a": "H"}, {"a": "G"}, {"a": "H", "a" + MINE: "G"}, "changed on the host"),
        ({}, {"a": "H"}, {"a": "G"}, {"a": "H", "a" + MINE: "G"}, "made on the host"),
        ({"a": "1"}, {"a": "H"}, {}, {"a": "H"}, "changed on the host"),
        ({"a": "1"}, {}, {"a": "G"}, {"a" + MINE: "G"}, "removed on the host"),
        ({"d": {"a": "1"}}, {}, {"d": {"a": "G"}}, {"d" + MINE: {"a": "G"}}, "removed on the host"),
        (
            {"d": {"e": {"a": "1"}}},
            {"d": "now a file"},
            {"d": {"e": {"a": "G", "b": "G"}}},
            {"d": "now a file", "d" + MINE: {"e": {"a": "G", "b": "G"}}},
            "removed on the host",
        ),
        ({"d": {"a": "1"}}, {"d": {"a": "1", "b": "H"}}, {}, {"d": {"b": "H"}}, "not empty"),
        (
            {"d": {"a": "1"}},
            {"d": {"a": "H"}},
            {"d": "G"},
            {"d": {"a": "H"}, "d" + MINE: "G"},
            "changed on the host",
        ),
        (
            {"a": "1"},
            {"a": "H"},
            {"a": {"x": "G"}},
            {"a": "H", "a" + MINE: {"x": "G"}},
            "changed on the host",
        ),
        (
            {},
            {"a": "H"},
            {"a": {"x": {"y": "G"}}},
            {"a": "H", "a" + MINE: {"x": {"y": "G"}}},
            "made on the host",
        ),
        ({}, {"a": ("link", "b")}, {"a": "G"}, {"a": ("link", "b"), "a" + MINE: "G"}, "made on the host"),
        (
            {"a": "1"},
            {"a": "H", "a" + MINE: "in the way"},
            {"a": "G"},
            {"a": "H", "a" + MINE: "in the way", "a" + MINE + "-2": "G"},
            "changed on the host",
        ),
    ],
)
def test_both_changed_it(base, host, guest, after, why, tmp_path):  # noqa: PLR0917 - a table's columns
    now, result = taken_over(base, host, guest, tmp_path)
    assert now == after
    assert result.conflicts
    assert any(why in conflict.why for conflict in result.conflicts)
    saved = [conflict.saved for conflict in result.conflicts if conflict.saved]
    assert all((tmp_path / "host" / path).exists() for path in saved)


def test_the_others_are_taken_over(tmp_path):
    base = dict.fromkeys("abc", "1")
    now, result = taken_over(base, {**base, "b": "H"}, dict.fromkeys("abc", "G"), tmp_path)
    assert now == {"a": "G", "b": "H", "b" + MINE: "G", "c": "G"}
    assert result.conflicts == [Conflict("b", "it was changed on the host meanwhile", "b" + MINE)]


def test_a_long_name_gets_a_shorter_one_beside_it(tmp_path):
    name = "ü" * 127
    now, result = taken_over({name: "1"}, {name: "H"}, {name: "G"}, tmp_path)
    assert now[name] == "H"
    saved = result.conflicts[0].saved
    assert len(os.fsencode(saved)) <= 255
    assert (tmp_path / "host" / saved).read_text() == "G"


def test_names_that_are_no_text(tmp_path):
    name = os.fsdecode(b"\xff\xfe")
    now, _result = taken_over({name: "1"}, {name: "1"}, {name: "2", "d" + name: {"x": "3"}}, tmp_path)
    assert now == {name: "2", "d" + name: {"x": "3"}}


def test_git_s_own_files_are_left(tmp_path):
    base = {".git": {"config": "mine"}, "sub": {}}
    evil = {".git": {"config": "evil", "hooks": {"pre-commit": "evil"}}, "sub": {".GIT": "evil"}, "a": "1"}
    now, result = taken_over(base, base, evil, tmp_path)
    assert now == {".git": {"config": "mine"}, "sub": {}, "a": "1"}
    assert result.left == [".git/config", ".git/hooks", ".git/hooks/pre-commit", "sub/.GIT"]


@pytest.mark.parametrize(
    "path",
    [
        ".git", "a/.git/b", ".GIT/x", ".git.", ".git ", "git~1/config",
        ".g\u200cit/config", "a/\ufeff.Gi\u00adt", ".git::$INDEX_ALLOCATION/config", "a\\.git\\config",
    ],
)  # fmt: skip
def test_what_is_git_s(path):
    assert is_git(path)


@pytest.mark.parametrize("path", ["", "git", ".github/x", "a/.gitignore", "x.git/config", "\u200c", "\udcff"])
def test_what_is_not_git_s(path):
    assert not is_git(path)


def test_what_was_left_out_is_not_deleted(tmp_path):
    base = {"d": {"a": "1"}, "b": "1"}
    now, result = taken_over(base, base, {"b": "2"}, tmp_path, {"d": "a link that may lead out"})
    assert now == {"d": {"a": "1"}, "b": "2"}
    assert result.conflicts == [Conflict("d", "a link that may lead out")]


@pytest.mark.parametrize("place", ["d", "d/e"])
def test_link_that_replaced_a_directory_is_not_followed(place, tmp_path):
    (tmp_path / "outside" / "e").mkdir(parents=True)
    (tmp_path / "outside" / "a").write_text("1")
    (tmp_path / "outside" / "e" / "a").write_text("1")
    tree = {"d": {"a": "1", "e": {"a": "1"}}}
    guest = {"d": {"a": "G", "e": {"new": "G"}}}
    lay_out(tmp_path / "host", tree)
    shutil.rmtree(tmp_path / "host" / place)
    (tmp_path / "host" / place).symlink_to(tmp_path / "outside" / ("e" if place == "d/e" else "."))
    _now, result = taken_over(tree, {}, guest, tmp_path)
    assert read(tmp_path / "outside") == {"a": "1", "e": {"a": "1"}}
    assert result.conflicts


# Rights, owners, hard links


def test_rights_come_back_but_never_more_than_the_owner_s(tmp_path):
    base = {"script": "1", "shared": "1", "set-id": "1"}
    lay_out(tmp_path / "host", base)
    lay_out(tmp_path / "base", base)
    for folder in ("host", "base"):
        (tmp_path / folder / "shared").chmod(0o664)
        (tmp_path / folder / "set-id").chmod(0o4755)
    guest = {"script": "1", "shared": "2", "set-id": "2"}
    lay_out(tmp_path / "guest", guest)
    (tmp_path / "guest" / "script").chmod(0o755)
    (tmp_path / "guest" / "shared").chmod(0o644)  # as extraction leaves it
    (tmp_path / "guest" / "set-id").chmod(0o755)
    _now, result = taken_over({}, {}, {}, tmp_path)
    assert sorted(result.changed) == ["script", "set-id", "shared"]
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "host").iterdir()}
    assert modes == {"script": 0o755, "shared": 0o664, "set-id": 0o755}


def test_hard_links_of_the_machine_become_files_of_their_own(tmp_path):
    lay_out(tmp_path / "guest", {"a": "1"})
    os.link(tmp_path / "guest" / "a", tmp_path / "guest" / "b")
    taken_over({}, {}, {}, tmp_path)
    (tmp_path / "host" / "a").write_text("2")
    assert read(tmp_path / "host") == {"a": "2", "b": "1"}


@pytest.fixture
def elsewhere(tmp_path):
    """A directory on another file system."""
    shm = Path("/dev/shm")
    if not os.access(shm, os.W_OK) or shm.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no other file system")
    with tempfile.TemporaryDirectory(dir=shm) as folder:
        yield Path(folder)


def test_another_file_system_is_mounted_within(elsewhere, tmp_path):
    base = {"a": "1", "b": "1", "d": "1"}
    guest = {"a": "G", "b": "G", "d": {"x": {"y": "G", "l": ("link", "y")}}, "new": {"e": "G"}}
    guest["l"] = ("link", "a")
    lay_out(elsewhere / "guest", guest)
    (elsewhere / "guest" / "a").chmod(0o755)
    os.utime(elsewhere / "guest" / "a", (1, 1))
    os.link(elsewhere / "guest" / "new" / "e", elsewhere / "guest" / "new" / "f")
    now, result = taken_over(base, {**base, "b": "H", "d": "H"}, {}, tmp_path, staging=elsewhere)
    assert now == {
        **guest, "b": "H", "b" + MINE: "G", "d": "H", "d" + MINE: guest["d"], "new": {"e": "G", "f": "G"},
    }  # fmt: skip
    status = (tmp_path / "host" / "a").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_mtime) == (0o755, 1)
    assert [conflict.saved for conflict in result.conflicts] == ["d" + MINE, "b" + MINE]


def test_a_disk_that_is_full_for_one_file_is_not_for_the_others(tmp_path, monkeypatch):
    lay_out(tmp_path / "guest", {"a": "G"})
    for name in "bc":
        os.link(tmp_path / "guest" / "a", tmp_path / "guest" / name)
    full, copyfileobj = [True, True], shutil.copyfileobj

    def copy(source, target):
        if full:
            full.pop()
            target.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        copyfileobj(source, target)

    monkeypatch.setattr(shutil, "copyfileobj", copy)
    now, result = taken_over({}, {}, {}, tmp_path)
    assert now == {"b": "G", "c": "G"}
    assert [(conflict.path, conflict.saved) for conflict in result.conflicts] == [("a", None)]
    assert result.unsaved == {"a"}


def test_what_is_put_beside_takes_nobodys_place(tmp_path, monkeypatch):
    new_name = takeover._new_name

    def late(parent, name, suffix):
        new = new_name(parent, name, suffix)
        (tmp_path / "host" / new).write_text("made here a moment later")
        return new

    monkeypatch.setattr(takeover, "_new_name", late)
    now, result = taken_over({"a": "1"}, {"a": "H"}, {"a": "G"}, tmp_path)
    assert now == {"a": "H", "a" + MINE: "made here a moment later"}
    assert result.unsaved == {"a"}


@pytest.mark.parametrize("kind", ["fifo", "socket"])
def test_what_is_no_file_on_the_host_is_left_alone(kind, tmp_path):
    lay_out(tmp_path / "host", {})
    if kind == "fifo":
        os.mkfifo(tmp_path / "host" / "a")
    else:
        os.mknod(tmp_path / "host" / "a", stat.S_IFSOCK | 0o600)
    lay_out(tmp_path / "base", {})
    lay_out(tmp_path / "guest", {"a": "G"})
    opened = [open_folder((tmp_path / name).resolve()) for name in ("host", "guest", "guest")]
    result = TakeOver(*opened, MINE).run({}, manifest(tmp_path / "guest"), {})
    for descriptor in opened:
        os.close(descriptor)
    assert not (tmp_path / "host" / "a").is_file()
    assert result.conflicts[0].saved == "a" + MINE


def test_a_change_at_the_last_moment(tmp_path, monkeypatch):
    """Between the look at the host's file and its replacement."""
    looked = takeover.look

    def slow_look(parent, name):
        found = looked(parent, name)
        (tmp_path / "host" / name).write_text("H")
        return found

    monkeypatch.setattr(takeover, "look", slow_look)
    now, result = taken_over({"a": "1", "b": "1"}, {"a": "1", "b": "1"}, {"a": "G", "c": "G"}, tmp_path)
    assert now == {"a": "H", "a" + MINE: "G", "b": "H", "c": "H", "c" + MINE: "G"}
    assert len(result.conflicts) == 3


# Any three trees

names = st.sampled_from(["a", "b", "c"])
leaves = st.one_of(
    st.sampled_from(["", "1", "2"]), st.sampled_from(["a", "b"]).map(lambda target: ("link", target))
)
trees = st.recursive(
    st.dictionaries(names, leaves, max_size=3),
    lambda inner: st.dictionaries(names, st.one_of(leaves, inner), max_size=3),
    max_leaves=8,
)


def flat(tree, above=""):
    """Return every path of a tree: a file's text, a link, or ``{}`` for a directory."""
    found = {}
    for name, what in tree.items():
        found[above + name] = {} if isinstance(what, dict) else what
        if isinstance(what, dict):
            found.update(flat(what, f"{above}{name}/"))
    return found


@settings(max_examples=3 * settings.default.max_examples)
@given(trees, trees, trees)
def test_takeover_of_any_trees_loses_no_change(base, host, guest):
    with tempfile.TemporaryDirectory() as folder:
        now, result = taken_over(base, host, guest, Path(folder))
    base, host, guest, now = flat(base), flat(host), flat(guest), flat(now)
    conflicts = {conflict.path for conflict in result.conflicts}
    for path in {**base, **host, **guest}:
        there, theirs = host.get(path), guest.get(path)
        if there not in (base.get(path), theirs):  # the host's change: never undone
            assert now.get(path) == there, path
        elif theirs == base.get(path):  # the machine did nothing here
            assert now.get(path) == there or any(path.startswith(f"{above}/") for above in conflicts), path
        if theirs not in (None, {}, base.get(path)) and now.get(path) != theirs:  # the machine's: beside it
            beside = [name for name, what in now.items() if MINE in name and what == theirs]
            assert any(name.rpartition("/")[2].startswith(path.rpartition("/")[2]) for name in beside), path
    changed = {path for path in {**base, **guest} if base.get(path) != guest.get(path)}
    if not any(host.get(path) != base.get(path) for path in {**base, **host, **guest}):
        assert now == guest
        assert not conflicts
    assert conflicts <= changed


# What is handed over


def handed_over(folder):
    root, made = open_folder(folder.resolve()), Handover()
    with tempfile.TemporaryFile() as file:
        try:
            with tarfile.open(fileobj=file, mode="w|") as archive:
                made.write(archive, root)
        finally:
            os.close(root)
        file.seek(0)
        with tarfile.open(fileobj=file) as archive:
            return made, {member.name: member for member in archive.getmembers()}


def test_the_manifest_says_what_was_sent(tmp_path):
    lay_out(tmp_path / "source", {"a": "1", "d": {"b": "22", "l": ("link", "/etc/passwd")}})
    os.mkfifo(tmp_path / "source" / "pipe")
    (tmp_path / "source" / "a").chmod(0o4711)
    made, members = handed_over(tmp_path / "source")
    assert sorted(members) == sorted(made.manifest) == ["a", "d", "d/b", "d/l"]
    assert made.manifest == {k: v for k, v in manifest(tmp_path / "source").items() if k != "pipe"}
    assert made.links == {"d/l": "/etc/passwd"}
    assert (members["a"].mode, members["a"].uid, members["d/b"].size) == (0o711, 0, 2)


def test_too_many_or_too_deep(tmp_path, monkeypatch):
    deep = tmp_path / "source"
    for _ in range(5):
        deep = deep / "d"
    deep.mkdir(parents=True)
    monkeypatch.setattr("pytest_microvm.untrusted.manifest.MAX_PATHS", 4)
    with pytest.raises(UsageError, match="more than 4 files"):
        handed_over(tmp_path / "source")
    monkeypatch.setattr("pytest_microvm.untrusted.manifest.MAX_PATHS", 5)
    assert len(handed_over(tmp_path / "source")[1]) == 5
    monkeypatch.setattr("pytest_microvm.untrusted.manifest.MAX_DEPTH", 5)
    with pytest.raises(UsageError, match="more than 5 directories"):
        handed_over(tmp_path / "source")
