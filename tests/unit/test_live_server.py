"""Live mounts under attack: a guest's root says what it likes, and the host changes meanwhile."""

import errno
import os
import struct

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pytest_microvm.mounts.live import nodes
from pytest_microvm.mounts.live.messages import MAX_WRITE, ROOT, BadRequest, Op
from support.live_guest import ENTRY, SETATTR, Guest, numbers


@pytest.fixture
def folder(tmp_path):
    inside = tmp_path / "inside"
    (inside / "sub").mkdir(parents=True)
    (inside / "a").write_text("a\n")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("secret")
    return inside


@pytest.fixture
def guest(folder):
    with Guest(folder) as one:
        yield one


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", [b"..", b".", b"", b"../outside/secret", b"sub/..", b"/etc/passwd"])
def test_paths_are_no_names(guest, folder, name):
    assert guest.lookup(name) == errno.EINVAL
    assert guest.ask(Op.MKDIR, ROOT, bytes(8) + name + b"\0") == errno.EINVAL
    assert guest.ask(Op.SYMLINK, ROOT, name + b"\0a\0") == errno.EINVAL
    assert guest.ask(Op.UNLINK, ROOT, name + b"\0") == errno.EINVAL
    assert guest.ask(Op.RENAME, ROOT, numbers(ROOT) + b"a\0" + name + b"\0") == errno.EINVAL
    assert (
        guest.ask(Op.CREATE, ROOT, struct.pack("<4I", os.O_RDWR, 0o644, 0, 0) + name + b"\0") == errno.EINVAL
    )
    assert names(folder) == ["a", "sub"]


def test_unknown_nodes_handles_and_operations_are_errors(guest):
    for op, body in (
        (Op.LOOKUP, b"a\0"),
        (Op.GETATTR, bytes(16)),
        (Op.OPEN, bytes(8)),
        (Op.OPENDIR, bytes(8)),
        (Op.READLINK, b""),
        (Op.UNLINK, b"a\0"),
        (Op.RENAME, numbers(99) + b"a\0b\0"),
    ):
        assert guest.ask(op, 4711, body) == errno.ESTALE
    for op, body in (
        (Op.READ, numbers(9, 0) + bytes(24)),
        (Op.WRITE, numbers(9, 0) + bytes(24)),
        (Op.FSYNC, numbers(9, 0)),
        (Op.RELEASE, numbers(9, 0, 0)),
        (Op.READDIR, numbers(9, 0) + bytes(24)),
        (Op.FLUSH, numbers(9)),
    ):
        assert guest.ask(op, ROOT, body) == errno.EBADF
    assert guest.ask(999) == errno.ENOSYS
    assert guest.ask(Op.FORGET, 4711, numbers(5)) is None
    assert guest.ask(Op.BATCH_FORGET, 0, struct.pack("<2I", 2**32 - 1, 0) + numbers(4711, 5, 3)) is None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(39),
        struct.pack("<I", 41) + bytes(36),
        struct.pack("<II", 40, Op.READ) + bytes(32),
        struct.pack("<II", 43, Op.LOOKUP) + bytes(32) + b"abc",
        struct.pack("<II", 44, Op.LOOKUP) + bytes(32) + b"a\0b\0",
        struct.pack("<II", 44, Op.FORGET) + bytes(36),
    ],
)
def test_what_is_not_fuse_ends_the_mount(guest, data):
    with pytest.raises(BadRequest):
        guest.server.answer(data)


def test_an_old_kernel_is_refused(guest):
    assert guest.ask(Op.INIT, 0, struct.pack("<4I", 7, 27, 0, 0)) == errno.EPROTO
    assert guest.ask(Op.INIT, 0, struct.pack("<4I", 8, 0, 0, 0)) == errno.EPROTO
    answer = guest.ask(Op.INIT, 0, struct.pack("<4I", 7, 38, 2**32 - 1, 2**32 - 1))
    major, minor, readahead, flags = struct.unpack_from("<4I", answer)
    assert (major, minor, readahead, len(answer)) == (7, 31, MAX_WRITE, 64)
    assert not flags & 1 << 16, "with a cache of its own it would not see what the host changes"


def test_a_directory_that_became_a_link(guest, folder, tmp_path):
    (sub,) = guest.lookup(b"sub")
    (folder / "sub").rmdir()
    (folder / "sub").symlink_to(tmp_path / "outside")
    assert guest.lookup(b"secret", sub) == errno.ENOENT
    assert guest.ask(Op.MKDIR, sub, bytes(8) + b"x\0") == errno.ENOENT
    assert guest.ask(Op.OPENDIR, sub, bytes(8)) == errno.ESTALE
    assert guest.ask(Op.SYMLINK, sub, b"x\0secret\0") == errno.ENOENT
    assert guest.ask(Op.RENAME, ROOT, numbers(sub) + b"a\0a\0") == errno.ENOENT
    assert names(tmp_path / "outside") == ["secret"]


