"""Archives of layers are a stranger's data: what they add and hide, and which are refused."""

import io
import tarfile

import pytest

from pytest_microvm.errors import PullError
from pytest_microvm.images.oci import contents
from pytest_microvm.images.oci.contents import Attributes, inspect
from support.oci import archive, folder, hard_link, member, symlink


def seen(*members):
    return inspect(io.BytesIO(archive(members)))


def names(found):
    return sorted(path for paths in found.names.values() for path in paths)


def test_files_folders_and_links():
    found = seen(
        folder("./"),
        folder("./etc/", mode=0o751, uid=3, gid=4, mtime=77),
        member("./etc/motd", "hello"),
        symlink("bin", "/usr/bin"),
        hard_link("etc/issue", "./etc/motd"),
        member("/opt/app", "x", mode=0o4755),
    )
    assert found.folders == {"etc": Attributes(0o751, 3, 4, 77), "opt": None}
    assert found.implied == ["opt"]
    assert names(found) == ["bin", "etc/issue", "etc/motd", "opt/app"]
    assert ["etc/motd", "etc/issue"] in found.names.values()
    assert found.entries == 6


def test_whiteouts():
    found = seen(
        folder("a"), member("a/.wh.old"), member(".wh.top"), folder("b"), member("b/.wh..wh..opq"),
        member("a/new", "x"), member("a/.wh.new"),
    )  # fmt: skip
    assert found.whiteouts == {"a/old", "top"}
    assert found.opaque == {"b"}
    assert names(found) == ["a/new"]  # it replaces what it hides


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_folder_that_replaces_a_hidden_one_is_not_merged_with_it(order):
    parts = [[member("d/.wh.sub")], [folder("d/sub"), member("d/sub/x", "x")]]
    found = seen(*parts[order[0]], *parts[order[1]])
    assert (found.whiteouts, found.opaque) == (set(), {"d/sub"})


def test_whiteout_of_everything():
    found = seen(member(".wh..wh..opq"), member("x", "x"), member("d/.wh.y"))
    assert (found.opaque, found.whiteouts) == ({""}, set())


def test_nothing_is_hidden_in_folders_that_hide_everything():
    found = seen(member("a/.wh..wh..opq"), member("a/b/.wh.x"), member("a/.wh.y"), member("c/.wh.z"))
    assert (found.opaque, found.whiteouts) == ({"a"}, {"c/z"})


def test_records_of_aufs_are_skipped():
    found = seen(
        folder(".wh..wh.plnk"), member(".wh..wh.plnk/1.2", "x"), member(".wh..wh.aufs"), member("x", "x")
    )
    assert (names(found), found.folders, found.whiteouts) == (["x"], {}, set())


def test_last_member_of_a_name_wins_and_links_stay_with_the_first():
    found = seen(member("a", "one"), hard_link("b", "a"), member("a", "three"))
    assert found.names == {0: ["b"], 2: ["a"]}


def test_folder_may_come_after_its_content_and_twice():
    found = seen(member("d/x", "x"), folder("d", mode=0o700), folder("d", mode=0o711))
    assert found.folders == {"d": Attributes(0o711, 0, 0, 0)}


def test_capabilities_are_kept_and_overlay_attributes_are_not():
    xattrs = {
        "SCHILY.xattr.security.capability": "\x01\x00\x00\x02",
        "SCHILY.xattr.user.note": "n",
        "SCHILY.xattr.user.overlay.opaque": "y",
        "SCHILY.xattr.trusted.overlay.redirect": "/etc",
        "SCHILY.xattr.security.selinux": "s",
        "comment": "c",
    }
    found = seen(folder("d", pax_headers=xattrs))
    assert found.folders["d"].xattrs == tuple(list(xattrs.items())[:2])


@pytest.mark.parametrize("mtime", [-1, 2**40, 1.5])
def test_times_are_bounded(mtime):
    assert 0 <= seen(folder("d", mtime=mtime)).folders["d"].mtime <= 2**32 - 1


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e400", "soon"])
def test_times_that_are_no_numbers_are_zero_or_bounded(text):
    found = seen(folder("d", pax_headers={"mtime": text}))
    assert found.folders["d"].mtime in (0, 2**32 - 1)


def test_empty_archives():
    assert inspect(io.BytesIO()).entries == 0
    assert inspect(io.BytesIO(b"\0" * 1024)).entries == 0


