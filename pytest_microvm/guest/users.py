"""The users of a machine: found by name or number, and made if the host asks for one that is missing."""

from __future__ import annotations

import grp
import os
import pwd
import re
from typing import Any, NamedTuple

_MAX_ID = 2**32 - 2
_FIRST, _LAST = 1000, 59999  # numbers of ordinary users: UID_MIN and UID_MAX in login.defs(5)
_NAME = re.compile(r"[a-z_][a-z0-9_-]{0,31}")  # as adduser(8) accepts them

_SHELLS = ("/bin/bash", "/bin/sh")


class User(NamedTuple):
    """A user: its name, numbers, supplementary groups, home folder and shell."""

    name: str
    uid: int
    gid: int
    groups: list[int]
    home: str
    shell: str


def find_user(wanted: str | int | None) -> User:
    """Return the user that ``USER`` or ``USER:GROUP`` names, each a name or a number.

    A number needs no entry in /etc/passwd, as in containers: such a user has no other groups, and its home is
    ``/``.

    Args:
        wanted: The name; nothing means root.

    Raises:
        LookupError: There is no such user or group.
    """
    if wanted is None or wanted in ("", "root", 0):
        return User("root", 0, 0, [0], "/root", _shell("root"))
    name, _colon, group = str(wanted).partition(":")
    entry = _entry(name)
    if entry is None:
        uid = _number(name, "user", wanted)
        gid = _group(group, wanted) if group else 0
        return User(name, uid, gid, [gid], "/", _SHELLS[-1])
    gid = _group(group, wanted) if group else entry.pw_gid
    groups = [gid] if group else os.getgrouplist(entry.pw_name, gid)
    shell = entry.pw_shell or _SHELLS[-1]
    return User(entry.pw_name, entry.pw_uid, gid, groups, entry.pw_dir, shell)


def user_operation(request: dict[str, Any]) -> dict[str, Any]:
    """Return the user that the request names.

    Args:
        request: ``user`` (the name), and ``create``: whether to make it, and its home folder, if missing.
    """
    wanted, created = request["user"], False
    if request.get("create"):
        created = _create(str(wanted))
    user = find_user(wanted)
    if request.get("create") and not os.path.exists(user.home):
        _make_home(user)
    return {"name": user.name, "uid": user.uid, "gid": user.gid, "home": user.home, "created": created}


def _create(wanted: str) -> bool:
    """Make a user that has no entry in /etc/passwd; return whether it was missing.

    Programs such as useradd(8) are not used: not every image has them. The user has no password.
    """
    name, _colon, group = wanted.partition(":")
    if name in ("", "root", "0") or _entry(name) is not None:
        return False
    users = pwd.getpwall()
    if name.isascii() and name.isdigit():
        uid = _number(name, "user", wanted)
        name = f"user{uid}"
    else:
        uid = _free({user.pw_uid for user in users} | {each.gr_gid for each in grp.getgrall()})
    if not _NAME.fullmatch(name) or _entry(name) is not None:
        raise LookupError(f"the machine has no user {wanted!r}, and none can be made with that name")
    gid = _group(group, wanted) if group else _own_group(name, uid)
    shell = next((shell for shell in _SHELLS if os.path.exists(shell)), _SHELLS[-1])
    _append("/etc/passwd", f"{name}:*:{uid}:{gid}::/home/{name}:{shell}")
    return True


def _make_home(user: User) -> None:
    os.makedirs(user.home, 0o755)
    os.chmod(user.home, 0o700)
    os.chown(user.home, user.uid, user.gid)


def _own_group(name: str, uid: int) -> int:
    """Return the number of the group of a new user, made if it is missing."""
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        numbers = {group.gr_gid for group in grp.getgrall()}
        gid = uid if uid not in numbers else _free(numbers)
        _append("/etc/group", f"{name}:*:{gid}:")
        return gid


def _free(taken: set[int]) -> int:
    return next(number for number in range(_FIRST, _LAST) if number not in taken)


def _append(path: str, line: str) -> None:
    with open(path, "a+") as file:
        file.seek(0)
        text = file.read()
        file.write(line + "\n" if not text or text.endswith("\n") else f"\n{line}\n")


def _entry(name: str) -> pwd.struct_passwd | None:
    """Return the entry of a user in /etc/passwd, by its name or number."""
    try:
        return pwd.getpwnam(name)
    except KeyError:
        pass
    if not _is_number(name):
        return None
    try:
        return pwd.getpwuid(int(name))
    except KeyError:
        return None


def _shell(name: str) -> str:
    entry = _entry(name)
    return (entry and entry.pw_shell) or _SHELLS[-1]


def _group(name: str, wanted: str | int) -> int:
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return _number(name, "group", wanted)


def _number(text: str, what: str, wanted: str | int) -> int:
    if not _is_number(text):
        raise LookupError(f"the machine has no {what} {text!r} ({wanted!r})") from None
    return int(text)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and int(text[:11]) <= _MAX_ID
