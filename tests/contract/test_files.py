"""Files of a machine: pathlib's words, and trees both ways."""

import errno
import os
import stat

import pytest

from pytest_microvm.errors import TransferError, UsageError


def test_content(place):
    file = place / "file"
    assert file.write_text("Grüße\n") == 6
    assert file.read_text() == "Grüße\n"
    assert file.write_bytes(b"\x00\xff") == 2
    assert file.read_bytes() == b"\x00\xff"
    assert file.write_bytes(b"") == 0
    assert file.read_bytes() == b""


def test_pure_parts(vm):
    path = vm.path("/srv", "a") / "b.txt"
    assert (str(path), path.name, path.suffix, str(path.parent)) == (
        "/srv/a/b.txt",
        "b.txt",
        ".txt",
        "/srv/a",
    )
    assert path == vm.path("/srv/a/b.txt")
    assert len({path, vm.path("/srv/a/b.txt")}) == 1
    with pytest.raises(TypeError, match="use pull"):
        os.fspath(path)


def test_what_there_is(place):
    (place / "file").write_text("x")
    (place / "folder").mkdir()
    (place / "link").symlink_to("file")
    (place / "broken").symlink_to("nowhere")
    assert [(p.name, p.exists(), p.is_file(), p.is_dir(), p.is_symlink()) for p in place.iterdir()] == [
        ("broken", False, False, False, True),
        ("file", True, True, False, False),
        ("folder", True, False, True, False),
        ("link", True, True, False, True),
    ]
    assert str((place / "link").readlink()) == "file"
    assert not (place / "missing").exists()


def test_stat(place):
    (place / "file").write_text("12345")
    (place / "file").chmod(0o640)
    facts = (place / "file").stat()
    assert (stat.S_IMODE(facts["mode"]), facts["size"], facts["kind"], facts["uid"]) == (0o640, 5, "file", 0)


def test_changes(place):
    (place / "a" / "b").mkdir(parents=True)
    (place / "a").mkdir(exist_ok=True)
    (place / "a" / "b" / "file").write_text("x")
    moved = (place / "a" / "b" / "file").rename(place / "moved")
    assert moved.read_text() == "x"
    (place / "a" / "b").rmdir()
    moved.unlink()
    moved.unlink(missing_ok=True)
    (place / "a").rmtree()
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    ("operation", "error"),
    [
        (lambda place: (place / "missing").read_text(), FileNotFoundError),
        (lambda place: (place / "missing" / "x").write_text("x"), FileNotFoundError),
        (lambda place: (place / "missing").unlink(), FileNotFoundError),
        (lambda place: (place / "missing").stat(), FileNotFoundError),
        (lambda place: list((place / "missing").iterdir()), FileNotFoundError),
        (lambda place: (place / "missing").readlink(), FileNotFoundError),
        (lambda place: (place / "file" / "x").read_text(), NotADirectoryError),
        (lambda place: place.read_text(), IsADirectoryError),
        (lambda place: place.mkdir(), FileExistsError),
        (lambda place: (place / "file").mkdir(exist_ok=True), FileExistsError),
        (lambda place: (place / "file").rmdir(), NotADirectoryError),
    ],
)
def test_errors_are_those_of_the_host(place, operation, error):
    (place / "file").write_text("x")
    with pytest.raises(error, match="in the machine"):
        operation(place)


def test_a_folder_that_is_not_empty(place):
    (place / "folder" / "in").mkdir(parents=True)
    with pytest.raises(OSError, match="in the machine") as caught:
        (place / "folder").rmdir()
    assert caught.value.errno == errno.ENOTEMPTY


def tree_below(root):
    """Every entry below ``root``: kind, mode, content or target."""
    found = {}
    for path in root.rglob("*"):
        mode = stat.S_IMODE(path.lstat().st_mode)
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = ("link", str(path.readlink()))
        elif path.is_dir():
            found[name] = ("folder", mode)
        else:
            found[name] = ("file", mode, path.read_bytes())
    return found


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "tree"
    (root / "a" / "empty").mkdir(parents=True)
    (root / "a" / "script").write_text("#!/bin/sh\necho run\n")
    (root / "a" / "script").chmod(0o755)
    (root / "secret").write_text("s")
    (root / "secret").chmod(0o600)
    (root / "Grüße 漢字 'quoted'\n").write_text("odd name")
    (root / "link").symlink_to("a/script")
    (root / "a" / "up").symlink_to("../secret")
    (root / "broken").symlink_to("nowhere")
    (root / "empty file").touch()
    (root / "big").write_bytes(os.urandom(300_001))
    (root / ("n" * 200)).mkdir()
    (root / ("n" * 200) / ("m" * 200)).write_text("long")
    os.link(root / "big", root / "hard")
    return root


def test_a_tree_there_and_back(vm, place, tree, tmp_path):
    vm.push(tree, (place / "there").pure)
    assert vm.run([str(place / "there" / "a" / "script")]).stdout == "run\n"
    back = vm.pull((place / "there").pure, tmp_path / "back")
    assert back == tmp_path / "back"
    assert tree_below(back) == tree_below(tree)


