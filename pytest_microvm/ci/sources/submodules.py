"""Find the repositories of a commit's submodules on this computer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from pytest_microvm.ci.sources.git_objects import borrowed
from pytest_microvm.errors import UsageError
from pytest_microvm.git.commands import GitError
from pytest_microvm.git.repository import Repository, repository_at, with_own_objects

_KEY = re.compile(r"submodule\.(.+)\.path", re.DOTALL)


def module_names(repository: Repository, gitmodules: str) -> Mapping[str, str]:
    """Return the submodules' names by their paths.

    git-config(1) reads only the blob; by default it would follow the blob's includes.

    Args:
        repository: The repository with the blob.
        gitmodules: The name of the blob of the commit's ``.gitmodules``.
    """
    asked = ("config", "--no-includes", "--blob", gitmodules, "-z", "--get-regexp", r"^submodule\..*\.path$")
    try:
        listed = repository.git(*asked)
    except GitError:  # the blob has no paths, or is no configuration
        return {}
    names = {}
    for item in listed.split("\0"):
        key, _newline, path = item.partition("\n")
        found = _KEY.fullmatch(key)
        if found and _is_safe(found[1]):
            names[path.removesuffix("/")] = found[1]
    return names


def find_module(name: str | None, folders: Sequence[Path], kind: str, commit: str) -> Repository | None:
    """Return a submodule's repository if it is on this computer and has the commit.

    Args:
        name: The submodule's name, if it has one.
        folders: The folders that contain submodules' repositories.
        kind: The required hash algorithm.
        commit: The required commit.
    """
    for folder in folders if name else ():
        place = folder / str(name)
        if not (place / "objects").is_dir() or not place.resolve().is_relative_to(folder.resolve()):
            continue
        try:
            module = repository_at(place)
            if module is None or module.format != kind:
                continue
            with borrowed(with_own_objects(module)) as repository:
                repository.git("cat-file", "-e", f"{commit}^{{tree}}")
        except (GitError, UsageError):
            continue
        return module
    return None


def _is_safe(name: str) -> bool:
    """Return True if a name is a safe relative path (compare git's check_submodule_name())."""
    names = re.split(r"[/\\]", name)
    return not name.startswith("-") and "" not in names and "." not in names and ".." not in names