def test_global_attributes_are_skipped():
    data = archive([member("x", "x")])
    info = tarfile.TarInfo("pax_global_header")
    header = info.create_pax_global_header({"comment": "0" * 40, "path": "/etc/passwd"})
    assert names(inspect(io.BytesIO(header + data))) == ["x"]


@pytest.mark.parametrize(
    ("members", "why"),
    [
        ([member("../etc/passwd", "x")], "leads out of the image"),
        ([member("a/../../x", "x")], "leads out of the image"),
        ([hard_link("x", "../../etc/shadow")], "leads out of the image"),
        ([member("x", "x", pax_headers={"path": "a\0b"})], "a name that is impossible"),
        ([member("n" * 256, "x")], "a name that is impossible"),
        ([member("d/" * 2050 + "x", "x")], "a name that is impossible"),
        ([member("d/" * 300 + "x", "x")], "more than 256 folders inside each other"),
        ([symlink("etc", "/"), member("etc/passwd", "x")], "above it, is no folder in the same layer"),
        ([member("f", "x"), member("f/x", "x")], "above it, is no folder in the same layer"),
        ([folder("d"), member("d", "x")], "it is a folder before in the same layer"),
        ([member("d/x", "x"), symlink("d", "/")], "it is a folder before in the same layer"),
        ([member("d", "x"), folder("d")], "something else before in the same layer"),
        ([hard_link("x", "bin/sh")], "which is not before it in the same layer"),
        ([folder("d"), hard_link("x", "d")], "a hard link to a folder"),
        ([member("x", type=tarfile.CHRTYPE)], "an overlay file system's sign for a whiteout"),
        ([member("x", type=tarfile.BLKTYPE, devmajor=4096)], "a device number that is impossible"),
        ([member("x", type=b"Z")], "neither a file, a folder, a link nor a device"),
        ([symlink("x", "a" * 4096)], "a link's target that is impossible"),
        ([member("x", "x", uid=2**32 - 1)], "an owner that is impossible"),
        ([member("x", "x", pax_headers={"gid": "-5"})], "an owner that is impossible"),
        ([member("x", "x", pax_headers={"size": "-512"})], "a size that is impossible"),
        ([member("x", "x", pax_headers={"GNU.sparse.map": "0,1", "GNU.sparse.size": "9"})], "a sparse file"),
        ([member("x", type=tarfile.GNUTYPE_SPARSE)], "a sparse file"),
        ([member("x", "x", pax_headers={"comment": "c" * 70_000})], "too long"),
        ([member(".wh.d/x", "x")], "has the name of a whiteout"),
        ([member("d/.wh...")], "a whiteout of nothing"),
        ([member(".", "x")], "takes the place of the root"),
    ],
)
def test_member_is_refused(members, why):
    with pytest.raises(PullError, match=why) as caught:
        seen(*members)
    assert caught.value.reason == "refused"


@pytest.mark.parametrize("end", [700, 1030, 1500])
def test_archive_that_ends_too_early_is_refused(end):
    data = archive([member("a", "a" * 600), member("b", "b" * 600)])
    with pytest.raises(PullError, match="its archive is damaged"):
        inspect(io.BytesIO(data[:end]))


def test_damaged_header_is_not_the_end():
    data = bytearray(archive([member("a", "a"), member("b", "b")]))
    data[1024 + 148] ^= 1  # the second header's checksum
    with pytest.raises(PullError, match="no header at byte 1024"):
        inspect(io.BytesIO(bytes(data)))


def test_number_of_entries_is_bounded(monkeypatch):
    monkeypatch.setattr(contents, "MAX_ENTRIES", 3)
    assert seen(*(member(str(n), "x") for n in range(3))).entries == 3
    with pytest.raises(PullError, match="more than 3 entries"):
        seen(*(member(str(n), "x") for n in range(4)))


def test_number_of_owners_is_bounded(monkeypatch):
    monkeypatch.setattr(contents, "_MAX_IDS", 3)
    with pytest.raises(PullError, match="more than 3 different owners"):
        seen(*(member(str(n), "x", uid=n) for n in range(4)))


def test_names_in_errors_are_shown_safely():
    with pytest.raises(PullError) as caught:
        seen(member("\x1b]0;title\x07/../x", "x"))
    assert "\x1b" not in str(caught.value)
