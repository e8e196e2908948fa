"""Symbolic links of a live mount: what a machine makes or moves leads no program of the host out of it."""

import errno
import struct

import pytest

from pytest_microvm.mounts.live import links
from support.live_guest import EXCHANGE, NOREPLACE, Guest


@pytest.fixture
def folder(tmp_path):
    inside = tmp_path / "inside"
    (inside / "build").mkdir(parents=True)
    (inside / "src" / "pkg").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    return inside


@pytest.fixture
def guest(folder):
    with Guest(folder) as one:
        yield one


@pytest.fixture(params=["absolute", "relative"])
def out(request, folder, tmp_path):
    """A link of the host that leads out: ``src/out``."""
    outside = tmp_path / "outside" if request.param == "absolute" else f"../../../{tmp_path.name}/outside"
    (folder / "src" / "out").symlink_to(outside)
    return folder / "src" / "out"


def made(answer):
    return isinstance(answer, bytes)


def test_link_that_leads_out_takes_no_other_name(guest, folder, out, tmp_path):
    assert made(guest.rmdir("build"))
    assert guest.rename("src/out", "build") == errno.EPERM
    assert guest.rename("src/out", "src/in") == errno.EPERM
    assert guest.rename("src/out", "src/pkg/out") == errno.EPERM
    assert guest.link("src/out", "build") == errno.EPERM
    assert out.is_symlink()
    assert not (folder / "build").is_symlink()
    assert made(guest.unlink("src/out"))


def test_folder_with_a_link_out_takes_no_other_name(guest, folder, out):
    assert guest.rename("src", "sources") == errno.EPERM
    assert guest.rename("src", "build/src") == errno.EPERM
    assert guest.rename("src", "build") == errno.EPERM, "an empty directory would be replaced"
    assert made(guest.rename("src/pkg", "pkg")), "nothing leads out of that"
    assert out.is_symlink()


@pytest.mark.parametrize(
    ("target", "path"),
    [
        ("src/out", "build/../x"), ("src/out/file", "x"), ("../src/out/file", "build/x"), ("src", "x"),
        (".", "x"), ("..", "build/x"), ("self/src", "x"), ("self/src/out", "x"), ("up", "src/pkg/x"),
    ],
)  # fmt: skip
def test_link_through_a_link_out_is_not_made(guest, folder, out, target, path):
    (folder / "self").symlink_to(".")
    (folder / "src" / "pkg" / "up").symlink_to("..")
    path = path.replace("build/../", "")
    assert guest.symlink(target, path) == errno.EPERM
    assert not (folder / path).is_symlink()


def test_link_to_nothing_does_not_lead_out_later(guest, folder, out):
    assert made(guest.symlink("m/out/file", "dangling"))
    assert guest.symlink("src", "m") == errno.EPERM
    assert guest.rename("src", "m") == errno.EPERM
    assert made(guest.symlink("src/pkg", "m"))
    assert guest.rename("src/out", "src/pkg/out") == errno.EPERM


def test_moved_link_is_judged_where_it_comes_to(guest, folder, out):
    assert made(guest.mkdir("build/deep"))
    assert made(guest.symlink("../src/out", "build/deep/link")), "build/src is not there"
    assert guest.rename("build/deep/link", "build/link") == errno.EPERM
    assert guest.rename("build/deep", "deep") == errno.EPERM
    assert made(guest.rename("build/deep/link", "build/deep/other"))


def test_moved_folder_changes_where_links_below_it_lead(guest, folder):
    for path in ("a", "a/b", "a/b/c"):
        guest.mkdir(path)
    assert made(guest.symlink("../..", "a/b/c/up"))
    assert guest.rename("a/b/c", "c") == errno.EPERM, "two above would be outside"
    assert made(guest.rename("a/b/c", "a/c"))
    assert made(guest.rename("a/c", "a/b/d"))
    assert made(guest.rename("a/b", "b"))
    assert (folder / "b" / "d" / "up").resolve() == folder


