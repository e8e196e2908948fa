"""Hostile archives: nothing outside the folder is touched, and nothing inside leads out."""

import contextlib
import errno
import io
import os
import stat
import sys
import tarfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_microvm.agent.transfer import put
from pytest_microvm.errors import TransferError
from pytest_microvm.untrusted import extraction
from pytest_microvm.untrusted.extraction import ExtractionLimits, extract


@pytest.fixture
def inside(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious").write_text("precious")
    folder = tmp_path / "inside"
    folder.mkdir()
    yield folder
    assert [path.name for path in tmp_path.iterdir()] in (["outside", "inside"], ["inside", "outside"])
    assert [path.name for path in (tmp_path / "outside").iterdir()] == ["precious"]
    assert (tmp_path / "outside" / "precious").read_text() == "precious"
    assert stat.S_IMODE((tmp_path / "outside").stat().st_mode) & 0o077 == 0o055
    for path in folder.rglob("*"):
        assert path.resolve().is_relative_to(folder.resolve()), "a link leads out"


def member(name, kind=tarfile.REGTYPE, data=b"", **fields):
    info = tarfile.TarInfo(name)
    info.type = kind
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def folder(name, **fields):
    return member(name, tarfile.DIRTYPE, **{"mode": 0o755, **fields})


def link(name, target):
    return member(name, tarfile.SYMTYPE, linkname=target)


def hard(name, target):
    return member(name, tarfile.LNKTYPE, linkname=target)


def archive_of(*members, form=tarfile.PAX_FORMAT):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def unpack(data, into):
    extract(io.BytesIO(data), into)


def test_an_honest_archive(inside):
    unpack(
        archive_of(
            folder("."),
            folder("./a", mode=0o750),
            member("./a/script", data=b"#!/bin/sh\n", mode=0o755, mtime=1_000_000_000),
            link("./a/self", "script"),
            link("./up", "a/script"),
            link("./a/root", ".."),
            hard("./twin", "./a/script"),
            member("implied/folders/file", data=b"x" * 1_000_000),
            member("n" * 200 + "/" + "m" * 200, data=b"long"),
        ),
        inside,
    )
    assert (inside / "twin").read_bytes() == b"#!/bin/sh\n"
    assert (inside / "a" / "script").stat().st_mtime == 1_000_000_000
    assert stat.S_IMODE((inside / "a" / "script").stat().st_mode) == 0o755
    assert (inside / "up").read_bytes() == b"#!/bin/sh\n"
    assert (inside / "implied" / "folders" / "file").stat().st_size == 1_000_000
    assert (inside / ("n" * 200) / ("m" * 200)).read_bytes() == b"long"


@pytest.mark.parametrize(
    "members",
    [
        [member("../outside/new", data=b"x")],
        [member("a/../../outside/new", data=b"x")],
        [member("..", tarfile.DIRTYPE, mode=0o777)],
        [folder("../outside", mode=0o777)],
        [member("/tmp/absolute", data=b"x")],
        [folder("/tmp/absolute")],
        [member("", data=b"x")],
        [member(".", data=b"x")],
        [link("x", "/etc")],
        [link("x", "..")],
        [link("x", "../outside")],
        [link("a/x", "../..")],
        [link("x", "")],
        [link("loop", "."), link("x", "loop/..")],
        [folder("a"), link("d", "a"), link("x", "d/../../outside")],
        [link("x", "y/.."), link("y", ".")],
        [link("x", "outside"), member("x/new", data=b"x")],
        [folder("a"), link("x", "a"), member("x/new", data=b"x")],
        [folder("a"), link("x", "a"), folder("x/new")],
        [folder("a"), link("x", "a"), link("x/y", "..")],
        [hard("x", "/etc/passwd")],
        [hard("x", "../outside/precious")],
        [hard("x", "missing")],
        [link("l", "missing"), hard("x", "l")],
        [folder("a"), hard("x", "a")],
        [folder("a"), link("l", "a"), member("a/f"), hard("x", "l/f")],
        [hard("x", "")],
        [member("dev", tarfile.CHRTYPE, devmajor=1, devminor=3)],
        [member("dev", tarfile.BLKTYPE, devmajor=8, devminor=0)],
        [member("fifo", tarfile.FIFOTYPE)],
        [member("x", b"9", data=b"y"), member("fifo", tarfile.FIFOTYPE)],
        [member("n" * 300, data=b"x")],
        [member("/".join(["n" * 200] * 30), data=b"x")],
        [member("f", data=b"x"), member("f/below", data=b"x")],
        [folder("d"), member("d", data=b"x")],
        [folder("d"), link("d", "elsewhere")],
        [member("x", data=b"x", pax_headers={"path": "../outside/new"})],
        [member("x", tarfile.SYMTYPE, linkname="y", pax_headers={"linkpath": "../outside"})],
        [member("x", data=b"x", pax_headers={"size": "-1"})],
    ],
    ids=lambda members: " ".join(f"{info.name[:20]}>{info.linkname}" for info, _data in members),
)
def test_refused(inside, members):
    with pytest.raises(TransferError):
        unpack(archive_of(*members), inside)


def test_what_came_before_a_refusal_stays_inside(inside):
    with pytest.raises(TransferError, match=r"'\.\./x', which is refused: a path with \.\."):
        unpack(archive_of(member("first", data=b"1"), member("../x", data=b"2"), member("last")), inside)
    assert [path.name for path in inside.iterdir()] == ["first"]


def test_a_link_is_replaced_not_followed(inside):
    unpack(archive_of(member("f", data=b"target"), link("x", "f"), member("x", data=b"replaced")), inside)
    assert (inside / "f").read_bytes() == b"target"
    assert (inside / "x").read_bytes() == b"replaced"
    assert not (inside / "x").is_symlink()


def test_a_hard_link_is_not_written_through(inside):
    unpack(archive_of(member("f", data=b"first"), hard("x", "f"), member("x", data=b"second")), inside)
    assert (inside / "f").read_bytes() == b"first"


def test_a_folder_replaces_a_link_to_one(inside):
    unpack(archive_of(folder("a"), link("x", "a"), folder("x"), member("x/f", data=b"x")), inside)
    assert list((inside / "a").iterdir()) == []
    assert (inside / "x" / "f").read_bytes() == b"x"


def test_links_that_were_there_before_are_not_followed(inside):
    (inside / "x").symlink_to("../outside")
    with pytest.raises(TransferError, match="a path through 'x', which is no folder"):
        unpack(archive_of(member("x/new", data=b"x")), inside)
    (inside / "x").unlink()


def test_rights_owners_and_times_are_tamed(inside):
    unpack(
        archive_of(
            member("suid", mode=0o7777, uid=12345, gid=12345, mtime=2**40),
            member("early", mode=0, mtime=-5, pax_headers={"mtime": "nan"}),
            folder("open", mode=0o7777, uid=12345),
        ),
        inside,
    )
    for name, mode in (("suid", 0o755), ("early", 0o600), ("open", 0o755)):
        found = (inside / name).stat()
        assert (stat.S_IMODE(found.st_mode), found.st_uid) == (mode, os.getuid())


def header(name=b"x", size=b"00000000000", kind=b"0"):
    """A raw header block with a right checksum."""
    block = bytearray(512)
    block[0 : len(name)] = name
    block[100:108] = b"0000644\0"
    block[124 : 124 + len(size)] = size
    block[136:148] = b"00000000000\0"
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


NEGATIVE = b"\xff" * 12
HUGE = b"\x80" + (2**62).to_bytes(11, "big")


@pytest.mark.parametrize(
    "data",
    [
        header(size=NEGATIVE) + bytes(1024),
        header(kind=b"x", size=NEGATIVE) + bytes(1024),
        header(kind=b"L", size=NEGATIVE) + bytes(1024),
        header(size=HUGE) + bytes(4096),
        header(kind=b"x", size=HUGE) + bytes(4096),
        header(kind=b"g", size=HUGE) + bytes(4096),
        header(kind=b"L", size=HUGE) + bytes(4096),
        header(kind=b"K", size=HUGE) + bytes(4096),
        header(kind=b"S", size=HUGE) + bytes(4096),
        (header(kind=b"x", size=b"00000000020") + b"16 path=innocent".ljust(512, b"\0")) * 3000,
        b"",
        b"garbage" * 1000,
        bytes(100),
        header(size=b"00000010000") + b"short",
        header(kind=b"x", size=b"00000000020") + b"99999 path=x\n".ljust(512, b"\0") + header(),
    ],
    ids=["negative", "negative-pax", "negative-name", "huge", "huge-pax", "huge-global", "huge-name",
         "huge-link", "huge-sparse", "endless-headers", "nothing", "garbage", "too-short", "truncated",
         "bad-pax"],
)  # fmt: skip
def test_damaged(inside, data):
    with pytest.raises(TransferError):
        unpack(data, inside)


def test_an_announcement_is_not_believed(inside):
    """A header that announces terabytes of name must not be read into memory."""

    class Endless(io.RawIOBase):
        given = 0

        def readable(self):
            return True

        def readinto(self, buffer):
            Endless.given += len(buffer)
            assert Endless.given < 10_000_000
            buffer[:] = bytes(len(buffer))
            return len(buffer)

    first = io.BytesIO(header(kind=b"L", size=HUGE))

    class Source:
        def read(self, size):
            return first.read(size) or endless.read(size)

    endless = Endless()
    with pytest.raises(TransferError, match="too long"):
        extract(Source(), inside)


def test_limits(inside, monkeypatch):
    monkeypatch.setattr(extraction, "MAX_ENTRIES", 3)
    with pytest.raises(TransferError, match="more than 3 entries"):
        unpack(archive_of(*[member(str(number)) for number in range(4)]), inside)
    monkeypatch.setattr(extraction, "MAX_BYTES", 100)
    with pytest.raises(TransferError, match="100 bytes"):
        unpack(archive_of(member("a", data=b"x" * 60), member("b", data=b"x" * 60)), inside)


def test_a_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(OSError, match="missing"):
        unpack(archive_of(member("a")), tmp_path / "missing")


NAMES = st.sampled_from(["a", "b", "c", "a/b", "a/b/c", "b/a", "..", "a/..", "/etc", "./a", "", "a//b"])
TARGETS = st.sampled_from(
    ["a", "b", "..", "../..", ".", "a/..", "../a", "../b/..", "/", "b/a", "../../outside"]
)
MEMBERS = st.one_of(
    st.builds(lambda name: member(name, data=b"data"), NAMES),
    st.builds(folder, NAMES),
    st.builds(link, NAMES, TARGETS),
    st.builds(hard, NAMES, NAMES),
)


@settings(
    max_examples=3 * settings.default.max_examples,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(members=st.lists(MEMBERS, max_size=8), cut=st.integers(0, 12_000))
def test_no_combination_gets_out(tmp_path_factory, members, cut):
    root = tmp_path_factory.mktemp("x")
    place = root / "inside"
    place.mkdir()
    data = archive_of(*members)
    with contextlib.suppress(TransferError):
        unpack(data[: len(data) - cut], place)
    assert [path.name for path in root.iterdir()] == ["inside"]
    for path in place.rglob("*"):
        try:
            where = path.resolve()
        except (OSError, RuntimeError):  # a loop of links leads nowhere
            continue
        assert where.is_relative_to(place.resolve())


def test_putting_replaces_links_and_merges_folders(tmp_path):
    received, final = tmp_path / "received", tmp_path / "final"
    (received / "sub").mkdir(parents=True)
    (received / "sub" / "f").write_text("new")
    (received / "dangling").symlink_to("nowhere")
    (final / "sub").mkdir(parents=True)
    (final / "sub" / "g").write_text("old")
    (final / "dangling").symlink_to("/etc/passwd")
    put(received, final)
    assert sorted(path.name for path in (final / "sub").iterdir()) == ["f", "g"]
    assert str((final / "dangling").readlink()) == "nowhere"


def test_it_works_without_the_filters_of_newer_releases(inside, monkeypatch):
    monkeypatch.delattr(tarfile, "data_filter", raising=False)
    assert sys.version_info >= (3, 10)
    unpack(archive_of(member("a", data=b"x")), inside)
    assert (inside / "a").read_bytes() == b"x"


def pax(*records):
    """An extended header with ``records`` as they are, and its size."""
    body = b"".join(
        next(
            line
            for length in range(len(record) + 3, len(record) + 9)
            if len(line := b"%d %s\n" % (length, record)) == length
        )
        for record in records
    )
    return header(kind=b"x", size=b"%011o" % len(body)) + body.ljust(-(-len(body) // 512) * 512, b"\0")


SPARSE = [
    pax(b"GNU.sparse.major=1", b"GNU.sparse.minor=0", b"GNU.sparse.name=x"),
    pax(b"GNU.sparse.map=0,1", b"GNU.sparse.size=1"),
    pax(b"GNU.sparse.size=1", b"GNU.sparse.offset=0", b"GNU.sparse.numbytes=1"),
    pax(b"GNU.sparse.realsize=9"),
]


@pytest.mark.parametrize("attributes", SPARSE)
def test_sparse_members_are_refused_before_their_map_is_read(inside, attributes):
    """tarfile would read a map as long as the machine likes: 10 GiB of ``0\\n`` as a list of numbers."""

    class Endless(io.RawIOBase):
        given = 0

        def readable(self):
            return True

        def readinto(self, buffer):
            Endless.given += len(buffer)
            assert Endless.given < 10_000_000, "it goes on reading"
            buffer[:] = (b"9" * 9 + b"\n" + b"0\n" * len(buffer))[: len(buffer)]
            return len(buffer)

    class Source:
        first = io.BytesIO(attributes + header(size=b"77777777777"))
        rest = Endless()

        def read(self, size):
            return self.first.read(size) or self.rest.read(size)

    with pytest.raises(TransferError, match="a sparse file"):
        extract(Source(), inside)


@pytest.mark.parametrize("kind", [b"x", b"L", b"K"])
def test_headers_about_the_next_do_not_pile_up(inside, kind):
    """Each is kept until the member comes that they are about."""
    more = header(kind=kind, size=b"00000001000") + b"9 path=y\n".ljust(512, b"\0")
    with pytest.raises(TransferError, match="too many headers"):
        unpack(more * 20 + header() + bytes(1024), inside)
    unpack(more * 3 + header() + bytes(1024), inside)


def test_attributes_of_all_that_follows_are_refused(inside):
    """tarfile keeps them: a 64 KiB header before each of a million members would be 64 GiB."""
    body = header(kind=b"g", size=b"00000001000") + b"9 note=y\n".ljust(512, b"\0")
    with pytest.raises(TransferError, match="all that follows"):
        unpack(body + header() + bytes(1024), inside)


def test_archive_path_beyond_256_folders_is_refused(inside):
    with pytest.raises(TransferError, match="256 folders inside each other"):
        unpack(archive_of(member("d/" * 2000 + "f", data=b"x")), inside)
    unpack(archive_of(member("d/" * 200 + "f", data=b"x")), inside)


def test_folders_that_a_path_implies_count(inside, monkeypatch):
    monkeypatch.setattr(extraction, "MAX_ENTRIES", 10)
    with pytest.raises(TransferError, match="more than 10 entries"):
        unpack(archive_of(member("a/b/c/d/e/f", data=b"x"), member("1/2/3/4/5/6"), member("x")), inside)


# Terms


def received(*members):
    return io.BytesIO(archive_of(*members))


def test_what_leads_out_can_be_left_out(inside):
    left_out = {}
    members = [
        member("good", data=b"1"), link("bad", "/etc/passwd"), link("d/up", "../../x"),
        member("pipe", tarfile.FIFOTYPE), member("disk", tarfile.BLKTYPE), link("d/fine", "../good"),
        member("last", data=b"2"),
    ]  # fmt: skip
    extract(received(*members), inside, ExtractionLimits(left_out=left_out))
    assert sorted(path.name for path in inside.rglob("*")) == ["d", "fine", "good", "last"]
    assert left_out == {
        "bad": "a link that may lead out",
        "d/up": "a link that may lead out",
        "pipe": "neither a file, a folder nor a link",
        "disk": "neither a file, a folder nor a link",
    }


def test_what_is_left_out_costs_memory(inside):
    members = [link(f"bad{number}", "/x") for number in range(extraction._MAX_LEFT_OUT + 1)]
    with pytest.raises(TransferError, match="may lead out"):
        extract(received(*members), inside, ExtractionLimits(left_out={}))


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x"])
def test_names_that_lead_out_are_never_left_out(inside, name):
    with pytest.raises(TransferError):
        extract(received(link(name, "/x")), inside, ExtractionLimits(left_out={}))


def test_a_link_that_the_host_handed_over_may_come_back(inside):
    terms = ExtractionLimits(links={"venv/python": "/usr/bin/python3"})
    extract(received(link("venv/python", "/usr/bin/python3")), inside, terms)
    assert str((inside / "venv" / "python").readlink()) == "/usr/bin/python3"
    (inside / "venv" / "python").unlink()
    for other in (link("venv/python", "/etc/passwd"), link("python", "/usr/bin/python3")):
        with pytest.raises(TransferError, match="may lead out"):
            extract(received(other), inside, terms)


def test_long_names_count_as_more(inside):
    members = [
        member(f"{number}/" + "n" * 200 + "/" + "m" * 200 + "/" + "o" * 200, data=b"") for number in range(3)
    ]
    with pytest.raises(TransferError, match="more than 5 entries"):
        extract(received(*members), inside, ExtractionLimits(max_entries=5))


def test_a_name_that_the_host_cannot_have_can_be_left_out(inside):
    left_out = {}
    members = [
        member("n" * 300, data=b"1"),
        folder("d" * 256),
        link("l" * 256, "good"),
        member("good", data=b"2"),
    ]
    extract(received(*members), inside, ExtractionLimits(left_out=left_out))
    assert [path.name for path in inside.iterdir()] == ["good"]
    assert set(left_out) == {"n" * 300, "d" * 256, "l" * 256}
    assert set(left_out.values()) == {"the host cannot name it so (File name too long)"}
    with pytest.raises(TransferError, match="File name too long"):
        extract(received(*members), inside)


def test_full_disk_during_extraction_is_a_transfer_error(inside, monkeypatch):
    def full(*_arguments, **_options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "mkdir", full)
    for left_out in (None, {}):
        with pytest.raises(TransferError, match="No space left on device"):
            extract(received(member("d/e/f", data=b"1")), inside, ExtractionLimits(left_out=left_out))


def test_a_hard_link_has_as_many_bytes(inside):
    """What is taken over of it is a file of its own: a small archive must not fill the host's disk."""
    members = [member("a", data=b"123"), *(hard(f"b{number}", "a") for number in range(3))]
    extract(received(*members), inside, ExtractionLimits(max_bytes=12))
    with pytest.raises(TransferError, match="11 bytes"):
        extract(received(*members), inside, ExtractionLimits(max_bytes=11))


def test_bytes_are_limited(inside):
    extract(received(member("a", data=b"12"), member("b", data=b"34")), inside, ExtractionLimits(max_bytes=4))
    with pytest.raises(TransferError, match="4 bytes"):
        extract(
            received(member("a", data=b"12"), member("b", data=b"345")), inside, ExtractionLimits(max_bytes=4)
        )