def test_a_file_that_became_a_link_or_a_pipe(guest, folder, tmp_path):
    (node,) = guest.lookup(b"a")
    (folder / "a").unlink()
    (folder / "a").symlink_to(tmp_path / "outside" / "secret")
    assert guest.open(node) == errno.ESTALE
    assert guest.open(node, os.O_RDWR) == errno.ESTALE
    body = SETATTR.pack(1 << 3, 0, 0, 0, *[0] * 4, *[0] * 8)  # its size
    assert guest.ask(Op.SETATTR, node, body) == errno.ESTALE
    body = SETATTR.pack(1 << 0, 0, 0, 0, *[0] * 4, 0, 0, 0, 0o777, *[0] * 4)
    assert guest.ask(Op.SETATTR, node, body) == errno.ESTALE
    assert (tmp_path / "outside" / "secret").read_text() == "secret"
    (folder / "a").unlink()
    os.mkfifo(folder / "a")
    assert guest.open(node) == errno.ENOENT


def test_an_open_file_is_no_other(guest, folder):
    (node,) = guest.lookup(b"a")
    (handle,) = guest.open(node)
    assert (
        guest.ask(Op.READ, 4711, numbers(handle, 0) + struct.pack("<2IQ2I", 2**32 - 1, 0, 0, 0, 0)) == b"a\n"
    )
    assert (
        guest.ask(Op.WRITE, node, numbers(handle, 0) + struct.pack("<2IQ2I", 1, 0, 0, 0, 0) + b"x")
        == errno.EBADF
    )
    assert guest.ask(Op.READDIR, node, numbers(handle, 0) + bytes(24)) == errno.ENOTDIR
    far = numbers(handle, 2**64 - 1) + struct.pack("<2IQ2I", 10, 0, 0, 0, 0)
    assert guest.ask(Op.READ, node, far) == errno.EINVAL
    listing = guest.ask(Op.OPENDIR, ROOT, bytes(8))
    (directory,) = struct.unpack_from("<Q", listing)
    assert guest.ask(Op.READ, ROOT, numbers(directory, 0) + bytes(24)) == errno.EISDIR
    assert (
        guest.ask(Op.READDIR, ROOT, numbers(directory, 2**64 - 1) + struct.pack("<2IQ2I", 9, 0, 0, 0, 0))
        == b""
    )
    assert guest.ask(Op.RELEASE, node, numbers(handle, 0, 0)) == b""
    assert guest.ask(Op.RELEASE, node, numbers(handle, 0, 0)) == errno.EBADF


def test_writing_has_bounds(folder):
    with Guest(folder, limit=10_000) as guest:
        (node,) = guest.lookup(b"a")
        (handle,) = guest.open(node, os.O_RDWR)

        def write(offset, data, size=None):
            size = len(data) if size is None else size
            return guest.ask(
                Op.WRITE, node, numbers(handle, offset) + struct.pack("<2IQ2I", size, 0, 0, 0, 0) + data
            )

        assert write(0, b"xy", size=2**32 - 1) == errno.EINVAL
        assert write(2**63 - 1, b"xy") == errno.EINVAL
        assert write(2**40, b"xy") == errno.EDQUOT
        assert write(9_000, b"xy") == struct.pack("<II", 2, 0)
        assert write(9_500, bytes(3_000)) == errno.EDQUOT
        assert write(0, bytes(9_000)) == struct.pack("<II", 9_000, 0)
        assert (folder / "a").stat().st_size == 9_002


def test_what_is_removed_but_open_still_counts(folder):
    with Guest(folder, limit=1_000_000) as guest:
        open_files = []
        for name in (b"one", b"two"):
            answer = guest.ask(Op.CREATE, ROOT, struct.pack("<4I", os.O_RDWR, 0o644, 0, 0) + name + b"\0")
            if isinstance(answer, int):
                break
            (handle,) = struct.unpack_from("<Q", answer, 128)
            open_files.append(handle)
            for offset in range(0, 600_000, 100_000):
                said = guest.ask(
                    Op.WRITE,
                    ROOT,
                    numbers(handle, offset) + struct.pack("<2IQ2I", 100_000, 0, 0, 0, 0) + bytes(100_000),
                )
            if name == b"one":
                assert said == struct.pack("<II", 100_000, 0)
                assert guest.ask(Op.UNLINK, ROOT, b"one\0") == b""
        assert said == errno.EDQUOT
        assert guest.ask(Op.RELEASE, ROOT, numbers(open_files[0], 0, 0)) == b""
        tail = numbers(open_files[1], 400_000) + struct.pack("<2IQ2I", 100_000, 0, 0, 0, 0) + bytes(100_000)
        assert guest.ask(Op.WRITE, ROOT, tail) == struct.pack("<II", 100_000, 0)
        other = guest.lookup(b"two")[0]
        assert guest.ask(Op.LINK, ROOT, numbers(other) + b"three\0") != errno.EDQUOT
        assert guest.ask(Op.UNLINK, ROOT, b"two\0") == b"", "its content has another name"
        assert guest.ask(Op.WRITE, ROOT, tail.replace(numbers(400_000), numbers(900_000))) == errno.EDQUOT