def test_links_within_the_folder_are_made_and_moved(guest, folder):
    """As package managers do it: programs, workspaces, versions."""
    for path in ("node_modules", "node_modules/.bin", "node_modules/tool", "v1"):
        guest.mkdir(path)
    guest.create("node_modules/tool/cli.js")
    assert made(guest.symlink("../tool/cli.js", "node_modules/.bin/tool"))
    assert made(guest.symlink("../src/pkg", "node_modules/pkg"))
    assert made(guest.symlink("v1", "current"))
    assert made(guest.symlink("v2", "next"))
    assert made(guest.rename("next", "current")), "a link replaces a link"
    assert made(guest.rename("node_modules", ".node_modules-old"))
    assert made(guest.rename(".node_modules-old", "node_modules"))
    assert made(guest.symlink("../..", "node_modules/.bin/top"))
    assert (folder / "node_modules" / "pkg").resolve() == folder / "src" / "pkg"


def test_files_are_not_exchanged(guest, folder, out):
    for flag in (EXCHANGE, NOREPLACE):
        assert guest.rename("src/out", "build", flag) == errno.EINVAL
        assert guest.rename("build", "src/pkg", flag) == errno.EINVAL
    assert out.is_symlink()
    assert not (folder / "build").is_symlink()


def test_no_link_leads_to_git_s_own_files(guest, folder):
    (folder / ".git").mkdir()
    (folder / "git").symlink_to(".git")
    for target in (".git/config", "src/../.git", "git/config", "git", ".GIT"):
        assert guest.symlink(target, "report.txt") == errno.EPERM
    assert guest.rename("git", "src/git") == errno.EPERM
    assert made(guest.symlink("src/.gitignore", "report.txt"))


def test_link_of_the_host_that_climbs_back_is_not_turned(guest, folder):
    """``src/pkg/one/../../x`` leads to ``src/x``, as long as ``one`` is no link to a higher place."""
    (folder / "src" / "pkg" / "one").mkdir()
    (folder / "climbing").symlink_to("src/pkg/one/../../../build")
    assert made(guest.rmdir("src/pkg/one"))
    assert guest.symlink("../..", "src/pkg/one") == errno.EPERM
    assert guest.symlink("../../../build", "src/pkg/one") == errno.EPERM
    assert guest.symlink("../../src/pkg", "src/pkg/one") == errno.EPERM
    assert guest.rename("climbing", "other") == errno.EPERM
    assert made(guest.symlink("two", "src/pkg/one"))
    (folder / "src" / "pkg" / "two").mkdir()
    assert (folder / "climbing").resolve() == folder / "build"


def test_guest_cannot_redirect_a_climbing_host_link(guest, folder):
    """``one/up/../build`` leads to ``one/build``, as long as ``one/up`` is no link to a higher place."""
    (folder / "one").mkdir()
    (folder / "climbing").symlink_to("one/up/../build")
    (folder / "src" / "pkg" / "up").symlink_to("../..")
    assert made(guest.rmdir("one"))
    assert guest.symlink("src/pkg", "one") == errno.EPERM
    assert guest.rename("src/pkg", "one") == errno.EPERM
    assert guest.rename("src", "one") == errno.EPERM
    assert made(guest.unlink("src/pkg/up"))
    assert made(guest.symlink("src/pkg", "one"))


def test_what_is_too_large_is_not_judged(guest, folder, monkeypatch):
    for number in range(60):
        (folder / "src" / f"{number}").touch()
    monkeypatch.setattr(links, "MAX_STEPS", 50)
    assert guest.rename("src", "sources") == errno.EXDEV, "mv copies it"
    assert guest.symlink("src", "x") == errno.EPERM
    assert made(guest.rename("src/1", "src/one")), "files are not judged"


def test_loops_and_long_chains_end(guest, folder):
    assert made(guest.symlink("b", "a"))
    assert made(guest.symlink("a", "b"))
    assert made(guest.symlink("a/x", "c"))
    for number in range(60):
        assert made(guest.symlink(f"chain{number + 1}", f"chain{number}"))
    assert made(guest.symlink("chain0", "begin"))
    assert made(guest.rename("a", "src/a"))
    assert made(guest.symlink("/".join(["src", *["."] * 500, "pkg"]), "dots"))


def test_host_moves_what_is_looked_at(guest, folder, tmp_path):
    """A node is a place: where a directory of the host has become a link, nothing is judged or made."""
    node = guest.node("src/pkg")
    (folder / "src").rename(tmp_path / "taken")
    (folder / "src").symlink_to(tmp_path / "taken")
    assert guest.ask(6, node, b"x\0a\0") == errno.ENOENT
    assert guest.ask(9, node, struct.pack("<2I", 0o755, 0) + b"x\0") == errno.ENOENT
    assert not any((tmp_path / "taken" / "pkg").iterdir())
