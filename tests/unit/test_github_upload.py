"""Files that a branch named, made fit for an upload."""

import os

from pytest_microvm.ci.github.upload import make_uploadable
from support.github.actions import _REFUSED


def names(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file() or path.is_symlink())


def test_every_name_can_be_uploaded(tmp_path):
    (tmp_path / "a:b").mkdir()
    for name in ('a:b/c"d', "a:b/x\ny", "<é>", "plain.txt", "a\\b", os.fsdecode(b"\xff")):
        (tmp_path / name).write_bytes(os.fsencode(name))
    told = make_uploadable(tmp_path)
    paths = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")]
    assert not any(_REFUSED & set(path) for path in paths)
    assert all(path.isascii() for path in paths)
    assert "plain.txt" in paths
    assert "a%3Ab" in paths
    assert len(names(tmp_path)) == 6
    assert len(told) == 6
    assert not any("\n" in line for line in told)


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "a:b").write_text("one")
    (tmp_path / "a%3Ab").write_text("two")
    make_uploadable(tmp_path)
    assert {(tmp_path / name).read_text() for name in names(tmp_path)} == {"one", "two"}


def test_links_go(tmp_path):
    """An upload follows them: it would hold what they lead to."""
    (tmp_path / "secret").write_text("secret")
    results = tmp_path / "results"
    results.mkdir()
    (results / "link").symlink_to(tmp_path / "secret")
    (results / "folder").symlink_to(tmp_path)
    (results / "dangling").symlink_to("nowhere")
    make_uploadable(results)
    assert list(results.iterdir()) == []
    assert (tmp_path / "secret").read_text() == "secret"


def test_report_of_a_renamed_file_is_no_command(tmp_path):
    (tmp_path / "##[error]a:b").write_text("")
    [line] = make_uploadable(tmp_path)
    assert "##[" not in line


def test_no_folder(tmp_path):
    assert make_uploadable(tmp_path / "none") == []
