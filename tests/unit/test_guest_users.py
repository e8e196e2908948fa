"""The user of a command in a machine: names and numbers, with and without entries in /etc/passwd."""

import os
import re

import pytest

from pytest_microvm.guest import files, process, users
from pytest_microvm.guest.process import Child
from pytest_microvm.guest.users import User, find_user


@pytest.mark.parametrize("root", [None, "", "root", 0])
def test_root_is_the_default(root):
    found = find_user(root)
    assert (found.name, found.uid, found.gid, found.home) == ("root", 0, 0, "/root")
    assert process._demotion(found) is None


def test_names_and_numbers_of_entries():
    nobody = find_user("nobody")
    assert (nobody.name, nobody.uid) == ("nobody", 65534)
    assert find_user("65534") == find_user(65534) == nobody
    assert nobody.gid in nobody.groups


def test_number_without_an_entry():
    assert find_user("123456") == User("123456", 123456, 0, [0], "/", "/bin/sh")
    assert find_user("123456:7") == User("123456", 123456, 7, [7], "/", "/bin/sh")


def test_group_replaces_the_groups_of_thefind_user():
    found = find_user("nobody:daemon")
    assert (found.uid, found.gid, found.groups) == (65534, 1, [1])
    assert find_user("root:daemon").gid == 1


@pytest.fixture
def written(monkeypatch, tmp_path):
    """What is added to the files of users, which are not this computer's; by their names."""
    added = {}
    monkeypatch.setattr(
        users, "_append", lambda path, line: added.setdefault(path.rpartition("/")[2], []).append(line)
    )
    return added


def test_line_is_added_behind_last_one(tmp_path):
    for before in ("", "root:x\n", "root:x"):
        (tmp_path / "passwd").write_text(before)
        users._append(str(tmp_path / "passwd"), "anna:*")
        assert (tmp_path / "passwd").read_text() == ("root:x\n" if before else "") + "anna:*\n"


@pytest.mark.parametrize("name", ["no such", "-x", "Agent", "../x", "a" * 33, "a:b", "x\ny"])
def test_users_that_cannot_be_made(name, written):
    with pytest.raises(LookupError):
        users.user_operation({"user": name, "create": True})
    assert written == {}


def test_user_and_group_that_are_made(written):
    assert users._create("anna")
    assert users._create("123456")
    (anna, anonymous), groups = written["passwd"], written["group"]
    assert re.fullmatch(r"anna:\*:(\d{4,5}):(\d{4,5})::/home/anna:/bin/(ba)?sh", anna)
    assert re.fullmatch(r"user123456:\*:123456:123456::/home/user123456:/bin/(ba)?sh", anonymous)
    assert [line.partition(":")[0] for line in groups] == ["anna", "user123456"]
    assert not users._create("nobody")


@pytest.mark.parametrize("root", ["", "root", "0", "root:7", "0:0"])
def test_root_is_never_made(written, monkeypatch, root):
    monkeypatch.setattr(users, "_entry", lambda _name: None)  # as in an image without /etc/passwd
    assert not users._create(root)
    assert written == {}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root changes owners")
def test_own_gives_away_whole_tree_without_following_links(tmp_path):
    outside = tmp_path / "outside"
    outside.touch()
    (tmp_path / "tree" / "sub").mkdir(parents=True)
    (tmp_path / "tree" / "sub" / "file").touch()
    (tmp_path / "tree" / "link").symlink_to(outside)
    files.path_operation({"do": "own", "path": str(tmp_path / "tree"), "uid": 7, "gid": 8})
    found = [tmp_path / "tree", *(tmp_path / "tree").rglob("*")]
    assert {(path.lstat().st_uid, path.lstat().st_gid) for path in found} == {(7, 8)}
    assert outside.stat().st_uid == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root changes owners")
def test_own_leaves_what_a_user_has_put_there(tmp_path):
    secret = tmp_path / "secret"
    secret.touch()
    theirs = tmp_path / "tree" / "theirs"
    theirs.mkdir(parents=True)
    (theirs / "hard").hardlink_to(secret)
    os.chown(theirs, 7, 7)
    files.path_operation({"do": "own", "path": str(tmp_path / "tree"), "uid": 7, "gid": 7})
    assert secret.stat().st_uid == 0


def test_own_refuses_file_that_has_another_name(tmp_path):
    (tmp_path / "secret").touch()
    (tmp_path / "hard").hardlink_to(tmp_path / "secret")
    with pytest.raises(PermissionError, match="other names"):
        files.path_operation({"do": "own", "path": str(tmp_path / "hard"), "uid": 7, "gid": 7})
    (tmp_path / "soft").symlink_to(tmp_path / "secret")
    with pytest.raises(OSError, match="symbolic links"):
        files.path_operation({"do": "own", "path": str(tmp_path / "soft"), "uid": 7, "gid": 7})
    assert (tmp_path / "secret").stat().st_uid == os.geteuid()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root changes owners")
def test_new_folders_belong_to_owner_of_the_one_above(tmp_path):
    os.chown(tmp_path, 7, 8)
    files.make_folders(str(tmp_path / "a" / "b"))
    assert {((tmp_path / name).stat().st_uid, (tmp_path / name).stat().st_gid) for name in ("a", "a/b")} == {
        (7, 8)
    }


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        ("nosuchuser", "no user 'nosuchuser'"),
        ("-1", "no user '-1'"),
        ("4294967295", "no user '4294967295'"),
        ("99999999999999999999", "no user"),
        ("nobody:nosuchgroup", "no group 'nosuchgroup'"),
        ("7:x", "no group 'x'"),
        (":5", "no user ''"),
        ("٣", "no user"),
    ],
)
def test_users_that_are_not_there(wanted, why):
    with pytest.raises(LookupError, match=why):
        find_user(wanted)


def test_machine_without_a_shell_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(process, "_SHELL", str(tmp_path / "sh"))
    with pytest.raises(FileNotFoundError, match="the machine has no shell: give a program"):
        Child(1, {"shell": "id"})


def test_missing_interpreter_is_named_as_the_cause(tmp_path):
    script = tmp_path / "script"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    with pytest.raises(FileNotFoundError, match="its interpreter, or the loader of its C library"):
        Child(1, {"argv": [str(script)]})
    with pytest.raises(FileNotFoundError, match="No such file or directory"):
        Child(1, {"argv": [str(script)], "cwd": str(tmp_path / "nowhere")})
