"""The user of a command in a machine: names and numbers, with and without entries in /etc/passwd."""

import pytest

from pytest_microvm.guest import process
from pytest_microvm.guest.process import Child, _user


@pytest.mark.parametrize("root", [None, "", "root", 0])
def test_root_is_the_default(root):
    assert _user(root) is None


def test_names_and_numbers_of_entries():
    nobody = _user("nobody")
    assert (nobody.name, nobody.uid) == ("nobody", 65534)
    assert _user("65534") == _user(65534) == nobody
    assert nobody.gid in nobody.groups


def test_number_without_an_entry():
    assert _user("123456") == process._User("123456", 123456, 0, [0], "/")
    assert _user("123456:7") == process._User("123456", 123456, 7, [7], "/")


def test_group_replaces_the_groups_of_the_user():
    found = _user("nobody:daemon")
    assert (found.uid, found.gid, found.groups) == (65534, 1, [1])
    assert _user("root:daemon").gid == 1


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
        _user(wanted)


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