def test_a_folder_that_is_pushed_leads_nowhere(vm, place, tmp_path):
    """Links are links in the machine; what is no file is left out, and makes nothing wait."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("secret")
    root = tmp_path / "tree"
    root.mkdir()
    (root / "file").write_text("x")
    (root / "folder").symlink_to(tmp_path / "outside")
    os.mkfifo(root / "pipe")
    vm.push(root, (place / "there").pure)
    assert sorted(path.name for path in (place / "there").iterdir()) == ["file", "folder"]
    assert (place / "there" / "folder").is_symlink()
    with pytest.raises(UsageError, match="neither a file nor a folder"):
        vm.push(root / "pipe", (place / "pipe").pure)


def test_a_file_there_and_back(vm, place, tmp_path):
    source = tmp_path / "source"
    source.write_bytes(os.urandom(20 * 1024**2))
    source.chmod(0o755)
    vm.push(source, (place / "file").pure)
    into = tmp_path / "into"
    into.mkdir()
    assert vm.pull(str(place / "file"), into) == into / "file"
    assert (into / "file").read_bytes() == source.read_bytes()
    assert stat.S_IMODE((into / "file").stat().st_mode) == 0o755


def test_pulling_does_not_take_over_dangerous_rights(vm, place, tmp_path):
    (place / "d" / "open").mkdir(parents=True)
    (place / "d" / "suid").write_text("x")
    (place / "d" / "suid").chmod(0o6777)
    (place / "d" / "open").chmod(0o1777)
    back = vm.pull((place / "d").pure, tmp_path / "back")
    assert stat.S_IMODE((back / "suid").stat().st_mode) == 0o755
    assert stat.S_IMODE((back / "open").stat().st_mode) == 0o755
    vm.pull((place / "d" / "suid").pure, tmp_path / "suid")
    assert stat.S_IMODE((tmp_path / "suid").stat().st_mode) == 0o755


def test_pulling_into_an_existing_folder_merges(vm, place, tmp_path):
    (place / "d" / "sub").mkdir(parents=True)
    (place / "d" / "sub" / "new").write_text("new")
    (place / "d" / "same").write_text("theirs")
    (place / "d" / "led").mkdir()
    (place / "d" / "led" / "astray").write_text("x")
    outside = tmp_path / "outside"
    outside.mkdir()
    target = tmp_path / "t" / "d"
    (target / "sub").mkdir(parents=True)
    (target / "sub" / "old").write_text("old")
    (target / "same").write_text("ours")
    (target / "led").symlink_to(outside)
    vm.pull((place / "d").pure, tmp_path / "t")
    assert (target / "sub" / "old").read_text() == "old"
    assert (target / "sub" / "new").read_text() == "new"
    assert (target / "same").read_text() == "theirs"
    assert (target / "led" / "astray").read_text() == "x"
    assert list(outside.iterdir()) == []
    assert sorted(path.name for path in (tmp_path / "t").iterdir()) == ["d"]


def test_pulled_folder_replaces_a_link_of_its_name(vm, place, tmp_path):
    (place / "d").mkdir()
    (place / "d" / "new").write_text("new")
    outside, target = tmp_path / "outside", tmp_path / "t"
    outside.mkdir()
    target.mkdir()
    (target / "d").symlink_to(outside)
    vm.pull((place / "d").pure, target)
    assert (target / "d" / "new").read_text() == "new"
    assert list(outside.iterdir()) == []


def test_a_link_to_a_file_is_pulled_as_the_file(vm, place, tmp_path):
    (place / "file").write_text("content")
    (place / "link").symlink_to("file")
    assert vm.pull((place / "link").pure, tmp_path / "got").read_text() == "content"
    assert not (tmp_path / "got").is_symlink()


@pytest.mark.parametrize("target", ["/etc/passwd", "../../outside", "."])
def test_a_link_out_is_refused_and_leaves_nothing(vm, place, tmp_path, target):
    (place / "d").mkdir()
    (place / "d" / "a").write_text("x")
    (place / "d" / "z").symlink_to(target)
    if target == ".":
        vm.pull((place / "d").pure, tmp_path / "back")
        assert str((tmp_path / "back" / "z").readlink()) == "."
        return
    with pytest.raises(TransferError, match="refused: a link that may lead out"):
        vm.pull((place / "d").pure, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".pull")] == []


def test_a_device_is_refused(vm, tmp_path):
    with pytest.raises(UsageError, match="neither a file nor a folder"):
        vm.pull("/dev/null", tmp_path / "null")


def test_a_file_without_a_size_has_its_content(vm, tmp_path):
    assert "processor" in vm.pull("/proc/cpuinfo", tmp_path / "cpuinfo").read_text()


def test_what_is_missing(vm, place, tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        vm.push(tmp_path / "missing", (place / "x").pure)
    with pytest.raises(FileNotFoundError, match="in the machine"):
        vm.pull((place / "missing").pure, tmp_path / "x")
    with pytest.raises(UsageError, match="is not a folder"):
        vm.pull(place.pure, tmp_path / "no" / "such" / "folder")
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileNotFoundError, match="in the machine"):
        vm.push(tmp_path / "file", (place / "no" / "such" / "file").pure)


def test_the_machine_is_usable_after_broken_transfers(vm, place, tmp_path):
    (tmp_path / "big").write_bytes(b"x" * 3_000_000)
    for _ in range(3):
        with pytest.raises(FileNotFoundError):
            vm.push(tmp_path / "big", (place / "no" / "file").pure)
    assert vm.run(["echo", "fine"]).stdout == "fine\n"
