"""Validate the paths of a commit's files: refuse those that would attack the computer that writes them."""

from __future__ import annotations

import re

MAX_PATH = 4000
"""Maximum length of a path in bytes; Linux allows 4095."""

_MAX_NAME = 255  # bytes of one name, NAME_MAX
# Characters that HFS+ ignores in a name, from git's utf8.c (next_hfs_char).
_IGNORED = re.compile("[\u200c-\u200f\u202a-\u202e\u206a-\u206f\ufeff]")


def refusal(path: bytes) -> str:
    """Return the reason to refuse a path as a file of a workspace, or an empty text if it is valid.

    Names that any file system takes for ``.git`` are refused, as ``git fsck`` does: a file of a commit must
    not become a part of the repository beside it.
    """
    names = path.split(b"/")
    if not path or path.startswith(b"/") or b"" in names:
        return "it is no relative path"
    if b"\0" in path or len(path) > MAX_PATH or max(map(len, names)) > _MAX_NAME:
        return "no file system has such a path"
    if b"." in names or b".." in names:
        return "it leaves the workspace"
    if any(map(_is_git, names)):
        return "it would be a part of the repository itself"
    return ""


def _is_git(name: bytes) -> bool:
    text = _IGNORED.sub("", name.decode("utf-8", "surrogateescape")).lower()
    plain = re.split(r"[:\\]", text)[0].rstrip(" .")  # NTFS: streams, separators, stripped endings
    return text == ".git" or plain in (".git", "git~1")
