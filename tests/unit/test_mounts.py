"""How a mount is written."""

from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_microvm.errors import UsageError
from pytest_microvm.settings.mounts import Mount, parse_mount, parse_mounts

HERE = Path("/home/me/project")


@pytest.mark.parametrize(
    ("text", "mount"),
    [
        ("out:/out", Mount(HERE / "out", PurePosixPath("/out"), "rw", "copy")),
        ("data:/data:ro", Mount(HERE / "data", PurePosixPath("/data"), "ro", "copy")),
        (".:/code/repo:git", Mount(HERE, PurePosixPath("/code/repo"), "rw", "git")),
        ("/srv/a b:/data/x:rw:live", Mount(Path("/srv/a b"), PurePosixPath("/data/x"), "rw", "live")),
        ("x:/x:copy:ro", Mount(HERE / "x", PurePosixPath("/x"), "ro", "copy")),
        ("x:/x/", Mount(HERE / "x", PurePosixPath("/x"))),
        ("x://x/./y", Mount(HERE / "x", PurePosixPath("/x/y"))),
    ],
)
def test_what_is_written_is_what_is_meant(text, mount):
    assert parse_mount(text, "here", HERE) == mount


def test_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/you")
    assert parse_mount("~/data:/data", "here", HERE).source == Path("/home/you/data")


def test_it_is_written_as_it_is_read():
    mount = Mount(Path("/srv/data"), PurePosixPath("/data"), "ro", "git")
    assert parse_mount(str(mount), "here", HERE) == mount


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("data", "invalid mount: expected a source and a target"),
        ("", "invalid mount: expected a source and a target"),
        (None, "invalid mount: expected a source and a target"),
        (7, "invalid mount: expected a source and a target"),
        ("a:/b:ro:copy:x", "invalid mount: expected a source and a target"),
        ("data:data", "invalid target: expected an absolute path"),
        (":/data", "invalid source: expected a path, got"),
        ("  :/data", "invalid source: expected a path, got"),
        ("da\nta:/data", "invalid source: expected a path, got"),
        ("a\0b:/data", "invalid source: expected a path, got"),
        ("C:\\data:/data", "invalid target: expected an absolute path"),
        ("C:/data:/data", "unknown word '/data'"),
        ("..\\data:/data", "invalid source: expected a path without backslashes"),
        ("data:/data:r", "unknown word 'r'"),
        ("data:/data:RO", "unknown word 'RO'"),
        ("data:/data:", "unknown word ''"),
        ("data:/data:ro:rw", "expected one access and one kind"),
        ("data:/data:git:copy", "expected one access and one kind"),
        ("data:/", "invalid target: expected a directory that is not the system's own"),
        ("data:/proc/1", "invalid target: expected a directory that is not the system's own"),
        ("data://proc/x", "invalid target: expected a directory that is not the system's own"),
        ("data:/dev", "invalid target: expected a directory that is not the system's own"),
        ("data:/a/../b", "without .."),
        ("data:/a\nb", "invalid target: expected an absolute path without .."),
        ("data:/" + "a/" * 3000, "expected less than 4096 bytes"),
        ("~nobody-of-that-name/x:/x", "write the path out"),
    ],
)
def test_anything_else_is_refused(value, message):
    with pytest.raises(UsageError, match=message):
        parse_mount(value, "here", HERE)


@pytest.mark.parametrize("target", ["data", "//proc/x", "/..", "/"])
def test_places_that_no_machine_has(target):
    with pytest.raises(UsageError):
        Mount(HERE, PurePosixPath(target))


@pytest.mark.parametrize("value", ["data:/data", None, 3, {"a": 1}])
def test_a_list_is_a_list(value):
    with pytest.raises(UsageError, match="invalid mounts: expected a list"):
        parse_mounts(value, "here", HERE)


def test_a_list():
    one, two = parse_mounts(["a:/a", "b:/b:ro"], "here", HERE)
    assert (one.target, two.access) == (PurePosixPath("/a"), "ro")
    assert parse_mounts([one, two], "here", HERE) == (one, two)
    assert hash(one) != hash(two)


@pytest.mark.parametrize("texts", [["a:/x", "b:/x"], ["a:/x", "b:/x/y"], ["a:/x/y/z", "b:/x"]])
def test_places_within_each_other(texts):
    with pytest.raises(UsageError, match="expected separate directories"):
        parse_mounts(texts, "here", HERE)


@given(st.text())
def test_any_text_parses_to_a_mount_or_a_usage_error(text):
    try:
        mount = parse_mount(text, "here", HERE)
    except UsageError as error:
        assert "here" in str(error) or "write the path out" in str(error)  # noqa: PT017 - either is right
    else:
        assert mount.source.is_absolute()
        assert mount.target.is_absolute()
        assert ".." not in mount.target.parts