def test_a_kernel_that_forgets_nothing(guest, folder, monkeypatch):
    monkeypatch.setattr(nodes, "MAX_PATHS", 3)
    for name in ("b", "c", "d"):
        (folder / name).touch()
    assert [guest.lookup(name) for name in (b"a", b"b", b"c")] == [(2,), (3,), (4,)]
    assert guest.lookup(b"d") == errno.ENFILE
    assert guest.lookup(b"a") == (2,)
    guest.ask(Op.FORGET, 2, numbers(1))
    assert guest.lookup(b"d") == errno.ENFILE, "it was told of it twice"
    guest.ask(Op.FORGET, 2, numbers(2**64 - 1))
    assert guest.lookup(b"d") == (5,)


def test_deep_directories(guest, folder):
    here = ROOT
    for depth in range(1, 300):
        answer = guest.ask(Op.MKDIR, here, bytes(8) + b"d\0")
        if isinstance(answer, int):
            assert answer == errno.ENAMETOOLONG
            assert depth > 200
            break
        here = ENTRY.unpack_from(answer)[0]
    else:
        pytest.fail("no end")


NAMES = st.sampled_from([b"a", b"b"])
TARGETS = st.lists(st.sampled_from([b"..", b"a", b"b", b""]), min_size=1, max_size=3).map(b"/".join)
STEPS = st.one_of(
    st.tuples(st.just("mkdir"), NAMES, st.integers(0, 3)),
    st.tuples(st.just("symlink"), NAMES, st.integers(0, 3), TARGETS),
    st.tuples(st.just("rename"), NAMES, st.integers(0, 3), st.integers(0, 3), NAMES),
    st.tuples(st.just("link"), NAMES, st.integers(0, 3), st.integers(0, 3)),
    st.tuples(st.just("unlink"), NAMES, st.integers(0, 3)),
    st.tuples(st.just("rmdir"), NAMES, st.integers(0, 3)),
)


def follow(top, here, target, hops):
    """Return where a link leads, as a kernel follows it; ``None`` if it ever leaves ``top``. A loop stays."""
    for part in target.split("/"):
        if part in ("", "."):
            continue
        here = here.parent if part == ".." else here / part
        if not here.is_relative_to(top):
            return None
        if here.is_symlink() and hops[0]:
            hops[0] -= 1
            here = follow(top, here.parent, str(here.readlink()), hops)
            if here is None:
                return None
    return here


@example(steps=[("mkdir", b"a", 0), ("symlink", b"b", 1, b".."), ("rename", b"b", 1, 0, b"b")])
@example(
    steps=[
        ("mkdir", b"a", 0), ("mkdir", b"b", 1), ("symlink", b"a", 2, b"../.."), ("rename", b"b", 1, 0, b"b"),
    ]
)  # fmt: skip
@example(steps=[("mkdir", b"a", 0), ("symlink", b"b", 1, b".."), ("link", b"c", 0, 2)])
@settings(max_examples=3 * settings.default.max_examples)
@given(steps=st.lists(STEPS, max_size=25))
def test_no_link_ever_leads_out(tmp_path_factory, steps):
    top = tmp_path_factory.mktemp("top")
    inside = top / "inside"
    inside.mkdir()
    with Guest(inside) as guest:
        known = [ROOT]
        for what, name, where, *rest in steps:
            node = known[where % len(known)]
            answer = None
            if what == "mkdir":
                answer = guest.ask(Op.MKDIR, node, bytes(8) + name + b"\0")
            elif what == "symlink":
                answer = guest.ask(Op.SYMLINK, node, name + b"\0" + rest[0] + b"\0")
            elif what == "rename":
                to = known[rest[0] % len(known)]
                guest.ask(Op.RENAME, node, numbers(to) + name + b"\0" + rest[1] + b"\0")
            elif what == "link":
                guest.ask(Op.LINK, node, numbers(known[rest[0] % len(known)]) + name + b"\0")
            else:
                guest.ask(Op.UNLINK if what == "unlink" else Op.RMDIR, node, name + b"\0")
            if isinstance(answer, bytes):
                known.append(ENTRY.unpack_from(answer)[0])  # links, too: they can get more names
    assert names(top) == ["inside"]
    for path in inside.rglob("*"):
        if path.is_symlink():
            assert follow(inside, path.parent, str(path.readlink()), [40]), path


@settings(max_examples=5 * settings.default.max_examples)
@given(
    requests=st.lists(
        st.tuples(st.integers(0, 60), st.integers(0, 5), st.binary(max_size=120)), min_size=1, max_size=10
    )
)
def test_any_request_is_answered_or_ends_the_mount(tmp_path_factory, requests):
    top = tmp_path_factory.mktemp("top")
    (top / "inside" / "sub").mkdir(parents=True)
    (top / "inside" / "a").write_text("a")
    with Guest(top / "inside", limit=10**6) as guest:
        guest.lookup(b"a")
        guest.lookup(b"sub")
        for op, node, body in requests:
            try:
                guest.ask(op, node, body)
            except BadRequest:
                break
    assert names(top) == ["inside"]
